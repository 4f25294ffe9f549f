"""Pages of a PDF: their pictures at a pixel budget, and their words from the text layer or else by OCR.

A process that renders pages imports this module, so it loads little.
"""

import ctypes
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pypdfium2
import pypdfium2.raw as pdfium
from PIL import Image

from mmr5_lab.corpus import ocr
from mmr5_lab.corpus.ids import has_words
from mmr5_lab.corpus.page_text import HYPHEN, clean_text, count_words, is_garbage
from mmr5_lab.files import json_line, replacing

TEXT_LAYER, POOR_TEXT_LAYER = "text layer", "poor text layer"
DEFAULT_MAX_PIXELS = 1280 * 28 * 28
"""Pixel budget of a rendered page: 1,280 visual tokens of 28 × 28 pixels, Qwen2.5-VL's unit."""

_OCR_PIXELS = 2 * DEFAULT_MAX_PIXELS  # A4 at 140 dpi: small print is legible, and tesseract takes a second or two
_OCR_SCALE = 300 / 72  # pixels a point at most: more dots an inch make no letter clearer
_STRIP_ASPECT, _MOST_STRIPS = 1.5, 20  # a page longer than two of these is read in strips of about this aspect
_LONGEST_SIDE = 100_000  # points, seven times what Acrobat allows; sizes above are damage
_JPEG_QUALITY = 90
_LONGEST_PICTURE = 65_000  # pixels; JPEG ends at 65,500
_LARGE = 3 * 595 * 842  # square points: three times A4
_FEW_WORDS = 50  # of a text layer over a scan, such as a header or a library's stamp


class PdfError(ValueError):
    """A PDF or page that cannot be used; the message says why."""


# What PDFium and Pillow raise for a page that they cannot make.
_FAILURES = (PdfError, pypdfium2.PdfiumError, OSError, ValueError, ArithmeticError, MemoryError)


@dataclass(frozen=True)
class Rendering:
    """How pages become pictures and words: their pixels (width × height) at most, and the OCR engine."""

    max_pixels: int = DEFAULT_MAX_PIXELS
    engine: str = ocr.NO_ENGINE


class FinishedPage(NamedTuple):
    """What became of a page.

    text: its words, with `page_text.HYPHEN` where a word is broken at the end of a line
    read_by: "text layer", an OCR engine, "none", "… failed", or "poor text layer" where OCR was needed and not there
    picture: JPEG bytes; b"" where it cannot be rendered
    problem: why it cannot be rendered or read, or that it is too large for its picture; "" where all went well
    """

    text: str
    read_by: str
    picture: bytes = b""
    problem: str = ""


def open_pdf(path: str | Path) -> pypdfium2.PdfDocument:
    """Open a document with at least one page. Raises PdfError if it is encrypted, corrupt or empty."""
    try:
        document = pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, OSError) as error:
        cause = "encrypted" if "password" in str(error).lower() else "corrupt, or without pages?"
        raise PdfError(f"PDFium cannot read it ({cause}): {error}") from error
    if len(document) == 0:
        document.close()
        raise PdfError("it has no pages")
    document.init_forms()  # without a form environment PDFium leaves filled form fields blank
    return document


def make_page(document: pypdfium2.PdfDocument, number: int, rendering: Rendering) -> FinishedPage:
    """Render and read a page. What fails is left empty, and `problem` says why."""
    try:
        page = document[number]
    except pypdfium2.PdfiumError as error:
        return FinishedPage("", ocr.NO_ENGINE, problem=f"PDFium cannot load it: {error}")
    problems, picture = [], io.BytesIO()
    with closing(page):
        try:
            render_page(page, rendering.max_pixels).save(picture, "JPEG", quality=_JPEG_QUALITY)
            if math.prod(page.get_size()) > _LARGE:
                problems.append("it is so large that small print is lost in its picture: raise max_pixels")
        except _FAILURES as error:
            problems.append(f"it cannot be rendered: {error}")
            picture = io.BytesIO()
        try:
            text, read_by, failure = read_page(page, rendering.engine, lambda: document[number])
        except _FAILURES as error:
            text, read_by, failure = "", ocr.NO_ENGINE, f"it cannot be read: {error}"
    return FinishedPage(text, read_by, picture.getvalue(), "; ".join(filter(None, [*problems, failure])))


def render_page(page: pypdfium2.PdfPage, max_pixels: int) -> Image.Image:
    """Return a page as an RGB image in its aspect, with width × height as large as possible within `max_pixels`.

    Raises PdfError for a page without area or longer than 35 metres, which is how damaged files look.
    """
    width, height = _size(page)
    scale = min(math.sqrt(max_pixels / (width * height)), _LONGEST_PICTURE / max(width, height))
    # PDFium rounds both sides up, which can pass the budget by a row.
    while math.ceil(width * scale) * math.ceil(height * scale) > max_pixels:
        scale *= 0.999
    return page.render(scale=scale).to_pil().convert("RGB")


def _size(page: pypdfium2.PdfPage) -> tuple[float, float]:
    width, height = page.get_size()
    if not (0 < width <= _LONGEST_SIDE and 0 < height <= _LONGEST_SIDE):
        raise PdfError(f"it measures {width:g} × {height:g} points; at most {_LONGEST_SIDE:,} can be rendered")
    return width, height


