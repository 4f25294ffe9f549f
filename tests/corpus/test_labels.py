"""Questions outlive the absence of their PDF, and annotations find their PDF under other spellings."""

import json
import unicodedata

import pytest
from helpers.pdfs import blank_pdf

from mmr5_lab.corpus.documents import ANNOTATIONS, load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.ingest import build_corpus
from mmr5_lab.corpus.labels import SET_ASIDE
from mmr5_lab.views.annotator import add_question


@pytest.fixture
def pdfs(tmp_path):
    folder = tmp_path / "pdfs"
    folder.mkdir()
    blank_pdf(folder / "a.pdf", 3)
    blank_pdf(folder / "b.pdf", 2)
    return folder


@pytest.fixture
def out(pdfs, tmp_path):
    """A corpus with two questions about a.pdf and one about b.pdf."""
    ingest(pdfs, tmp_path / "out")
    add_question(tmp_path / "out", "a.pdf", "First?", [0])
    add_question(tmp_path / "out", "a.pdf", "Second?", [2])
    add_question(tmp_path / "out", "b.pdf", "Third?", [1])
    return tmp_path / "out"


def ingest(pdfs, out, annotations=None) -> list[tuple[str, str]]:
    corpus = build_corpus(pdfs, out, annotations, max_pixels=600, ocr="none")
    return list(zip(corpus.questions["doc_name"], corpus.questions["question"], strict=True))


def annotation(name: str, *questions: tuple[str, list[int]], **more) -> dict:
    entries = [{"Q": text, "A": "", "page_id": pages, "type": "text-only"} for text, pages in questions]
    return {"doc_name": name, "domain": "Laws", "questions": entries} | more


ALL = [("a.pdf", "First?"), ("a.pdf", "Second?"), ("b.pdf", "Third?")]


@pytest.mark.parametrize("how", ["half copied", "absent", "in no folder that is read"])
def test_questions_return_with_their_pdf(pdfs, out, how, caplog):
    whole = (pdfs / "a.pdf").read_bytes()
    if how == "half copied":
        (pdfs / "a.pdf").write_bytes(whole[:300])
    elif how == "absent":
        (pdfs / "a.pdf").unlink()
    else:
        (pdfs / ".old").mkdir()
        (pdfs / "a.pdf").rename(pdfs / ".old" / "a.pdf")
    for _ in range(2):  # however often it is run
        assert ingest(pdfs, out) == ALL[2:]
    assert f"questions without a place here are set aside in {out / SET_ASIDE}: a.pdf (2)" in caplog.text
    report = json.loads((out / "ingest_report.json").read_text())
    assert report["set_aside"] == [{"doc_name": "a.pdf", "questions": 2}]
    (pdfs / "a.pdf").write_bytes(whole)
    assert ingest(pdfs, out) == ALL
    assert load_corpus(out).questions["gold_pages"].tolist() == [[0], [2], [1]]
    assert not (out / SET_ASIDE).exists()


def test_questions_go_with_a_pdf_that_is_renamed_or_moved(pdfs, out, caplog):
    (pdfs / "sub").mkdir()
    (pdfs / "b.pdf").rename(pdfs / "c.pdf")
    (pdfs / "a.pdf").rename(pdfs / "sub" / "A.PDF")
    assert ingest(pdfs, out) == [("c.pdf", "Third?"), ("sub/A.PDF", "First?"), ("sub/A.PDF", "Second?")]
    assert "b.pdf is c.pdf now: its 1 questions go with it" in caplog.text
    (pdfs / "c.pdf").rename(pdfs / "b.pdf")
    (pdfs / "sub" / "A.PDF").rename(pdfs / "a.pdf")
    assert ingest(pdfs, out) == ALL


def test_questions_that_an_annotation_file_lacks_are_set_aside_too(pdfs, out, caplog):
    """`--annotations` replaces the corpus's questions; those made by hand must not be gone."""
    given = [annotation("b.pdf", ("Other?", [0])), annotation("z.pdf", ("Absent?", [0]))]
    assert ingest(pdfs, out, given) == [*ALL[:2], ("b.pdf", "Other?")]
    records = [json.loads(line) for line in (out / SET_ASIDE).read_text().splitlines()]
    assert [(r["doc_name"], [q["Q"] for q in r["questions"]]) for r in records] == [
        ("z.pdf", ["Absent?"]),
        ("b.pdf", ["Third?"]),
    ]
    blank_pdf(pdfs / "z.pdf", 1)  # comes later, without the annotation file
    assert ingest(pdfs, out) == [*ALL[:2], ("b.pdf", "Other?"), ("z.pdf", "Absent?")]
    assert "Third?" in (out / SET_ASIDE).read_text()  # and stays there, as it was replaced


def test_questions_about_pages_that_a_shorter_pdf_has_no_more_are_set_aside(pdfs, out, caplog):
    blank_pdf(pdfs / "a.pdf", 1)
    assert ingest(pdfs, out) == [ALL[0], ALL[2]]
    assert "a.pdf has changed: look whether its 1 questions still fit" in caplog.text
    assert "Second?" in (out / SET_ASIDE).read_text()
    blank_pdf(pdfs / "a.pdf", 3)
    assert ingest(pdfs, out) == ALL
    assert not (out / SET_ASIDE).exists()


def test_a_run_that_ends_before_its_corpus_is_whole_loses_no_question(pdfs, out, monkeypatch):
    (pdfs / "a.pdf").unlink()
    blank_pdf(pdfs / "c.pdf", 1)

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mmr5_lab.corpus.ingest.write_corpus", full)
        with pytest.raises(OSError, match="No space"):
            ingest(pdfs, out)
    assert ingest(pdfs, out) == ALL[2:]
    assert (out / SET_ASIDE).read_text().count('"Q"') == 2


