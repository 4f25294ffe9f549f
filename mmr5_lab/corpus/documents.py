"""Corpora: documents, their pages and questions about them, in MMDocIR's own files.

A corpus folder holds `MMDocIR_annotations.jsonl` (one document with its questions a line) and
`MMDocIR_pages.parquet` (one page a row). MMDocIR's evaluation set, the miniature and a folder of PDFs all
come in this form, so everything downstream knows one loader:

    corpus = build_corpus("my_pdfs", "my_corpus")      # or load_corpus("my_corpus")
    corpus.page_image("report.pdf", 0).show()

Format: https://github.com/MMDocRAG/MMDocIR/tree/main/dataset. Two things it does not say: `page_indices` is
a range of parquet rows whose end is inclusive, and the page ids of questions count from 0 in each document.
"""

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmr5_lab.corpus.annotations import parse_document, read_annotations
from mmr5_lab.corpus.ids import CorpusError, corpora_named, has_words, name_key, nearest, page_id
from mmr5_lab.corpus.page_store import JoinedStores, PageStore
from mmr5_lab.images import open_page, plain_file

logger = logging.getLogger(__name__)

ANNOTATIONS = "MMDocIR_annotations.jsonl"
PAGES = "MMDocIR_pages.parquet"
LAYOUTS = "MMDocIR_layouts.parquet"
DOCUMENT_COLUMNS = ["doc_name", "domain", "split", "num_pages", "first_row", "extra"]
LAYOUT_COLUMNS = ["layout_id", "page", "type", "bbox", "page_size", "text"]
QUESTION_COLUMNS = [
    *("question_id", "doc_name", "domain", "split", "type"),
    *("question", "answer", "gold_pages", "boxes", "extra"),
]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents, their pages and questions.

    documents: one row each; `doc_name`, `domain`, `split` ("eval" unless the annotations say otherwise),
      `num_pages`, `first_row` (row of page 0 in the parquet file), `extra` (dict of further annotation keys)
    questions: one row each; `question_id` (no white space, unique), `doc_name`, `domain`, `split`, `type`
      (tuple of str, may be empty), `question`, `answer`, `gold_pages` (list of 0-based pages), `boxes`
      (evidence: list of {"page", "page_size": [width, height], "bbox": [x1, y1, x2, y2]}, boxes in the unit
      of page_size), `extra` (dict of further annotation keys)
    padding: document -> rows of other documents' pages, which count as its last (`joined.pad`)

    Pages are read when asked for. `subset` and `split` give views that share the page file.
    """

    folder: Path
    documents: pd.DataFrame
    questions: pd.DataFrame
    store: PageStore | JoinedStores | None = None
    padding: Mapping[str, list[int]] = field(default_factory=dict)

    @cached_property
    def _rows(self) -> dict[str, Sequence[int]]:
        columns = (self.documents[name].tolist() for name in ("doc_name", "first_row", "num_pages"))
        rows: dict[str, Sequence[int]] = {}
        for name, first, count in zip(*columns, strict=True):
            padding = self.padding.get(name, [])
            own = range(first, first + count - len(padding))
            rows[name] = [*own, *padding] if padding else own
        return rows

    @cached_property
    def by_id(self) -> dict[str, pd.Series]:
        """Question id -> its row of `questions`."""
        return {row["question_id"]: row for _, row in self.questions.iterrows()}

    @cached_property
    def _spellings(self) -> dict[str, str]:
        names = self.documents["doc_name"].tolist()
        return {name_key(name): name for name in names} | {name: name for name in names}

    def spelled(self, doc_name: str) -> str:
        """Return the corpus's own spelling of a document's name. Raises CorpusError for an unknown document."""
        name = self._spellings.get(doc_name) or self._spellings.get(name_key(doc_name))
        if name is None:
            raise CorpusError(f"{self.folder} has no document {doc_name!r}{nearest(doc_name, self._rows)}")
        return name

    def rows(self, doc_name: str) -> Sequence[int]:
        """Return the rows of a document's pages in the page file.

        Names of documents are understood here and below whatever their capitals and the form of their accents, and
        with or without `.pdf`. Raises CorpusError, with the nearest name, for an unknown document.
        """
        return self._rows[self.spelled(doc_name)]

    def num_pages(self, doc_name: str) -> int:
        """Return the number of pages of a document. Raises CorpusError for an unknown one."""
        return len(self.rows(doc_name))

    def _stored(self, doc_name: str, page: int) -> tuple[PageStore | JoinedStores, int]:
        """Return the page file and the page's row in it."""
        rows = self.rows(doc_name)
        if not 0 <= page < len(rows):
            raise CorpusError(f"{doc_name!r} has no page {page}; it has pages 0 to {len(rows) - 1}")
        if self.store is None:
            raise CorpusError(f"{self.folder / PAGES} is missing: page images and texts are read from it")
        return self.store, rows[page]

    def page_bytes(self, doc_name: str, page: int) -> bytes:
        """Return the page's image file (JPEG or PNG) as stored, or a white page where `mmr5 ingest` could render none.

        Raises CorpusError if it is empty or not there.
        """
        store, row = self._stored(doc_name, page)
        data = store.value(row, "image_binary")
        if data is None:
            logger.warning("page %d of %r could not be rendered: a white page stands for it", page, doc_name)
            return _white_page()
        if isinstance(data, dict):  # as the datasets library keeps images
            data = data.get("bytes")
        if not data:
            raise CorpusError(f"page {page} of {doc_name!r}: the image is empty (0 bytes)")
        return data

    def page_image(self, doc_name: str, page: int, size: tuple[int, int] | None = None) -> Image.Image:
        """Return the page as an RGB image. Raises CorpusError, naming document and page, if it cannot be decoded.

        size: (width, height) in pixels that are enough; a larger JPEG is then decoded at a fraction of its own
        """
        try:
            return open_page(self.page_bytes(doc_name, page), f"page {page} of {doc_name!r}", size)
        except ValueError as error:
            raise CorpusError(str(error)) from error

    def page_file(self, doc_name: str, page: int) -> tuple[bytes, str]:
        """Return the page as an image file that any program shows alike, and its kind: "jpeg" or "png".

        Raises CorpusError, naming document and page, if it cannot be decoded.
        """
        self.page_image(doc_name, page)
        return plain_file(self.page_bytes(doc_name, page))

    def page_text(self, doc_name: str, page: int, source: str = "ocr_text") -> str:
        """Return the page's words, from text layer or OCR ("ocr_text") or a VLM ("vlm_text").

        "" if it has none, also where the file has no column "ocr_text", as MMDocIR's training files.
        """
        store, row = self._stored(doc_name, page)
        if source == "ocr_text" and not store.has(row, source):
            return ""
        return store.value(row, source) or ""

    def has_texts(self, source: str = "ocr_text") -> bool:
        """Return whether the page file has this column of texts, or is itself missing."""
        return self.store is None or source in self.store.columns

    def layouts(self, doc_name: str, page: int | None = None) -> pd.DataFrame:
        """Return the parts that MMDocIR found on a document's pages, or on one of them, in the file's order.

        One row each: `layout_id`, `page` (0-based), `type` ("text", "table", "figure", …), `bbox` ([x1, y1, x2, y2]
        in the unit of `page_size`, [width, height]), `text` (its words, by OCR where it is a picture; "" if none).

        Raises CorpusError if the layout file is missing, lacks columns, or the document or page is unknown.
        """
        doc_name = self.spelled(doc_name)
        path, pages = self.folder / LAYOUTS, range(self.num_pages(doc_name))
        if page is not None and page not in pages:
            raise CorpusError(f"{doc_name!r} has no page {page}; it has pages 0 to {pages[-1]}")
        columns = ["layout_id", "page_id", "type", "bbox", "page_size", "text", "ocr_text"]
        try:  # of the row groups that hold this document
            table = pq.read_table(path, columns=columns, filters=[("doc_name", "==", doc_name)])
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"{path} is missing or lacks columns; it is optional ({error})") from None
        frame = pd.DataFrame(table.to_pylist(), columns=columns).rename(columns={"page_id": "page"})
        frame["text"] = frame["text"].fillna(frame["ocr_text"]).fillna("")
        return frame.loc[frame["page"].isin(pages if page is None else [page]), LAYOUT_COLUMNS].reset_index(drop=True)

    @cached_property
    def pages(self) -> pd.DataFrame:
        """One row a page: `doc_name`, `page` (0-based), `page_id`, `has_text` (is a word in `ocr_text`?).

        Reads all texts. Raises CorpusError if the page file is missing.
        """
        rows = [
            (name, page, page_id(name, page), has_words(self.page_text(name, page)))
            for name, pages in self._rows.items()
            for page in range(len(pages))
        ]
        return pd.DataFrame(rows, columns=["doc_name", "page", "page_id", "has_text"])

    def subset(self, doc_names: Iterable[str]) -> "Corpus":
        """Return the corpus restricted to some documents, in its order. Raises CorpusError for unknown names."""
        names = [self.spelled(name) for name in doc_names]
        documents = self.documents[self.documents["doc_name"].isin(names)].reset_index(drop=True)
        questions = self.questions[self.questions["doc_name"].isin(names)].reset_index(drop=True)
        return replace(self, documents=documents, questions=questions)

    def with_questions(self, question_ids: Iterable[str]) -> "Corpus":
        """Return the same documents with some of their questions. Raises CorpusError for unknown ones."""
        wanted = set(question_ids)
        if unknown := sorted(wanted - set(self.questions["question_id"])):
            similar = nearest(unknown[0], self.questions["question_id"])
            raise CorpusError(f"{self.folder} has no question {', '.join(map(repr, unknown[:5]))}{similar}")
        kept = self.questions[self.questions["question_id"].isin(wanted)]
        return replace(self, questions=kept.reset_index(drop=True))

    def split(self, name: str) -> "Corpus":
        """Return the documents of one split ("sft", "rl", "eval"…). Raises CorpusError if there are none."""
        names = self.documents.loc[self.documents["split"] == name, "doc_name"]
        if names.empty:
            known = ", ".join(sorted(self.documents["split"].unique())) or "none"
            raise CorpusError(f"{self.folder} has no documents of split {name!r}; its splits are: {known}")
        return self.subset(names)


