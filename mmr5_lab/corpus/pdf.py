"""Pages of a PDF: their pictures at a pixel budget, and their words from the text layer or else by OCR.

Every rendering process imports this module, so it loads little. OCR is tesseract, where that is installed, or
RapidOCR (`pip install "mmr5-lab[ocr]"`, its models come with it); nothing is downloaded.
"""

import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pypdfium2
from PIL import Image

TEXT_LAYER, NO_READER = "text layer", "none"
READERS = ("tesseract", "rapidocr")  # equal recall on MMDocIR's scans, and tesseract takes a third of the time
DEFAULT_MAX_PIXELS = 1280 * 28 * 28
"""Pixel budget of a rendered page: 1,280 visual tokens of 28 × 28 pixels, Qwen2.5-VL's unit."""

_OCR_PIXELS = 2 * DEFAULT_MAX_PIXELS  # A4 at 140 dpi: small print is legible, and tesseract takes a second or two
_OCR_SECONDS = 300  # a page that takes longer is left unread


class PdfError(ValueError):
    """A PDF or page that cannot be used; the message says why."""


def choose_ocr(ocr: str) -> str:
    """Who is to read, for one of "rapidocr", "tesseract", "none" or "auto": the first of these that is installed.

    Raises PdfError for another word, and for a reader that is named but not installed.
    """
    there = {
        "rapidocr": importlib.util.find_spec("rapidocr") is not None
        and importlib.util.find_spec("onnxruntime") is not None,
        "tesseract": shutil.which("tesseract") is not None,
    }
    if ocr == "auto":
        return next((reader for reader in READERS if there[reader]), NO_READER)
    if ocr != NO_READER and ocr not in READERS:
        raise PdfError(f"unknown OCR {ocr!r}; there is: auto, {', '.join(READERS)}, {NO_READER}")
    if ocr != NO_READER and not there[ocr]:
        how = {"rapidocr": 'pip install "mmr5-lab[ocr]"', "tesseract": "apt-get install tesseract-ocr"}[ocr]
        raise PdfError(f"{ocr} is not installed: {how}")
    return ocr


def open_pdf(path: Path) -> pypdfium2.PdfDocument:
    """An open document with at least one page. Raises PdfError if it is encrypted, corrupt or empty."""
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
    # Without a form environment PDFium leaves filled form fields blank.
    document.init_forms()
    return document


def render_page(page: pypdfium2.PdfPage, max_pixels: int) -> Image.Image:
    """A page as an RGB image, width × height as large as possible within `max_pixels`, in the page's aspect."""
    width, height = page.get_size()
    scale = math.sqrt(max_pixels / (width * height))
    # PDFium rounds both sides up, which can pass the budget by a row.
    while math.ceil(width * scale) * math.ceil(height * scale) > max_pixels:
        scale *= 0.999
    return page.render(scale=scale).to_pil().convert("RGB")


def text_layer(page: pypdfium2.PdfPage) -> str:
    """The words of a page as the PDF holds them; "" where it holds none."""
    textpage = page.get_textpage()
    try:
        return textpage.get_text_bounded().replace("\r\n", "\n").replace("\x00", "")
    finally:
        textpage.close()


def has_words(text: str) -> bool:
    """Is there a letter or digit?"""
    return re.search(r"\w", text) is not None


def read_page(page: pypdfium2.PdfPage, ocr: str) -> tuple[str, str]:
    """The words of a page, and who read them: "text layer", the OCR (one of `READERS`), or "none".

    A page that OCR cannot read (it fails, or takes more than five minutes) has no words and says "… failed".
    """
    text = text_layer(page)
    if has_words(text):
        return text, TEXT_LAYER
    if ocr == NO_READER:
        return "", NO_READER
    image = render_page(page, _OCR_PIXELS)
    try:
        return _rapidocr(image) if ocr == "rapidocr" else _tesseract(image), ocr
    except (subprocess.SubprocessError, OSError, RuntimeError, ValueError):
        return "", f"{ocr} failed"


def _tesseract(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    done = subprocess.run(
        ["tesseract", "stdin", "stdout"],
        input=buffer.getvalue(),
        capture_output=True,
        check=True,
        timeout=_OCR_SECONDS,
        env=os.environ | {"OMP_THREAD_LIMIT": "1"},  # pages are read in parallel; four threads a page are slower
    )
    return done.stdout.decode("utf-8", errors="replace").replace("\x0c", "").strip()


@cache
def _rapidocr_engine() -> Any:
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    return RapidOCR(params={"Global.log_level": "critical", **threads})


def _rapidocr(image: Image.Image) -> str:
    import numpy as np

    found = _rapidocr_engine()(np.asarray(image)[:, :, ::-1])  # it takes BGR
    return "\n".join(found.txts or ())


@dataclass(frozen=True)
class Rendering:
    """Pages of one PDF to be written into a folder."""

    pdf: Path
    folder: Path
    pages: range
    max_pixels: int
    jpeg_quality: int
    ocr: str


def page_file(folder: Path, number: int) -> Path:
    """Where a finished page is: one file, as many systems take longer to make a file than to fill it."""
    return folder / f"{number:05}.page"


def finished_page(folder: Path, number: int) -> tuple[bytes, str, str]:
    """A finished page's JPEG bytes, its words, and who read them."""
    line, _, picture = page_file(folder, number).read_bytes().partition(b"\n")
    words = json.loads(line)
    return picture, words["text"], words["read_by"]


def write_pages(job: Rendering) -> Iterator[int]:
    """Render and read the pages that are not in the folder yet; the number of each page when it is there.

    Raises PdfError, naming the page, if one cannot be rendered; those before it are kept.
    """
    document = open_pdf(job.pdf)
    try:
        for number in job.pages:
            if not page_file(job.folder, number).exists():
                _write_page(document, number, job)
            yield number
    finally:
        document.close()


def _write_page(document: pypdfium2.PdfDocument, number: int, job: Rendering) -> None:
    try:
        page = document[number]
        buffer = io.BytesIO()
        render_page(page, job.max_pixels).save(buffer, "JPEG", quality=job.jpeg_quality)
        text, read_by = read_page(page, job.ocr)
        page.close()
    except (pypdfium2.PdfiumError, ValueError, ZeroDivisionError, MemoryError) as error:
        raise PdfError(f"PDFium cannot render page {number}: {error}") from error
    line = json.dumps({"text": text, "read_by": read_by}) + "\n"
    path = page_file(job.folder, number)
    new = path.with_suffix(".new")
    new.write_bytes(line.encode() + buffer.getvalue())
    new.replace(path)


def serve() -> None:
    """Do the jobs that come on standard input, a JSON line each: a line "page" as each page is there, and at the job's
    end one with the reason why it failed, in JSON, or null.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    for line in sys.stdin:
        given: dict[str, Any] = json.loads(line)
        given |= {"pdf": Path(given["pdf"]), "folder": Path(given["folder"]), "pages": range(*given["pages"])}
        failure = None
        try:
            for _ in write_pages(Rendering(**given)):
                print("page", file=answers, flush=True)
        except PdfError as error:
            failure = str(error)
        print(json.dumps(failure), file=answers, flush=True)


def as_line(job: Rendering) -> str:
    """A job as `serve` takes it."""
    given = vars(job) | {"pdf": str(job.pdf.absolute()), "folder": str(job.folder.absolute())}
    return json.dumps(given | {"pages": [job.pages.start, job.pages.stop]}) + "\n"


if __name__ == "__main__":
    serve()
