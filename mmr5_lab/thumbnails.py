"""Page images small enough to put many of them into one HTML page."""

import io

from mmr5_lab.corpus import Corpus, CorpusError
from mmr5_lab.typeset import data_url

SIZE = (340, 440)  # pixels at most


def thumbnail_url(corpus: Corpus, doc_name: str, page: int, size: tuple[int, int] = SIZE) -> str:
    """A page as a data URL of a JPEG of at most `size` (width, height) pixels.

    Raises CorpusError, naming document and page, where there is no such page or its image cannot be decoded.
    """
    image = corpus.page_image(doc_name, page)
    image.thumbnail(size)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return data_url(file.getvalue(), "jpeg")


class Thumbnails:
    """Thumbnails of a corpus, each made once. A page that cannot be shown is "" and says why in `problems`."""

    def __init__(self, corpus: Corpus, size: tuple[int, int] = SIZE):
        self.corpus, self.size = corpus, size
        self.problems: dict[tuple[str, int], str] = {}
        self._made: dict[tuple[str, int], str] = {}

    def url(self, doc_name: str, page: int) -> str:
        """The page's data URL."""
        if (doc_name, page) not in self._made:
            try:
                made = thumbnail_url(self.corpus, doc_name, page, self.size)
            except CorpusError as error:
                made, self.problems[doc_name, page] = "", str(error)
            self._made[doc_name, page] = made
        return self._made[doc_name, page]
