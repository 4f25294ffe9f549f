"""One page of a PDF: picture, text layer, OCR."""

import subprocess

import pypdfium2
import pytest
from PIL import Image, ImageDraw, ImageFont

from mmr5_lab.corpus import ocr, pdf
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.ocr import choose_engine
from mmr5_lab.corpus.pdf import open_pdf, read_page


@pytest.fixture
def scan(tmp_path):
    """A page that is a picture of three words, and a page that is a picture of nothing."""
    written = Image.new("RGB", (600, 300), "white")
    ImageDraw.Draw(written).text((40, 100), "Revenue grew twice", "black", ImageFont.load_default(48))
    written.save(tmp_path / "scan.pdf", save_all=True, append_images=[Image.new("RGB", (600, 300), "white")])
    document = open_pdf(tmp_path / "scan.pdf")
    yield document
    document.close()


def installed(engine: str) -> bool:
    try:
        return choose_engine(engine) == engine
    except CorpusError:
        return False


@pytest.mark.parametrize("engine", ocr.ENGINES)
def test_ocr_reads_a_picture_of_words(scan, engine):
    if not installed(engine):
        pytest.skip(f"{engine} is not installed")
    text, read_by = read_page(scan[0], engine)
    assert read_by == engine
    assert text.split() == ["Revenue", "grew", "twice"]
    assert read_page(scan[1], engine) == ("", engine)  # read, and nothing found


def test_without_ocr_a_picture_has_no_words(scan):
    assert read_page(scan[0], "none") == ("", "none")


def test_an_engine_that_fails_leaves_the_page_unread(scan, monkeypatch):
    def fails(*command, **options):
        raise subprocess.TimeoutExpired("tesseract", 1)

    monkeypatch.setattr(ocr.subprocess, "run", fails)
    assert read_page(scan[0], "tesseract") == ("", "tesseract failed")


def test_auto_takes_what_is_there(monkeypatch):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ocr.shutil, "which", lambda name: "/usr/bin/tesseract")
    assert choose_engine("auto") == "tesseract"
    monkeypatch.setattr(ocr.shutil, "which", lambda name: None)
    assert choose_engine("auto") == "rapidocr"
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=r'rapidocr is not installed: pip install "mmr5-lab\[ocr\]"'):
        choose_engine("rapidocr")
    assert choose_engine("auto") == "none"
    with pytest.raises(CorpusError, match="tesseract is not installed: apt-get install tesseract-ocr"):
        choose_engine("tesseract")
    with pytest.raises(CorpusError, match="unknown OCR 'eyes'; there is: auto, tesseract, rapidocr, none"):
        choose_engine("eyes")


def test_rotated_pages_and_forms_are_rendered_as_they_are_seen(tmp_path):
    with pypdfium2.PdfDocument.new() as new:
        new.new_page(200, 100).set_rotation(90)
        new.save(tmp_path / "turned.pdf")
    document = open_pdf(tmp_path / "turned.pdf")
    assert pdf.render_page(document[0], 20_000).size == (100, 200)
    document.close()
