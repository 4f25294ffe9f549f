"""The one place where a page image is opened: from a path, bytes or an image to upright RGB, checked and named."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmr5_lab.html import visible


def as_rgb(image: Image.Image) -> Image.Image:
    """An image as it would look on white paper: transparency over white, 16 bits and floats scaled to 8."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if values.max(initial=0) > 255 else 255 if values.max(initial=0) > 1 else 1
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


Page = str | Path | bytes | Image.Image


def read_page(page: Page, where: str) -> bytes:
    """The bytes of a page that is a path or bytes. Raises ValueError, naming it, where there are none."""
    if isinstance(page, str | Path):
        where = f"{where}, {visible(str(page)):.200},"
        try:
            page = Path(page).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{where} does not exist") from None
        except (OSError, ValueError) as error:  # a folder, no permission, a name that no file can have
            raise ValueError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(page, bytes):
        raise ValueError(f"{where} is a {type(page).__name__}; expected a path, image bytes or a PIL image")
    if not page:
        raise ValueError(f"{where} is empty (0 bytes)")
    return page


def _opened(page: Page, where: str) -> Image.Image:
    """The page as an image, not decoded yet. Raises ValueError, naming it, where it is not one."""
    if isinstance(page, Image.Image):
        return page
    data = read_page(page, where)
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # whose own words name an object in memory
        raise ValueError(f"{where} is not a readable image: its {len(data)} bytes are of no known format") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} is not a readable image: {error}") from error


def open_page(page: Page, where: str) -> Image.Image:
    """The page open_page, in RGB. Raises ValueError, naming it, where it cannot be."""
    image = _opened(page, where)
    if not (image.width and image.height):
        raise ValueError(f"{where} has no pixels ({image.width} × {image.height})")
    try:
        return as_rgb(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{where} is truncated or corrupt: {error}") from error
