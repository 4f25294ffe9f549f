"""Words of a page's picture, read by tesseract or RapidOCR; nothing is downloaded.

tesseract is the system's program; RapidOCR comes with its models: `pip install "mmr5-lab[ocr]"`.
"""

import importlib.util
import io
import logging
import os
import shutil
import subprocess
from functools import cache
from typing import Any

from PIL import Image

from mmr5_lab.corpus.ids import CorpusError

logger = logging.getLogger(__name__)

ENGINES = ("tesseract", "rapidocr")
AUTO = ENGINES  # in this order: equal recall on MMDocIR's scans, and tesseract takes a third of the time
NO_ENGINE = "none"
_SECONDS_PER_PAGE = 300


class OcrError(RuntimeError):
    """A page that the engine could not read; the message is the engine's own."""


def choose_engine(ocr: str) -> str:
    """Return the engine for "tesseract", "rapidocr", "none" or "auto": the first of these that works.

    Raises CorpusError for another word, and for an engine that is named but does not work.
    """
    if ocr not in ("auto", NO_ENGINE, *ENGINES):
        raise CorpusError(f"unknown OCR {ocr!r}; there is: auto, {', '.join(ENGINES)}, {NO_ENGINE}")
    for engine in AUTO if ocr == "auto" else (ocr,):
        problem = "" if engine == NO_ENGINE else _problem(engine)
        if not problem:
            return engine
        if ocr != "auto":
            raise CorpusError(problem)
        if "is not installed" not in problem:
            logger.warning("%s", problem)
    return NO_ENGINE


def _problem(engine: str) -> str:
    """Return why an engine does not work, or ""."""
    if engine == "rapidocr":
        missing = any(importlib.util.find_spec(name) is None for name in ("rapidocr", "onnxruntime"))
        return 'rapidocr is not installed: pip install "mmr5-lab[ocr]"' if missing else ""
    if shutil.which("tesseract") is None:
        return "tesseract is not installed: apt-get install tesseract-ocr"
    try:
        read_image(Image.new("L", (64, 64), "white"), engine)  # without language data, only the first page would tell
    except OcrError as error:
        return f"tesseract does not work: {error}"
    return ""


def read_image(image: Image.Image, engine: str) -> str:
    """Return the words that an engine of `ENGINES` finds in a picture.

    Raises OcrError where it fails or takes more than five minutes.
    """
    try:
        return _rapidocr(image) if engine == "rapidocr" else _tesseract(image)
    except subprocess.CalledProcessError as error:
        words = " ".join(error.stderr.decode("utf-8", errors="replace").split())
        raise OcrError(words or f"exit code {error.returncode}") from error
    except Exception as error:  # onnxruntime has exceptions of its own, which derive from nothing else
        raise OcrError(str(error)) from error


def _tesseract(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    done = subprocess.run(
        ["tesseract", "stdin", "stdout"],
        input=buffer.getvalue(),
        capture_output=True,
        check=True,
        timeout=_SECONDS_PER_PAGE,
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

    result = _rapidocr_engine()(np.asarray(image)[:, :, ::-1])  # it takes BGR
    return "\n".join(result.txts or ())
