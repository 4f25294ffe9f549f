"""The one place where a page image is opened.

Reranking, training, servers, encoders, OCR and thumbnails all see a page as `open_page` returns it: upright, in RGB on
white paper, 8 bits a channel. `plain_file` is the same page as a file, for programs that open it themselves.
"""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mmr5_lab.html import visible

MAX_PIXELS = 178_956_970  # where Pillow, too, refuses to decode
MAX_SIDE = 65_500  # the longest side of a JPEG
_TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
_UPRIGHT = {k: Image.Transpose[turn] for k, turn in enumerate(_TURNS, 2)}  # EXIF orientation -> what undoes it
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")

# a path or file:// URL, an image file's bytes, an open file, the datasets library's {"path", "bytes"}, an image
Page = str | Path | bytes | BinaryIO | Mapping[str, Any] | Image.Image | np.ndarray


def open_page(source: Page, where: str = "", size: tuple[int, int] | None = None) -> Image.Image:
    """Return a page as a decoded RGB image, as it looks on white paper with its EXIF orientation applied.

    source: path (`~` is the home folder), file:// URL, bytes or open file of an image; a dict with "bytes" or "path";
        a PIL image; an array of shape (height, width) or (height, width, channels). 16-bit and float values are scaled
        to 8 bits. Of several pages, the first is taken.
    where: what error messages call the page; by default its path or kind
    size: (width, height) in pixels that are enough; a larger JPEG is then decoded at a fraction of its size

    Raises ValueError, naming the page, where it cannot be read or decoded or is larger than `MAX_PIXELS` or `MAX_SIDE`.
    """
    name = _name(source, where)
    if isinstance(source, np.ndarray | Image.Image):
        image = _bounded(_from_array(source, name) if isinstance(source, np.ndarray) else source, name)
    else:
        image = _opened(read_bytes(source, where), name)
    try:
        if size is not None and image is not source:
            image.draft("RGB", size[::-1] if _orientation(image) > 4 else size)  # above 4 it lies on its side
        return _upright_rgb(image)
    except Exception as error:  # Pillow raises what a bad file provokes: struct.error, IndexError, zlib.error, …
        raise ValueError(f"{name} is truncated or corrupt: {error}") from error


def page_size(source: Page, where: str = "") -> tuple[int, int]:
    """Return (width, height) of a page as `open_page` would show it, from the head of its file (a PNG's EXIF
    stands behind its pixels, so a PNG is decoded).

    Raises ValueError like `open_page`.
    """
    if isinstance(source, np.ndarray):
        return open_page(source, where).size
    image = source if isinstance(source, Image.Image) else _opened(read_bytes(source, where), _name(source, where))
    # Above 4 it lies on its side; of a TIFF Pillow gives the turned size at once.
    return image.size[::-1] if image.format != "TIFF" and _orientation(image) > 4 else image.size


def plain_file(source: Page, where: str = "") -> tuple[bytes, str]:
    """Return a page as the bytes of an image file that any program shows alike, and its kind: "jpeg" or "png".

    A JPEG or PNG that is upright, opaque and of 8 bits stays as it is, but for a PNG's texts and colour profile, and is
    not decoded; anything else becomes a PNG of what `open_page` returns. Raises ValueError like `open_page`.
    """
    if not isinstance(source, Image.Image | np.ndarray):
        data = _without_notes(read_bytes(source, where))
        image = _opened(data, _name(source, where))
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _orientation(image) == 1:
            return data, "jpeg"
        opaque = image.mode in ("1", "L", "P", "RGB") and "transparency" not in image.info
        if image.format == "PNG" and opaque and b"eXIf" not in data:  # to ask Pillow for EXIF would decode it
            return data, "png"
    buffer = io.BytesIO()
    open_page(source, where).save(buffer, "PNG")
    return buffer.getvalue(), "png"


