"""Candidate pages (paths, bytes, images, texts): known by their content, checked and decoded once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmr5_lab.images import Page, open_page, read_bytes


@dataclass(frozen=True)
class TextPage:
    """A page that is shown by its text, alone or with its image."""

    text: str
    image: Page | None = None


Pair = tuple[str, Sequence[Page | TextPage]]
KEPT_DECODED = 256 << 20  # bytes of pages that stay decoded during a call; what is beyond is decoded again
KNOWN = 100_000  # sizes remembered from call to call

Sizes = dict[bytes, tuple[int, int]]  # of pages that could be decoded, by their key: (height, width)


class Pages:
    """The pages of some pairs. Equal pages have one key, whatever objects they are.

    Every page that is not in `sizes` is decoded at once, so that a bad one is named before any work is done, and its
    size is added. Raises ValueError, naming pair and page, for a page that cannot be decoded and for a pair
    without pages.
    """

    def __init__(self, pairs: Sequence[Pair], sizes: Sizes | None = None):
        self.sizes: Sizes = {} if sizes is None else sizes
        if len(self.sizes) > KNOWN:
            self.sizes.clear()
        self._sources: dict[bytes, tuple[Page, str]] = {}  # of each page, and what messages call it
        self.texts: dict[bytes, str] = {}  # of pages that are shown by it; those without an image have no size
        self._decoded: dict[bytes, Image.Image] = {}
        self._room = KEPT_DECODED
        key_of: dict[Any, bytes] = {}  # a page that several pairs hold is read once
        self.keys: list[list[bytes]] = []  # of each pair's pages
        for i, (query, pages) in enumerate(pairs):
            if isinstance(pages, str | Path | bytes | Image.Image | np.ndarray | TextPage):
                raise ValueError(
                    f"{name_pair(i, query)}: the pages are a single {type(pages).__name__}; expected a list of pages"
                )
            if not pages:
                raise ValueError(f"{name_pair(i, query)}: there are no pages to rank")
            self.keys.append([])
            for k, page in enumerate(pages):
                name = page if isinstance(page, str | Path | bytes) else id(page)
                if name not in key_of:
                    key_of[name] = self._add(page, f"{name_pair(i, query)}, page {k}")
                self.keys[-1].append(key_of[name])

    def image(self, key: bytes) -> Image.Image:
        """Return a page, decoded (`open_page`)."""
        return self._decoded[key] if key in self._decoded else open_page(*self._sources[key])

    def images(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return those of the keys whose pages are shown as images."""
        return [key for key in keys if key in self.sizes]

    def shown(self, keys: Sequence[bytes]) -> list[tuple[str, bool]] | None:
        """Return text and presence of an image of each page, as `build_messages` takes them; None: images alone."""
        if self.texts.keys().isdisjoint(keys):
            return None
        return [(self.texts.get(key, ""), key in self.sizes) for key in keys]

    def source(self, key: bytes) -> Page:
        """Return a page in the form in which the caller passed it."""
        return self._sources[key][0]

    def _add(self, page: Page | TextPage, where: str) -> bytes:
        if isinstance(page, TextPage):
            inner = self._add(page.image, where) if page.image is not None else b""
            key = hashlib.sha256(inner + page.text.encode()).digest()
            self.texts[key] = page.text
            if inner:
                self._sources[key], self.sizes[key] = self._sources[inner], self.sizes[inner]
            return key
        image = None
        if isinstance(page, Image.Image | np.ndarray):  # known by its pixels: two may share a file, or have none
            image = open_page(page, where)
            key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        else:
            data = read_bytes(page, where)
            key = hashlib.sha256(data).digest()
            page = page if isinstance(page, str | Path) else data  # an open file may be read only once
        self._sources.setdefault(key, (page, where))
        if image is None and key not in self.sizes:
            image = open_page(page, where)
        if image is not None:
            self.sizes[key] = (image.height, image.width)
            size = 3 * image.width * image.height
            if key not in self._decoded and size <= self._room:
                self._decoded[key] = image
                self._room -= size
        return key


def name_pair(index: int, query: str) -> str:
    return f"pair {index} ({query!r:.60})"