def read_page(
    page: pypdfium2.PdfPage, engine: str, load_again: Callable[[], pypdfium2.PdfPage]
) -> tuple[str, str, str]:
    """Return the words of a page, who read them (`FinishedPage.read_by`), and why OCR failed or "".

    load_again: loads the same page anew, as must be done after its forms have become text
    """
    layer = text_layer(page, load_again)
    text = clean_text(layer)
    garbage = is_garbage(layer)
    if has_words(text) and not garbage and not (count_words(text) < _FEW_WORDS and _is_mostly_pictures(page)):
        return text, TEXT_LAYER, ""
    if engine == ocr.NO_ENGINE:
        return text, POOR_TEXT_LAYER if has_words(text) else engine, ""
    try:
        read = clean_text("\n".join(ocr.read_image(strip, engine) for strip in _strips(page)))
    except (*_FAILURES, ocr.OcrError) as error:
        return text, f"{engine} failed", f"{engine} failed: {error}"
    # The layer of a cover with few words over a photograph is often better than what is read in the photograph.
    if has_words(text) and not garbage and count_words(read) <= count_words(text):
        return text, TEXT_LAYER, ""
    return read, engine, ""


def text_layer(page: pypdfium2.PdfPage, load_again: Callable[[], pypdfium2.PdfPage]) -> str:
    """Return the words of a page as the PDF holds them, form values among them; "" where it holds none.

    Hyphens at line ends are `HYPHEN`; control characters are left in.
    """
    if not _has_annotations(page):
        return _page_text(page)
    # What forms and notes show becomes text of the page; hidden fields do not.
    pdfium.FPDFPage_Flatten(page, pdfium.FLAT_NORMALDISPLAY)
    with closing(load_again()) as flat:
        return _page_text(flat)


def _page_text(page: pypdfium2.PdfPage) -> str:
    with closing(page.get_textpage()) as textpage:
        # `get_text_bounded` leaves out what lies off the page, but also line breaks, which glues words together;
        # `get_text_range` has them, and leaves out characters whose font calls them U+0002.
        text, on_page = textpage.get_text_range(), textpage.get_text_bounded()
        if "".join(text.split()).replace(HYPHEN, "\x02") != "".join(on_page.split()):
            text = "".join(_characters(textpage, page.get_bbox()))
    return text.replace("\r\n", "\n")


def _characters(textpage: pypdfium2.PdfTextPage, box: tuple[float, float, float, float]) -> Iterator[str]:
    """Yield the characters within a box (left, bottom, right, top)."""
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    for index in range(textpage.count_chars()):
        code = pdfium.FPDFText_GetUnicode(textpage, index)
        if pdfium.FPDFText_IsHyphen(textpage, index) == 1:
            yield HYPHEN
        elif pdfium.FPDFText_IsGenerated(textpage, index) == 1:  # spaces and line breaks, which have no place
            yield chr(code)
        elif pdfium.FPDFText_GetCharBox(textpage, index, left, right, bottom, top):
            x, y = (left.value + right.value) / 2, (bottom.value + top.value) / 2
            if box[0] <= x <= box[2] and box[1] <= y <= box[3]:
                yield chr(code)


def _has_annotations(page: pypdfium2.PdfPage) -> bool:
    """Return whether there is an annotation other than a link."""
    for index in range(pdfium.FPDFPage_GetAnnotCount(page)):
        annotation = pdfium.FPDFPage_GetAnnot(page, index)
        kind = pdfium.FPDFAnnot_GetSubtype(annotation)
        pdfium.FPDFPage_CloseAnnot(annotation)
        if kind != pdfium.FPDF_ANNOT_LINK:
            return True
    return False


def _is_mostly_pictures(page: pypdfium2.PdfPage) -> bool:
    """Return whether pictures cover at least half of the page."""
    left, bottom, right, top = page.get_bbox()
    area = 0.0
    for picture in page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE], max_depth=3):
        x1, y1, x2, y2 = picture.get_bounds()
        area += max(0.0, min(x2, right) - max(x1, left)) * max(0.0, min(y2, top) - max(y1, bottom))
    return area >= (right - left) * (top - bottom) / 2


def _strips(page: pypdfium2.PdfPage) -> Iterator[Image.Image]:
    """Yield what OCR reads of a page: all of it, or strips of a long one, cut between its lines."""
    short, long = sorted(_size(page))
    count = min(long / (_STRIP_ASPECT * short), _MOST_STRIPS)
    if count <= 2:
        yield render_page(page, _OCR_PIXELS)
        return
    pixels = count * min(_OCR_PIXELS, _STRIP_ASPECT * (short * _OCR_SCALE) ** 2)
    picture = render_page(page, max(1, int(pixels)))
    tall = picture.height >= picture.width
    line_count = max(picture.size)
    # How light each line of pixels is: the lightest lie between lines of text.
    size = (1, line_count) if tall else (line_count, 1)
    lightness = picture.convert("L").resize(size, Image.Resampling.BOX).tobytes()
    length, start = math.ceil(line_count / count), 0
    while start < line_count:
        stop = line_count
        if line_count - start > 1.2 * length:  # no tiny strip at the end
            # Light neighbours too: the gap within a letter is a line or two.
            window = range(start + round(0.8 * length), start + length + 1)
            stop = max(window, key=lambda line: (min(lightness[line - 2 : line + 3]), line))
        yield picture.crop((0, start, picture.width, stop) if tall else (start, 0, stop, picture.height))
        start = stop


def page_path(folder: Path, page: int) -> Path:
    """Return where a finished page is: one file, as many systems take longer to make a file than to fill it."""
    return folder / f"{page:05}.page"


def write_page(folder: Path, number: int, page: FinishedPage) -> None:
    """Write a page into its file, whole or not at all: a line of JSON, then the picture."""
    with replacing(page_path(folder, number)) as new:
        new.write_bytes(json_line(page._asdict() | {"picture": None}) + page.picture)


def read_page_file(folder: Path, number: int) -> FinishedPage:
    """Return a finished page."""
    with page_path(folder, number).open("rb") as file:
        return FinishedPage(**json.loads(file.readline()) | {"picture": file.read()})