def read_bytes(source: Any, where: str = "") -> bytes:
    """Return the bytes of a page that is a file. Raises ValueError, naming it, where there are none."""
    name, data = _name(source, where), source
    if isinstance(data, Mapping):
        data = data.get("bytes") or data.get("path") or b""
    try:
        if isinstance(data, str | Path):
            data = Path(_path(data)).read_bytes()
        elif hasattr(data, "read"):
            if data.seekable():
                data.seek(0)  # whoever wrote or looked at it may have left it at its end
            data = data.read()
        elif isinstance(data, bytearray | memoryview):
            data = bytes(data)
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a name that no file can have, a closed file
        raise ValueError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(data, bytes):
        raise ValueError(f"{name} is a {type(data).__name__}; expected a path, image bytes, a PIL image or an array")
    if not data:
        raise ValueError(f"{name} is empty (0 bytes)")
    return data


def _name(source: Any, where: str) -> str:
    """What to call a page in a message: `where`, with its path if it has one, or what it is."""
    path = source.get("path") if isinstance(source, Mapping) else source
    if isinstance(path, str | Path):
        shown = f"{visible(str(path)):.200}"
        return f"{where}, {shown}," if where else shown
    return where or f"the page (given as {type(source).__name__})"


def _path(source: str | Path) -> str:
    text = str(source)
    if isinstance(source, str) and ("://" in text or text.startswith("data:")):
        parts = urlsplit(text)
        if parts.scheme != "file":
            raise ValueError(f"it is a {parts.scheme} address; save the image as a file and pass its path")
        return unquote(parts.path)
    return os.path.expanduser(text)  # unlike Path.expanduser, it leaves alone what is no user's name


def _opened(data: bytes, name: str) -> Image.Image:
    """The image in a file's bytes, its head read."""
    try:
        image = Image.open(io.BytesIO(_without_notes(data)))
    except UnidentifiedImageError as error:  # whose own words name an object in memory
        why = f"its {len(data)} bytes are of no known format (they begin with {data[:12]!r})"
        raise ValueError(f"{name} is not a readable image: {why}") from error
    except Exception as error:
        raise ValueError(f"{name} is not a readable image: {error}") from error
    if image.format == "EPS":  # Pillow would hand it to Ghostscript, which runs it as a program
        raise ValueError(f"{name} is an EPS file, which is not opened: convert it to PNG")
    return _bounded(image, name)


def _bounded(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if not (width and height):
        raise ValueError(f"{name} has no pixels ({width} × {height})")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{name} is too large ({width} × {height} pixels): shrink it to {MAX_PIXELS:,} and {MAX_SIDE:,} a side"
        )
    return image


def _without_notes(data: bytes) -> bytes:
    """A PNG without its texts and colour profile: Pillow refuses a picture for more than 1 MB of them."""
    if not data.startswith(_PNG):
        return data
    kept, end, start = [], 0, len(_PNG)  # end: everything before it is copied or dropped
    while start < len(data):
        size = 12 + int.from_bytes(data[start : start + 4], "big")  # length, kind, content, checksum
        if data[start + 4 : start + 8] in _PNG_NOTES:
            kept.append(data[end:start])
            end = start + size
        start += size
    return b"".join([*kept, data[end:]]) if kept else data


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF must not cost a page whose pixels are sound
        return 1


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()  # before its orientation is asked for: Pillow turns TIFFs by itself when it loads them
    orientation = _orientation(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":  # premultiplied grey, which Pillow turns into nothing else
            image = image.convert("LA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    image = image.convert("RGB")  # a new image, also of an RGB one
    image.info = {}  # without the EXIF, so that nobody turns it a second time
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale values to 8 bits. White is 1, 255 or 65,535, the smallest that covers all values; else the maximum."""
    values = np.nan_to_num(values.astype(np.float64))
    most = values.max(initial=0)
    white = next((top for top in (1, 255, 65535) if most <= top), most)
    return np.round(np.clip(values / white, 0, 1) * 255).astype(np.uint8)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype.kind not in "buif" or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        expected = "expected numbers of shape (height, width) or (height, width, 3 or 4)"
        raise ValueError(f"{name} is an array of {array.dtype} of shape {array.shape}; {expected}")
    if array.dtype != np.uint8:
        array = _eight_bits(array)
    return Image.fromarray(np.ascontiguousarray(array))
