"""Pages of a PDF: their pictures at a pixel budget, and their words from the text layer or else by OCR.

A process that renders pages imports this module, so it loads little.
"""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pypdfium2
from PIL import Image

from mmr5_lab.corpus import ocr
from mmr5_lab.corpus.ids import has_words

TEXT_LAYER = "text layer"
DEFAULT_MAX_PIXELS = 1280 * 28 * 28
"""Pixel budget of a rendered page: 1,280 visual tokens of 28 × 28 pixels, Qwen2.5-VL's unit."""

_OCR_PIXELS = 2 * DEFAULT_MAX_PIXELS  # A4 at 140 dpi: small print is legible, and tesseract takes a second or two


class PdfError(ValueError):
    """A PDF or page that cannot be used; the message says why."""


@dataclass(frozen=True)
class Rendering:
    """How pages become pictures and words: their pixels (width × height) at most, JPEG quality, and OCR engine."""

    max_pixels: int = DEFAULT_MAX_PIXELS
    jpeg_quality: int = 90
    engine: str = ocr.NO_ENGINE


def open_pdf(path: str | Path) -> pypdfium2.PdfDocument:
    """Open a document with at least one page. Raises PdfError if it is encrypted, corrupt or empty."""
    try:
        document = pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, OSError) as error:
        encrypted = "password" in str(error).lower()
        raise PdfError(
            f"it is encrypted and needs a password: {error}"
            if encrypted
            else f"PDFium cannot read it (corrupt, or without pages?): {error}"
        ) from error
    if len(document) == 0:
        document.close()
        raise PdfError("it has no pages")
    document.init_forms()  # without a form environment PDFium leaves filled form fields blank
    return document


def render_page(page: pypdfium2.PdfPage, max_pixels: int) -> Image.Image:
    """Return a page as an RGB image in its aspect, with width × height as large as possible within `max_pixels`."""
    width, height = page.get_size()
    scale = math.sqrt(max_pixels / (width * height))
    # PDFium rounds both sides up, which can pass the budget by a row.
    while math.ceil(width * scale) * math.ceil(height * scale) > max_pixels:
        scale *= 0.999
    return page.render(scale=scale).to_pil().convert("RGB")


def text_layer(page: pypdfium2.PdfPage) -> str:
    """Return the words of a page as the PDF holds them; "" where it holds none."""
    textpage = page.get_textpage()
    try:
        return textpage.get_text_bounded().replace("\r\n", "\n").replace("\x00", "")
    finally:
        textpage.close()


def read_page(page: pypdfium2.PdfPage, engine: str) -> tuple[str, str]:
    """Return the words of a page and who read them: "text layer", the OCR engine, or "none".

    A page that the engine cannot read has no words, and "… failed" as its reader.
    """
    text = text_layer(page)
    if has_words(text):
        return text, TEXT_LAYER
    if engine == ocr.NO_ENGINE:
        return "", engine
    try:
        return ocr.read_image(render_page(page, _OCR_PIXELS), engine), engine
    except ocr.OcrError:
        return "", f"{engine} failed"


def page_path(folder: Path, page: int) -> Path:
    """Return where a finished page is: one file, as many systems take longer to make a file than to fill it."""
    return folder / f"{page:05}.page"


def write_page(document: pypdfium2.PdfDocument, number: int, folder: Path, rendering: Rendering) -> None:
    """Write a page's picture and words into its `page_path`. Raises PdfError, naming it, if it cannot be rendered."""
    try:
        page = document[number]
        picture = io.BytesIO()
        render_page(page, rendering.max_pixels).save(picture, "JPEG", quality=rendering.jpeg_quality)
        text, read_by = read_page(page, rendering.engine)
        page.close()
    except (pypdfium2.PdfiumError, ValueError, ZeroDivisionError, MemoryError) as error:
        raise PdfError(f"PDFium cannot render page {number}: {error}") from error
    head = json.dumps({"text": text, "read_by": read_by}) + "\n"
    path = page_path(folder, number)
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(head.encode() + picture.getvalue())
    unfinished.replace(path)


def read_page_file(folder: Path, page: int) -> tuple[bytes, str, str]:
    """Return a finished page's JPEG bytes, its words, and who read them."""
    head, _, picture = page_path(folder, page).read_bytes().partition(b"\n")
    words = json.loads(head)
    return picture, words["text"], words["read_by"]
