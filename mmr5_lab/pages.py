"""Candidate pages as they are given (paths, bytes, images): known by their content, checked and decoded once."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mmr5_lab.corpus import as_rgb
from mmr5_lab.typeset import visible

Page = str | Path | bytes | Image.Image
Pair = tuple[str, Sequence[Page]]
KEPT_DECODED = 256 << 20  # bytes of pages that stay decoded during a call; what is beyond is decoded again
KNOWN = 100_000  # sizes remembered from call to call

Sizes = dict[bytes, tuple[int, int]]  # of pages that were found good, by their key: (height, width)


class Pages:
    """The pages of some pairs. Equal pages have one key, whatever objects they are.

    Every page that is not among `sizes` is decoded now, so that a bad one is named before any work is done, and its
    size is noted there. Raises ValueError, naming pair and page, for a page that cannot be decoded and for a pair
    without pages.
    """

    def __init__(self, pairs: Sequence[Pair], sizes: Sizes | None = None):
        self.sizes: Sizes = {} if sizes is None else sizes
        if len(self.sizes) > KNOWN:
            self.sizes.clear()
        self._given: dict[bytes, tuple[Page, str]] = {}  # where to decode a page from, and what to call it
        self._decoded: dict[bytes, Image.Image] = {}
        self._room = KEPT_DECODED
        by_object: dict[Any, bytes] = {}
        self.keys: list[list[bytes]] = []  # of each pair's pages
        for i, (query, pages) in enumerate(pairs):
            if not pages:
                raise ValueError(f"{name_pair(i, query)}: there are no pages to rank")
            self.keys.append([])
            for k, page in enumerate(pages):
                known = page if isinstance(page, str | Path | bytes) else id(page)
                if known not in by_object:
                    by_object[known] = self._see(page, f"{name_pair(i, query)}, page {k}")
                self.keys[-1].append(by_object[known])

    def image(self, key: bytes) -> Image.Image:
        """A page, decoded, in RGB."""
        return self._decoded[key] if key in self._decoded else decoded(*self._given[key])

    def source(self, key: bytes) -> Page:
        """A page as it was given."""
        return self._given[key][0]

    def _see(self, page: Page, where: str) -> bytes:
        if isinstance(page, Image.Image):  # images are known by their pixels: two of them may share a file or none
            image = decoded(page, where)
            key = _digest(repr(image.size).encode(), image.tobytes())
        else:
            data = read_page(page, where)
            key, image = _digest(data), None
        self._given.setdefault(key, (page, where))
        if key in self.sizes and image is None:
            return key
        if image is None:
            image = decoded(page, where)
        self.sizes[key] = (image.height, image.width)
        if key not in self._decoded and _bytes(image) <= self._room:
            self._decoded[key] = image
            self._room -= _bytes(image)
        return key


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


def open_page(page: Page, where: str) -> Image.Image:
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


def decoded(page: Page, where: str) -> Image.Image:
    """The page decoded, in RGB. Raises ValueError, naming it, where it cannot be."""
    image = open_page(page, where)
    if not (image.width and image.height):
        raise ValueError(f"{where} has no pixels ({image.width} × {image.height})")
    try:
        return as_rgb(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{where} is truncated or corrupt: {error}") from error


def name_pair(index: int, query: str) -> str:
    return f"pair {index} ({query!r:.60})"


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _bytes(image: Image.Image) -> int:
    return 3 * image.width * image.height
