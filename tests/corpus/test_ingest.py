"""A folder of PDFs turned into a corpus, resumable page by page."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import matplotlib
import psutil
import pyarrow.parquet as pq
import pytest
from helpers.pdfs import bare_pdf, blank_pdf, boxes_pdf, encrypted_pdf, picture_pdf, program, text_pdf

from mmr5_lab.corpus import ocr
from mmr5_lab.corpus.documents import ANNOTATIONS, PAGES, load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.ingest import build_corpus
from mmr5_lab.corpus.pdf_process import PdfProcesses
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.files import sole_writer

matplotlib.use("agg")


def document(doc_name: str, *questions: dict, **more) -> dict:
    return {"doc_name": doc_name, "domain": "Laws", "questions": list(questions)} | more


def question(text: str, gold: list[int]) -> dict:
    return {"Q": text, "A": "yes", "page_id": gold, "type": "text-only", "layout_mapping": []}


@pytest.fixture(autouse=True)
def no_reader(monkeypatch):
    """Whatever OCR this machine has, "auto" finds none, so that pictures stay without words unless a test says so."""
    monkeypatch.setattr(ocr, "AUTO", ())


@pytest.fixture
def pdfs(tmp_path):
    folder = tmp_path / "pdfs"
    folder.mkdir()
    text_pdf(folder / "words.pdf", "apples and pears", "only plums")
    picture_pdf(folder / "Scan 1.PDF", pages=3)
    (folder / "notes.txt").write_text("not a document")
    return folder


def test_pdfs_become_a_corpus(pdfs, tmp_path):
    corpus = build_corpus(pdfs, tmp_path / "out", max_pixels=12_000)
    assert corpus.documents[["doc_name", "domain", "num_pages"]].to_numpy().tolist() == [
        ["Scan 1.PDF", "PDF", 3],
        ["words.pdf", "PDF", 2],
    ]
    assert corpus.questions.empty
    assert corpus.page_text("words.pdf", 0).strip() == "apples and pears"
    # 12,000 pixels in the aspect 4 : 3 are 126.5 × 94.9; PDFium rounds up, the budget holds
    assert corpus.page_image("words.pdf", 0).size == (126, 95)
    red, green, blue = corpus.page_image("Scan 1.PDF", 2).getpixel((40, 40))
    assert (abs(red - 200) < 6, abs(green - 60) < 6, blue < 6) == (True, True, True)
    # pages without a text layer are kept and flagged
    assert corpus.pages["has_text"].tolist() == [False, False, False, True, True]
    report = json.loads((tmp_path / "out" / "ingest_report.json").read_text())
    assert [(entry["file"], entry["pages"], entry["read_by"]) for entry in report["documents"]] == [
        ("Scan 1.PDF", 3, ["none"] * 3),
        ("words.pdf", 2, ["text layer"] * 2),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ANNOTATIONS,
        PAGES,
        "ingest_report.json",
    ]


@pytest.mark.parametrize("size", [(4, 3), (20, 1), (1, 30)])
@pytest.mark.parametrize("max_pixels", [1, 997, 50_000])
def test_a_page_keeps_to_the_pixel_budget(tmp_path, size, max_pixels):
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=size)
    (tmp_path / "in").mkdir()
    figure.savefig(tmp_path / "in" / "a.pdf")
    plt.close(figure)
    image = build_corpus(tmp_path / "in", tmp_path / "out", max_pixels=max_pixels).page_image("a.pdf", 0)
    assert image.width * image.height <= max_pixels


def test_annotations_are_taken_for_the_documents_that_are_there(pdfs, tmp_path, caplog):
    annotated = [
        document("words.pdf", question("Which fruit?", [1]), page_indices=[700, 701], layout_indices=[0, 9]),
        document("absent.pdf", question("Where?", [0]), page_indices=[0, 0]),
    ]
    (tmp_path / ANNOTATIONS).write_text("".join(json.dumps(record) + "\n" for record in annotated))
    corpus = build_corpus(pdfs, tmp_path / "out", tmp_path / ANNOTATIONS, max_pixels=1000)
    assert corpus.documents["domain"].tolist() == ["PDF", "Laws"]
    assert corpus.documents["first_row"].tolist() == [0, 3]  # rows of this page file, not the annotations'
    assert corpus.questions[["question_id", "gold_pages"]].to_numpy().tolist() == [["words.pdf:q0", [1]]]
    assert "questions without a place here are set aside in" in caplog.text
    assert "set_aside.jsonl: absent.pdf (1)" in caplog.text


def test_a_gold_page_that_a_pdf_lacks_is_named_before_the_long_work(pdfs, tmp_path, rendered):
    with pytest.raises(CorpusError, match=r"question 0 of 'words\.pdf': gold page 2 does not exist"):
        build_corpus(pdfs, tmp_path / "out", [document("words.pdf", question("?", [2]))], max_pixels=1000)
    assert rendered == []


def test_pdfs_that_cannot_be_used_are_skipped_and_reported(pdfs, tmp_path, caplog):
    whole = (pdfs / "words.pdf").read_bytes()
    (pdfs / "corrupt.pdf").write_bytes(whole[:200])
    (pdfs / "empty.pdf").write_bytes(b"")
    bare_pdf(pdfs / "no pages.pdf")
    encrypted_pdf(pdfs / "secret.pdf")
    annotated = [document("words.pdf", page_indices=[10, 14])]
    with caplog.at_level(logging.WARNING):
        corpus = build_corpus(pdfs, tmp_path / "out", annotated, max_pixels=1000)
    assert corpus.documents["doc_name"].tolist() == ["Scan 1.PDF"]
    skipped = json.loads((tmp_path / "out" / "ingest_report.json").read_text())["skipped"]
    reasons = {entry["file"]: entry["reason"] for entry in skipped}
    assert list(reasons) == ["corrupt.pdf", "empty.pdf", "no pages.pdf", "secret.pdf", "words.pdf"]
    assert "PDFium cannot read it" in reasons["corrupt.pdf"]
    assert "PDFium cannot read it" in reasons["empty.pdf"]
    assert "without pages?" in reasons["no pages.pdf"]
    assert "encrypted" in reasons["secret.pdf"]
    assert "password" in reasons["secret.pdf"]
    # labels that were made for another number of pages may point anywhere
    assert reasons["words.pdf"] == "it has 2 pages but page_indices of its annotation says 5 (annotation 0: [10, 14])"
    for name in reasons:
        assert f"{name} is skipped" in caplog.text


def test_a_folder_without_usable_pdfs_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="holds no PDF files"):
        build_corpus(tmp_path, tmp_path / "out")
    with pytest.raises(CorpusError, match="absent is not a folder"):
        build_corpus(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty.pdf").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"none of the 1 PDFs in .* can be used: see .*ingest_report.json"):
        build_corpus(tmp_path, tmp_path / "out")
    with pytest.raises(CorpusError, match="max_pixels is 0"):
        build_corpus(tmp_path, tmp_path / "out", max_pixels=0)


def test_another_corpus_is_not_overwritten(pdfs, tmp_path):
    write_corpus(tmp_path / "other", [document("a.pdf")], [{"doc_name": "a.pdf", "image_binary": b"x"}])
    with pytest.raises(CorpusError, match="not made from PDFs here"):
        build_corpus(pdfs, tmp_path / "other")


def test_bad_annotation_files_are_named(pdfs, tmp_path):
    with pytest.raises(CorpusError, match=r"absent.jsonl does not exist"):
        build_corpus(pdfs, tmp_path / "out", tmp_path / "absent.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"doc_name": "words.pdf", "domain": "Laws", "questions": []}\n{')
    with pytest.raises(CorpusError, match=r"bad.jsonl, line 2 is not JSON"):
        build_corpus(pdfs, tmp_path / "out", tmp_path / "bad.jsonl")


@pytest.fixture
def interrupt():
    """Its `after` is the number of rendered pages after which a run is interrupted."""
    return SimpleNamespace(after=None)


@pytest.fixture
def rendered(monkeypatch, interrupt):
    """A list that gets the name and page of each page rendered from here on."""
    pages = []
    make_page = PdfProcesses.make_page

    def counted(self, path, page, *target):
        if len(pages) == interrupt.after:
            raise KeyboardInterrupt
        pages.append((path.name, page))
        return make_page(self, path, page, *target)

    monkeypatch.setattr(PdfProcesses, "make_page", counted)
    return pages


def test_an_interrupted_run_goes_on_at_the_page_where_it_stopped(pdfs, tmp_path, interrupt, rendered):
    """`Scan 1.PDF` (3 pages) is done when the second page of `words.pdf` (2 pages) is interrupted."""
    interrupt.after = 4
    with pytest.raises(KeyboardInterrupt):
        build_corpus(pdfs, tmp_path / "out", max_pixels=1000)
    assert len(rendered) == 4
    assert not (tmp_path / "out" / PAGES).exists()
    interrupt.after = None
    corpus = build_corpus(pdfs, tmp_path / "out", max_pixels=1000)
    assert rendered[4:] == [("words.pdf", 1)]
    assert len(corpus.pages) == 5


def test_another_folder_of_the_same_name_does_not_take_over_a_corpus(pdfs, tmp_path):
    """Notebook 01 writes to runs/corpora/NAME: PDFs of another folder with that name would set all labels aside."""
    corpus = build_corpus(pdfs, tmp_path / "out", [document("words.pdf", question("Which fruit?", [0]))])
    other = tmp_path / "elsewhere" / "pdfs"
    other.mkdir(parents=True)
    text_pdf(other / "report.pdf", "cherries")
    with pytest.raises(
        CorpusError, match=r"out is the corpus of .*pdfs, and .*elsewhere/pdfs has none of its documents"
    ):
        build_corpus(other, tmp_path / "out")
    assert load_corpus(tmp_path / "out").questions.equals(corpus.questions)
    pdfs.rename(tmp_path / "moved")
    assert len(build_corpus(tmp_path / "moved", tmp_path / "out").questions) == 1, "the same documents at another place"


def test_the_earlier_corpus_stays_until_the_new_one_is_whole(pdfs, tmp_path, rendered, interrupt):
    """Of two new PDFs the first is rendered already when the second is interrupted."""
    out = tmp_path / "out"
    build_corpus(pdfs, out, max_pixels=1000)
    text_pdf(pdfs / "x.pdf", "quinces")
    text_pdf(pdfs / "y.pdf", "medlars")
    rendered.clear()
    interrupt.after = 1
    with pytest.raises(KeyboardInterrupt):
        build_corpus(pdfs, out, max_pixels=1000)
    assert load_corpus(out).documents["doc_name"].tolist() == ["Scan 1.PDF", "words.pdf"]
    interrupt.after = None
    assert build_corpus(pdfs, out, max_pixels=1000).page_text("y.pdf", 0).strip() == "medlars"
    assert rendered == [("x.pdf", 0), ("y.pdf", 0)]


def test_a_report_that_speaks_of_another_page_file_is_not_believed(pdfs, tmp_path, rendered):
    """As when a run ends between writing its corpus and its report."""
    out = tmp_path / "out"
    build_corpus(pdfs, out, max_pixels=1000)
    report = (out / "ingest_report.json").read_text()
    picture_pdf(pdfs / "Scan 1.PDF", pages=4)
    build_corpus(pdfs, out, max_pixels=1000)
    (out / "ingest_report.json").write_text(report)
    rendered.clear()
    assert build_corpus(pdfs, out, max_pixels=1000).num_pages("Scan 1.PDF") == 4
    assert len(rendered) == 6


def test_processes_end_when_the_corpus_cannot_be_written(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    (tmp_path / "in").mkdir()
    for name in "abc":
        blank_pdf(tmp_path / "in" / f"{name}.pdf", 40)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        build_corpus(tmp_path / "in", tmp_path / "out", max_pixels=1000, ocr="none", workers=2)
    assert not [child for child in psutil.Process().children() if "mmr5_lab.corpus.pdf_process" in child.cmdline()]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".parts"]


def test_a_later_run_renders_only_what_is_new_or_changed(pdfs, tmp_path, rendered):
    build_corpus(pdfs, tmp_path / "out", max_pixels=1000)
    rendered.clear()
    text_pdf(pdfs / "more.pdf", "quinces")
    picture_pdf(pdfs / "Scan 1.PDF", pages=4)
    corpus = build_corpus(pdfs, tmp_path / "out", max_pixels=1000)
    assert len(rendered) == 5
    assert [corpus.page_text(name, 0).strip() for name in ("more.pdf", "words.pdf")] == [
        "quinces",
        "apples and pears",
    ]
    report = json.loads((tmp_path / "out" / "ingest_report.json").read_text())
    assert [entry["read_by"] for entry in report["documents"]] == [["none"] * 4, ["text layer"], ["text layer"] * 2]
    rendered.clear()
    build_corpus(pdfs, tmp_path / "out", max_pixels=1100)  # another size: all again
    assert len(rendered) == 7


def test_processes_render_the_same_bytes(pdfs, tmp_path):
    one = build_corpus(pdfs, tmp_path / "one", max_pixels=1000, ocr="none")
    two = build_corpus(pdfs, tmp_path / "two", max_pixels=1000, ocr="none", workers=2)
    for name, number in (("Scan 1.PDF", 2), ("words.pdf", 1)):
        assert one.page_bytes(name, number) == two.page_bytes(name, number)
    assert (tmp_path / "one" / "ingest_report.json").read_text() == (
        tmp_path / "two" / "ingest_report.json"
    ).read_text()


RUN = """
import sys
from mmr5_lab import build_corpus
build_corpus(sys.argv[1], sys.argv[2], max_pixels=300_000, ocr="none", workers=int(sys.argv[3]))
"""


def finished(out) -> int:
    return len(list(out.glob(".parts/*/*.page")))


def started(folder, workers: int, pages: int = 10) -> subprocess.Popen:
    """A run in a process of its own that has finished some pages."""
    (folder / "run.py").write_text(RUN)
    command = [sys.executable, "run.py", "in", "out", str(workers)]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while finished(folder / "out") < pages and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def test_two_processes_do_not_make_one_corpus(pdfs, tmp_path):
    out = tmp_path / "corpus"
    other = sole_writer(out, out / ".parts" / ".lock")  # as the other process holds it
    with other, pytest.raises(RuntimeError, match=r"another process is writing .*corpus: wait"):
        build_corpus(pdfs, out)
    assert len(build_corpus(pdfs, out).documents) == 2


def test_a_killed_run_keeps_its_pages(tmp_path, rendered):
    """Killed like `kill -9` would, somewhere among 150 pages; what was there is not made again."""
    (tmp_path / "in").mkdir()
    blank_pdf(tmp_path / "in" / "long.pdf", 150)
    process = started(tmp_path, workers=1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = finished(tmp_path / "out")
    assert 10 <= before < 150
    corpus = build_corpus(tmp_path / "in", tmp_path / "out", max_pixels=300_000, ocr="none")
    assert corpus.num_pages("long.pdf") == 150
    assert len(rendered) == 150 - before


def test_a_thousand_pages_are_kept_in_small_groups(tmp_path):
    (tmp_path / "in").mkdir()
    blank_pdf(tmp_path / "in" / "long.pdf", 1000)
    corpus = build_corpus(tmp_path / "in", tmp_path / "out", max_pixels=600)
    assert corpus.num_pages("long.pdf") == 1000
    assert corpus.page_image("long.pdf", 999).size == (20, 30)
    assert pq.ParquetFile(tmp_path / "out" / PAGES).metadata.num_row_groups == 32  # of 32 pages


def test_a_page_that_cannot_be_rendered_is_kept_without_a_picture(tmp_path, caplog):
    """Of four pages one is not in the file, one measures kilometres."""
    (tmp_path / "in").mkdir()
    boxes_pdf(tmp_path / "in" / "bad.pdf", (200, 300), None, (595, 2147483648), (300, 200))
    build_corpus(tmp_path / "in", tmp_path / "out", [document("bad.pdf", question("?", [1, 3]))], max_pixels=600)
    again = build_corpus(tmp_path / "in", tmp_path / "out", max_pixels=600)  # taken over from the first
    for corpus in (load_corpus(tmp_path / "out"), again):
        assert [corpus.page_image("bad.pdf", page).size for page in range(4)] == [(20, 30), *[(595, 842)] * 2, (30, 20)]
        assert corpus.page_image("bad.pdf", 1).getextrema() == ((255, 255),) * 3  # white
        assert corpus.questions["gold_pages"].tolist() == [[1, 3]]
    assert "page 1 of 'bad.pdf' could not be rendered: a white page stands for it" in caplog.text
    [report] = json.loads((tmp_path / "out" / "ingest_report.json").read_text())["documents"]
    assert report["problems"] == {
        "1": "PDFium cannot load it: Failed to load page.",
        "2": "it cannot be rendered: it measures 595 × 2.14748e+09 points; at most 100,000 can be rendered",
    }
    assert "2 pages are not as they should be: bad.pdf page 1 (PDFium cannot load" in caplog.text


def test_a_pdf_without_a_page_that_can_be_rendered_is_skipped(pdfs, tmp_path):
    boxes_pdf(pdfs / "bad.pdf", (595, 2147483648), None)
    corpus = build_corpus(pdfs, tmp_path / "out", max_pixels=600, workers=2)
    assert corpus.documents["doc_name"].tolist() == ["Scan 1.PDF", "words.pdf"]
    [skipped] = json.loads((tmp_path / "out" / "ingest_report.json").read_text())["skipped"]
    assert skipped["file"] == "bad.pdf"
    assert skipped["reason"].startswith("no page can be rendered; page 0: it cannot be rendered: it measures 595 × 2.1")
    for name in ("Scan 1.PDF", "words.pdf"):
        (pdfs / name).unlink()
    with pytest.raises(CorpusError, match="none of the 1 PDFs"):
        build_corpus(pdfs, tmp_path / "out", max_pixels=1000)
    assert load_corpus(tmp_path / "out").num_pages("Scan 1.PDF") == 3  # no corpus took its place


def test_a_process_that_dies_is_started_again_and_nothing_lost(tmp_path):
    (tmp_path / "in").mkdir()
    blank_pdf(tmp_path / "in" / "long.pdf", 500)
    process = started(tmp_path, workers=2)
    children = psutil.Process(process.pid).children()
    next(child for child in children if "mmr5_lab.corpus.pdf_process" in child.cmdline()).kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert load_corpus(tmp_path / "out").num_pages("long.pdf") == 500


def test_reading_anew_with_an_ocr_redoes_only_documents_with_unread_pages(pdfs, tmp_path, rendered, monkeypatch):
    build_corpus(pdfs, tmp_path / "out", max_pixels=1000)
    rendered.clear()
    program(tmp_path / "bin" / "tesseract", "echo a picture of $(wc -c) bytes")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    corpus = build_corpus(pdfs, tmp_path / "out", max_pixels=1000, ocr="tesseract")
    assert rendered == [("Scan 1.PDF", page) for page in range(3)]
    assert corpus.page_text("Scan 1.PDF", 2).startswith("a picture of")
    report = json.loads((tmp_path / "out" / "ingest_report.json").read_text())
    assert [entry["read_by"] for entry in report["documents"]] == [["tesseract"] * 3, ["text layer"] * 2]


def test_an_ocr_that_is_not_there_is_refused(pdfs, tmp_path):
    with pytest.raises(CorpusError, match="unknown OCR 'eyes'"):
        build_corpus(pdfs, tmp_path / "out", ocr="eyes")


def test_pages_that_nobody_can_read_are_counted(pdfs, tmp_path, caplog):
    build_corpus(pdfs, tmp_path / "out", max_pixels=1000)
    assert "3 pages have no usable text layer, and there is no OCR to read them" in caplog.text
    caplog.clear()
    build_corpus(pdfs, tmp_path / "other", max_pixels=1000, ocr="none")  # as told: no warning
    assert "no OCR" not in caplog.text
