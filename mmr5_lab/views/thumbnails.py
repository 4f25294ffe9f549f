"""Page images small enough to put many of them into one HTML page."""

import io
from collections import OrderedDict

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.html import data_url

SIZE = (340, 440)  # pixels at most


def thumbnail_url(corpus: Corpus, doc_name: str, page: int, size: tuple[int, int] = SIZE) -> str:
    """A page as a data URL of a JPEG of at most `size` (width, height) pixels.

    Raises CorpusError, naming document and page, where there is no such page or its image cannot be decoded.
    """
    image = corpus.page_image(doc_name, page, size)
    image.thumbnail(size)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return data_url(file.getvalue(), "jpeg")


class Thumbnails:
    """Thumbnails of a corpus, each made once; of more than `most_bytes`, those not used for longest are given up.

    A page that cannot be shown is "".
    """

    def __init__(self, corpus: Corpus, size: tuple[int, int] = SIZE, most_bytes: int = 64 << 20):
        self.corpus, self.size, self.most_bytes = corpus, size, most_bytes
        self._made: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._bytes = 0

    def url(self, doc_name: str, page: int) -> str:
        """The page's data URL."""
        key = (doc_name, page)
        if key not in self._made:
            try:
                made = thumbnail_url(self.corpus, doc_name, page, self.size)
            except CorpusError:
                made = ""
            self._made[key] = made
            self._bytes += len(made)
            while self._bytes > self.most_bytes and len(self._made) > 1:
                self._bytes -= len(self._made.popitem(last=False)[1])
        self._made.move_to_end(key)
        return self._made[key]