def test_no_question_is_added_while_the_corpus_is_made(pdfs, out, monkeypatch):
    """It would be overwritten at the end."""
    from mmr5_lab.corpus import annotations
    from mmr5_lab.corpus import ingest as module

    write = module.write_corpus

    def meanwhile(*arguments, **options):
        with pytest.raises(CorpusError, match=r"another process is changing .*, such as mmr5 ingest: try again"):
            add_question(out, "a.pdf", "Fourth?", [0])
        return write(*arguments, **options)

    monkeypatch.setattr(module, "write_corpus", meanwhile)
    monkeypatch.setattr(annotations, "_PATIENCE", 0.1)
    assert ingest(pdfs, out) == ALL


@pytest.mark.parametrize("name", ["A", "a", "A.PDF", "x/y/a.pdf", "x\\y\\a.pdf"])
def test_annotations_find_their_pdf(pdfs, tmp_path, name):
    assert ingest(pdfs, tmp_path / "new", [annotation(name, ("Which?", [1]))]) == [("a.pdf", "Which?")]


def test_accents_are_compared_in_one_form(pdfs, tmp_path):
    name = "Résumé, 1ère année.pdf"
    blank_pdf(pdfs / unicodedata.normalize("NFD", name), 1)
    given = [annotation(unicodedata.normalize("NFC", name).upper(), ("Où?", [0]))]
    assert ingest(pdfs, tmp_path / "new", given) == [(name, "Où?")]


def test_a_name_that_could_be_two_pdfs_is_nobody_s(pdfs, tmp_path, caplog):
    for folder in ("x", "y"):
        (pdfs / folder).mkdir()
        blank_pdf(pdfs / folder / "c.pdf", 1)
    given = [annotation("c.pdf", ("Which?", [0])), annotation("repott.pdf", ("Where?", [0]))]
    blank_pdf(pdfs / "report.pdf", 1)
    assert ingest(pdfs, tmp_path / "new", given) == []
    assert "c.pdf (1)" in caplog.text
    assert "repott.pdf (1) (the nearest name is 'report.pdf')" in caplog.text
    # but the full path is
    assert ingest(pdfs, tmp_path / "new", [annotation("x/C", ("Which?", [0]))])[0] == ("x/c.pdf", "Which?")


def test_one_document_under_two_names_is_refused(pdfs, tmp_path):
    lines = [json.dumps(annotation(name)) for name in ("a.pdf", "A")]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        CorpusError, match=r"labels.jsonl, line 2: document 'A' is annotated twice, as 'a.pdf' in .*line 1"
    ):
        ingest(pdfs, tmp_path / "new", tmp_path / "labels.jsonl")


def test_an_exclusive_end_is_told(pdfs, tmp_path):
    given = [annotation("a.pdf", page_indices=[0, 3]), annotation("b.pdf", page_indices=[3, 5])]
    with pytest.raises(CorpusError, match="none of the 2 PDFs"):
        ingest(pdfs, tmp_path / "new", given)
    report = json.loads((tmp_path / "new" / "ingest_report.json").read_text())
    assert [entry["reason"] for entry in report["skipped"]] == [
        "it has 3 pages but page_indices of its annotation says 4 (annotation 0: [0, 3]); "
        "the end is inclusive: write [0, 2]",
        "it has 2 pages but page_indices of its annotation says 3 (annotation 1: [3, 5]); "
        "the end is inclusive: write [3, 4]",
    ]


def test_the_last_line_is_read_without_its_line_break_and_with_a_mark(pdfs, tmp_path):
    lines = [json.dumps(annotation("a.pdf", ("One?", [0]))), json.dumps(annotation("b.pdf", ("Two?", [0])))]
    (tmp_path / "labels.jsonl").write_text("\ufeff" + "\r\n".join(lines))
    assert ingest(pdfs, tmp_path / "new", tmp_path / "labels.jsonl") == [("a.pdf", "One?"), ("b.pdf", "Two?")]
    assert (tmp_path / "new" / ANNOTATIONS).read_text().endswith("\n")


def test_a_label_that_no_document_could_have_is_refused_at_once(pdfs, tmp_path):
    wrong = [annotation("a.pdf", ("One?", [0])), annotation("absent.pdf", ("Two?", ["1"]))]
    with pytest.raises(CorpusError, match=r"annotation 1: question 0 of 'absent.pdf': page_id is not a list of page"):
        ingest(pdfs, tmp_path / "new", wrong)


def test_names_that_differ_in_capitals_or_ending_are_documents_of_their_own(tmp_path):
    (tmp_path / "in").mkdir()
    for name, pages in (("a.pdf", 1), ("A.PDF", 2), ("a", 3)):
        blank_pdf(tmp_path / "in" / name, pages)
    both = [annotation("a.pdf", ("Small?", [0])), annotation("A.PDF", ("Large?", [1]))]
    assert ingest(tmp_path / "in", tmp_path / "out", both) == [("A.PDF", "Large?"), ("a.pdf", "Small?")]
    add_question(tmp_path / "out", "a", "None?", [2])
    everything = [("A.PDF", "Large?"), ("a", "None?"), ("a.pdf", "Small?")]
    assert ingest(tmp_path / "in", tmp_path / "out") == everything
    (tmp_path / "in" / "a").rename(tmp_path / "elsewhere")
    ingest(tmp_path / "in", tmp_path / "out")
    (tmp_path / "elsewhere").rename(tmp_path / "in" / "a")
    assert ingest(tmp_path / "in", tmp_path / "out") == everything
