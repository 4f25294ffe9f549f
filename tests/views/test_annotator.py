"""Questions labelled in the widget are MMDocIR's, are loaded with the corpus, and outlive a second ingest."""

import json

import pytest

from mmr5_lab.corpus.documents import ANNOTATIONS, load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.views.annotator import Annotator, add_question

EVIL = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> bytes:
    return make_corpus(tmp_path_factory.mktemp("mini"), seed=5, splits={"sft": (1, 1)}).page_bytes("sft-000", 0)


@pytest.fixture
def folder(tmp_path, page):
    """Two documents without questions; the second has a page that cannot be shown."""
    records = [{"doc_name": name, "domain": "PDF", "questions": []} for name in ("a.pdf", "b.pdf")]
    rows = [("a.pdf", page), ("a.pdf", page), ("a.pdf", page), ("b.pdf", page), ("b.pdf", b"broken")]
    write_corpus(tmp_path, records, ({"doc_name": n, "image_binary": i, "ocr_text": "the staff"} for n, i in rows))
    return tmp_path


def test_a_question_is_written_as_mmdocir_writes_it(folder):
    assert add_question(folder, "a.pdf", " How many staff? ", [2, 0], "12", ["Table", "Chart"]) == "a.pdf:q0"
    assert add_question(folder, "a.pdf", "Since when?", [1]) == "a.pdf:q1"
    [first, _] = json.loads((folder / ANNOTATIONS).read_text().splitlines()[0])["questions"]
    assert first == {
        "Q": "How many staff?", "A": "12", "page_id": [0, 2], "type": "['Table', 'Chart']", "layout_mapping": [],
    }  # fmt: skip
    loaded = load_corpus(folder).questions
    assert loaded["type"].tolist() == [("Table", "Chart"), ()]
    assert set(retrieve(load_corpus(folder)).pages) == {"a.pdf:q0", "a.pdf:q1"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("c.pdf", "q", [0]), "no document 'c.pdf'"),
        (("a.pdf", "  ", [0]), "the question is empty"),
        (("a.pdf", "q", []), "no page is marked"),
        (("a.pdf", "q", [3]), "gold page 3 does not exist; pages are 0 to 2"),
    ],
)
def test_what_would_not_load_is_not_written(folder, given, message):
    before = (folder / ANNOTATIONS).read_bytes()
    with pytest.raises(CorpusError, match=message):
        add_question(folder, *given)
    assert (folder / ANNOTATIONS).read_bytes() == before


def test_the_widget_marks_pages_and_saves(folder, page):
    widget = Annotator(folder)
    assert (widget.page.max, widget.image.value, widget.image.format) == (3, page, "png")
    widget.save.click()
    assert "✗ not saved: the question is empty" in widget.status.value
    widget.question.value, widget.answer.value, widget.types.value = EVIL, "12", ("Chart",)
    widget.on.click()
    widget.mark.value = True
    widget.on.click()
    assert not widget.mark.value, "the mark is the page's"
    widget.mark.value = True
    widget.back.click()
    assert widget.mark.value
    assert "<b>2, 3</b>" in widget.pages.value
    widget.save.click()
    assert "saved as a.pdf:q0" in widget.status.value
    assert (widget.question.value, widget.marked, widget.mark.value) == ("", set(), False)
    assert "1 questions about" in widget.saved.value
    assert "(page 2, 3)" in widget.saved.value
    assert "<img" not in widget.saved.value
    assert load_corpus(folder).questions.loc[0, ["question", "gold_pages"]].tolist() == [EVIL, [1, 2]]


def test_marks_belong_to_one_document_and_a_broken_page_is_told(folder):
    widget = Annotator(folder)
    widget.page.value = 3
    widget.mark.value = True
    widget.document.value = "b.pdf"
    assert (widget.page.value, widget.page.max, widget.marked) == (1, 2, set())
    widget.on.click()
    widget.on.click()
    assert widget.page.value == 2
    assert "not a readable image" in widget.status.value
    assert widget.image.value == b""


def test_questions_outlive_a_second_ingest(tmp_path):
    pdfium = pytest.importorskip("pypdfium2")
    from mmr5_lab.corpus.ingest import build_corpus

    (tmp_path / "pdfs").mkdir()
    document = pdfium.PdfDocument.new()
    for _ in range(2):
        document.new_page(200, 300)
    document.save(tmp_path / "pdfs" / "a.pdf")
    build_corpus(tmp_path / "pdfs", tmp_path / "corpus", max_pixels=10_000, ocr="none")
    add_question(tmp_path / "corpus", "a.pdf", "How many staff?", [1])
    document.save(tmp_path / "pdfs" / "b.pdf")
    again = build_corpus(tmp_path / "pdfs", tmp_path / "corpus", max_pixels=10_000, ocr="none")
    assert again.documents["doc_name"].tolist() == ["a.pdf", "b.pdf"]
    assert again.questions["question"].tolist() == ["How many staff?"]