def load_corpus(folder: str | Path, split: str | None = None, *, root: str | Path = "", pad_to: int = 0) -> Corpus:
    """Open a corpus folder: its annotations, and of the page file only sizes and document names.

    folder: a corpus folder, a folder with MMDocIR's training files, or a name: "mmdocir" is MMDocIR's evaluation set,
        "mmdocir-train" its training subsets as one corpus (`mmdocir.load_training`), both from the hub or its cache;
        several are joined by " + ", such as "mmdocir-train + corpora/reports" (`joined.join`)
    split: only the documents of this split
    root: what relative paths are relative to; "": the working folder
    pad_to: documents with fewer pages are filled up with pages of others (`joined.pad`)

    Without the page file, documents and questions work and pages raise an error that says what is missing.
    Raises CorpusError, naming file and line or document, if a file is missing or malformed, a question's gold
    page does not exist, or the two files disagree.
    """
    from mmr5_lab.corpus import joined  # which itself needs this module

    names = corpora_named(folder, root)
    if len(names) == 1:
        corpus = _open(names[0], Path(root))
    else:
        parts = {Path(name).name: _open(name, Path(root)) for name in names}
        if len(parts) < len(names):
            raise CorpusError(f"{folder}: two corpora have the same name, and so would their documents: rename one")
        corpus = joined.join(parts, Path(" + ".join(names)))
    corpus = joined.pad(corpus, pad_to) if pad_to else corpus
    return corpus.split(split) if split else corpus


