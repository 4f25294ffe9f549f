"""What a folder holds besides PDFs, and how names become names of documents."""

import os
import unicodedata

import pytest
from helpers.pdfs import blank_pdf

from mmr5_lab.corpus.ids import CorpusError, name_key, nearest, page_id, question_key
from mmr5_lab.corpus.ingest import build_corpus
from mmr5_lab.corpus.pdf_folder import list_pdfs


def test_everything_is_read_or_named(tmp_path):
    folder = tmp_path / "pdfs"
    for name in ("a.pdf", "B.PDF", "sub/deep/a.pdf", ".hidden/x.pdf", "out/y.pdf", "report", "Annual 2.1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        blank_pdf(folder / name, 1)
    (folder / "scan.tif").write_bytes(b"II*\x00")
    (folder / "readme").write_text("about %PDF- files" * 200)
    (folder / "gone.pdf").symlink_to("nowhere.pdf")
    (folder / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    blank_pdf(tmp_path / "elsewhere" / "c.pdf", 1)
    os.mkfifo(folder / "pipe.pdf")
    contents = list_pdfs(folder, without=folder / "out")
    assert list(contents.pdfs) == ["Annual 2.1", "B.PDF", "a.pdf", "linked/c.pdf", "report", "sub/deep/a.pdf"]
    assert contents.unusable == {
        "gone.pdf": "it is a link to 'nowhere.pdf', which does not exist",
        "pipe.pdf": "it is not a regular file",
    }
    assert contents.others == ["readme", "scan.tif"]


def test_names_have_composed_accents_and_can_be_written(tmp_path):
    name = unicodedata.normalize("NFD", "Übersicht.pdf")
    blank_pdf(tmp_path / name, 1)
    blank_pdf(tmp_path / unicodedata.normalize("NFC", name), 1)
    blank_pdf(tmp_path / "plain.pdf", 1)
    os.rename(os.fsencode(tmp_path / "plain.pdf"), os.fsencode(tmp_path) + b"/b\xe9.pdf")  # Latin-1, not UTF-8
    contents = list_pdfs(tmp_path, without=tmp_path / "out")
    assert list(contents.pdfs) == ["b\\xe9.pdf", "Übersicht.pdf"]
    assert contents.unusable == {"Übersicht.pdf (2)": "another file has this name, with its accents written otherwise"}
    corpus = build_corpus(tmp_path, tmp_path / "out", max_pixels=600, ocr="none")
    assert corpus.num_pages("b\\xe9.pdf") == 1


def test_the_log_names_what_is_left_out(tmp_path, caplog):
    blank_pdf(tmp_path / "a.pdf", 1)
    (tmp_path / "scan.tif").write_bytes(b"II*\x00")
    (tmp_path / "gone.pdf").symlink_to("nowhere.pdf")
    build_corpus(tmp_path, tmp_path / "out", max_pixels=600, ocr="none")
    assert "1 files are no PDFs and are left out: scan.tif" in caplog.text
    assert "gone.pdf is skipped: it is a link to 'nowhere.pdf', which does not exist" in caplog.text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Übersicht.pdf", unicodedata.normalize("NFD", "ÜBERSICHT.PDF")),
        ("report", "Report.pdf"),
        ("straße.pdf", "STRASSE"),
        ("a.b", "A.B.pdf"),
    ],
)
def test_spellings_of_a_name_share_a_key(one, other):
    assert name_key(one) == name_key(other)
    assert question_key(page_id(one, 3)) == question_key(page_id(other, 3))
    assert name_key(one) != name_key(other + "x")


def test_the_nearest_name_is_told():
    assert nearest("repotr.pdf", ["report.pdf", "other.pdf"]) == " (the nearest name is 'report.pdf')"
    assert nearest("x", ["report.pdf"]) == ""


def test_a_corpus_knows_other_spellings(tmp_path):
    blank_pdf(tmp_path / "Übersicht.PDF", 2)
    corpus = build_corpus(tmp_path, tmp_path / "out", max_pixels=600, ocr="none")
    name = unicodedata.normalize("NFD", "übersicht")
    assert corpus.num_pages(name) == 2
    assert corpus.page_image(name, 1).size == (20, 30)
    assert corpus.subset([name]).documents["doc_name"].tolist() == ["Übersicht.PDF"]
    with pytest.raises(CorpusError, match=r"no document 'Ubersicht.PDF' \(the nearest name is 'Übersicht.PDF'\)"):
        corpus.rows("Ubersicht.PDF")
