"""One page of a PDF: picture, text layer, OCR."""

import subprocess

import pypdfium2
import pytest
from PIL import Image, ImageDraw, ImageFont

from mmr5_lab.corpus import pdf
from mmr5_lab.corpus.pdf import PdfError, choose_ocr, open_pdf, read_page


@pytest.fixture
def scan(tmp_path):
    """A page that is a picture of three words, and a page that is a picture of nothing."""
    written = Image.new("RGB", (600, 300), "white")
    ImageDraw.Draw(written).text((40, 100), "Revenue grew twice", "black", ImageFont.load_default(48))
    written.save(tmp_path / "scan.pdf", save_all=True, append_images=[Image.new("RGB", (600, 300), "white")])
    document = open_pdf(tmp_path / "scan.pdf")
    yield document
    document.close()


def installed(reader: str) -> bool:
    try:
        return choose_ocr(reader) == reader
    except PdfError:
        return False


@pytest.mark.parametrize("reader", pdf.READERS)
def test_ocr_reads_a_picture_of_words(scan, reader):
    if not installed(reader):
        pytest.skip(f"{reader} is not installed")
    text, read_by = read_page(scan[0], reader)
    assert read_by == reader
    assert text.split() == ["Revenue", "grew", "twice"]
    assert read_page(scan[1], reader) == ("", reader)  # read, and nothing found


def test_without_ocr_a_picture_has_no_words(scan):
    assert read_page(scan[0], "none") == ("", "none")


def test_a_reader_that_fails_leaves_the_page_unread(scan, monkeypatch):
    def fails(*command, **options):
        raise subprocess.TimeoutExpired("tesseract", 1)

    monkeypatch.setattr(pdf.subprocess, "run", fails)
    assert read_page(scan[0], "tesseract") == ("", "tesseract failed")


def test_auto_takes_what_is_there(monkeypatch):
    monkeypatch.setattr(pdf.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(pdf.shutil, "which", lambda name: "/usr/bin/tesseract")
    assert choose_ocr("auto") == "tesseract"
    monkeypatch.setattr(pdf.shutil, "which", lambda name: None)
    assert choose_ocr("auto") == "rapidocr"
    monkeypatch.setattr(pdf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PdfError, match=r'rapidocr is not installed: pip install "mmr5-lab\[ocr\]"'):
        choose_ocr("rapidocr")
    assert choose_ocr("auto") == "none"
    with pytest.raises(PdfError, match="tesseract is not installed: apt-get install tesseract-ocr"):
        choose_ocr("tesseract")
    with pytest.raises(PdfError, match="unknown OCR 'eyes'; there is: auto, tesseract, rapidocr, none"):
        choose_ocr("eyes")


def test_rotated_pages_and_forms_are_rendered_as_they_are_seen(tmp_path):
    with pypdfium2.PdfDocument.new() as new:
        new.new_page(200, 100).set_rotation(90)
        new.save(tmp_path / "turned.pdf")
    document = open_pdf(tmp_path / "turned.pdf")
    assert pdf.render_page(document[0], 20_000).size == (100, 200)
    document.close()