def _open(name: str, root: Path) -> Corpus:
    """Open one corpus, by its folder or published name."""
    from mmr5_lab.corpus import mmdocir  # which itself needs this module

    folder = root / name
    if name in mmdocir.NAMES and not folder.is_dir():
        folder = mmdocir.fetch(mmdocir.NAMES[name])
    path = folder / ANNOTATIONS
    if (folder / mmdocir.TRAINING_ANNOTATIONS).is_dir() and not path.is_file():
        return mmdocir.load_training(folder)
    if not path.is_file():
        raise CorpusError(f"{folder} is not a corpus folder: {ANNOTATIONS} is missing")
    store = PageStore(folder / PAGES) if (folder / PAGES).exists() else None
    keys = [name_key(str(name)) for name in store.column("doc_name")] if store else None
    documents: dict[str, dict[str, Any]] = {}
    questions: list[dict[str, Any]] = []
    for where, record in read_annotations(path):
        document, its_questions = parse_document(record, where)
        name = document["doc_name"]
        if name in documents:
            raise CorpusError(f"{where}: document {name!r} is annotated twice")
        if keys is not None:
            _check_rows(document, keys, where)
        documents[name] = document
        questions += its_questions
    frame = pd.DataFrame(documents.values(), columns=DOCUMENT_COLUMNS)
    return Corpus(folder, frame, pd.DataFrame(questions, columns=QUESTION_COLUMNS), store)


def _check_rows(document: dict[str, Any], keys: list[str], where: str) -> None:
    """Raise CorpusError unless the rows of a document exist and carry its name. keys: the `name_key` of each row."""
    name, first = document["doc_name"], document["first_row"]
    last = first + document["num_pages"] - 1
    names = set(keys[first : last + 1])
    if names == {name_key(name)} and last < len(keys):
        return
    # Right but for its last row: so looks a range whose end is exclusive.
    exclusive = set(keys[first:last]) == {name_key(name)} and last <= len(keys)
    cause = f"; the end is inclusive: write {[first, last - 1]}" if exclusive else ""
    raise CorpusError(
        f"{where}: rows {first} to {last} of the {len(keys)} in {PAGES} should be the pages of {name!r}, but carry the "
        f"names {', '.join(map(repr, sorted(names)[:3]))}{cause}"
    )


@cache
def _white_page() -> bytes:
    file = io.BytesIO()
    Image.new("L", (595, 842), "white").save(file, "PNG")
    return file.getvalue()
