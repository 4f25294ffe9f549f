"""Words of a page's picture, read by tesseract or RapidOCR; nothing is downloaded.

tesseract is the system's program; RapidOCR comes with its models: `pip install "mmr5-lab[ocr]"`.
"""

import importlib.util
import io
import os
import shutil
import subprocess
from functools import cache
from typing import Any

from PIL import Image

from mmr5_lab.corpus.ids import CorpusError

ENGINES = AUTO = ("tesseract", "rapidocr")  # equal recall on MMDocIR's scans, and tesseract takes a third of the time
NO_ENGINE = "none"
_SECONDS_PER_PAGE = 300


class OcrError(RuntimeError):
    """A page that the engine could not read; the message is the engine's."""


def choose_engine(ocr: str) -> str:
    """Return the engine for "tesseract", "rapidocr", "none" or "auto": the first of these that is installed.

    Raises CorpusError for another word, and for an engine that is named but not installed.
    """
    installed = {
        "rapidocr": all(importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime")),
        "tesseract": shutil.which("tesseract") is not None,
    }
    if ocr == "auto":
        return next((engine for engine in AUTO if installed[engine]), NO_ENGINE)
    if ocr != NO_ENGINE and ocr not in ENGINES:
        raise CorpusError(f"unknown OCR {ocr!r}; there is: auto, {', '.join(ENGINES)}, {NO_ENGINE}")
    if ocr != NO_ENGINE and not installed[ocr]:
        command = {"rapidocr": 'pip install "mmr5-lab[ocr]"', "tesseract": "apt-get install tesseract-ocr"}[ocr]
        raise CorpusError(f"{ocr} is not installed: {command}")
    return ocr


def read_image(image: Image.Image, engine: str) -> str:
    """Return the words that an engine of `ENGINES` finds in a picture.

    Raises OcrError where it fails or takes more than five minutes.
    """
    try:
        return _rapidocr(image) if engine == "rapidocr" else _tesseract(image)
    except (subprocess.SubprocessError, OSError, RuntimeError, ValueError) as error:
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
