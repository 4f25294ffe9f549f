"""Page images small enough to put many of them into one HTML page."""

import io
from collections.abc import Callable
from functools import lru_cache

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError, parse_page_id
from mmr5_lab.html import data_url

SIZE = (340, 440)  # pixels at most
KEPT = 1000  # thumbnails that stay in memory: 60 MB of pages that are full of text


def thumbnail_url(corpus: Corpus, doc_name: str, page: int, size: tuple[int, int] = SIZE) -> str:
    """Return a page as a data URL of a JPEG of at most `size` (width, height) pixels.

    Raises CorpusError, naming document and page, where there is no such page or its image cannot be decoded.
    """
    image = corpus.page_image(doc_name, page, size)
    image.thumbnail(size)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return data_url(file.getvalue(), "jpeg")


def thumbnails(corpus: Corpus, size: tuple[int, int] = SIZE) -> Callable[[str], str]:
    """Return a function from a page's id to its `thumbnail_url`, or to "" where it cannot be shown; it keeps `KEPT`."""

    @lru_cache(KEPT)
    def url(page: str) -> str:
        try:
            return thumbnail_url(corpus, *parse_page_id(page), size)
        except CorpusError:
            return ""

    return url
