"""Corpora: documents, their pages and questions about them, in MMDocIR's own files.

A corpus folder holds `MMDocIR_annotations.jsonl` (one document with its questions a line) and
`MMDocIR_pages.parquet` (one page a row). MMDocIR's evaluation set, the miniature and a folder of PDFs all
come in this form, so everything downstream knows one loader:

    corpus = build_corpus("my_pdfs", "my_corpus")      # or load_corpus("my_corpus")
    corpus.page_image("report.pdf", 0).show()

Format: https://github.com/MMDocRAG/MMDocIR/tree/main/dataset. Two things it does not say: `page_indices` is
a range of parquet rows whose end is inclusive, and the page ids of questions count from 0 in each document.
"""

import ast
import hashlib
import io
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

if TYPE_CHECKING:
    from mmr5_lab.ingest import build_corpus as build_corpus

ANNOTATIONS = "MMDocIR_annotations.jsonl"
PAGES = "MMDocIR_pages.parquet"
LAYOUTS = "MMDocIR_layouts.parquet"
PAGE_SCHEMA = pa.schema(
    [
        ("doc_name", pa.string()),
        ("domain", pa.string()),
        ("passage_id", pa.string()),
        ("image_path", pa.string()),
        ("image_binary", pa.binary()),
        ("ocr_text", pa.string()),
        ("vlm_text", pa.string()),
    ]
)
_ROWS_PER_GROUP = 32  # one page read costs at most so many
_LARGEST_GROUP = 512 << 20  # bytes of one column
_DOCUMENT_KEYS = {"doc_name", "domain", "page_indices", "questions", "split"}
_QUESTION_KEYS = {"Q", "A", "page_id", "type", "layout_mapping"}
DOCUMENT_COLUMNS = ["doc_name", "domain", "split", "num_pages", "first_row", "extra"]
LAYOUT_COLUMNS = ["layout_id", "page", "type", "bbox", "page_size", "text"]
QUESTION_COLUMNS = [
    *("question_id", "doc_name", "domain", "split", "type"),
    *("question", "answer", "gold_pages", "boxes", "extra"),
]


def __getattr__(name: str):
    # A corpus is opened without PDFium; who makes one from PDFs finds it here too.
    if name == "build_corpus":
        from mmr5_lab.ingest import build_corpus

        return build_corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class CorpusError(ValueError):
    """A corpus file, document, question or page that cannot be used; the message names it."""


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


def page_id(doc_name: str, page: int) -> str:
    """Name of a page in TREC files, without white space: page 3 of `my report.pdf` is `my%20report.pdf:3`."""
    return f"{quote(doc_name, safe='')}:{page}"


def parse_page_id(identifier: str) -> tuple[str, int]:
    """Document name and 0-based page of an id made by `page_id`.

    Raises CorpusError if the id does not have that form.
    """
    doc_name, colon, page = identifier.rpartition(":")
    if not (doc_name and colon and page.isascii() and page.isdigit()):
        raise CorpusError(f"{identifier!r} is not a page id of the form DOCUMENT:PAGE")
    return unquote(doc_name), int(page)


def question_id(doc_name: str, number: int) -> str:
    """Name of a document's `number`-th question (from 0) in TREC files: `my%20report.pdf:q3`."""
    return f"{quote(doc_name, safe='')}:q{number}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` if the block ends well and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


class PageStore:
    """Rows of a pages parquet file, read one row group and column at a time.

    names: other names of columns in the file, by ours (MMDocIR's training files say `image` for `image_binary`)
    needed: columns that must be there

    Keeps the groups last used, `cache_bytes` of them, and never the whole file. Safe to share among threads.
    """

    def __init__(
        self,
        path: Path,
        cache_bytes: int = 64 << 20,
        names: Mapping[str, str] | None = None,
        needed: Sequence[str] = ("doc_name", "image_binary", "ocr_text"),
    ):
        self.path = path
        self._names = dict(names or {})
        self.order: np.ndarray | None = None  # row of the file at each of our rows, where they differ
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        try:
            self._file = pq.ParquetFile(path, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{path} is not a readable parquet file: {error}") from error
        self.columns = self._file.schema_arrow.names
        missing = [self._names.get(name, name) for name in needed if self._names.get(name, name) not in self.columns]
        if missing:
            raise CorpusError(f"{path} lacks the columns {', '.join(missing)}")
        metadata = self._file.metadata
        self.num_rows: int = metadata.num_rows
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the file's footer, which holds the size of each column of each row group."""
        with self.path.open("rb") as file:
            file.seek(-8, 2)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, 2)
            return hashlib.sha256(file.read(length)).hexdigest()[:12]

    def column(self, name: str) -> list[Any]:
        """A whole column. Meant for names and texts; the images of a corpus need not fit in memory."""
        name = self._names.get(name, name)
        return self._file.read(columns=[name]).column(name).to_pylist()

    def value(self, row: int, name: str) -> Any:
        """One cell. Raises CorpusError for an unknown column or a row group too large to hold."""
        name = self._names.get(name, name)
        row = row if self.order is None else int(self.order[row])
        if name not in self.columns:
            raise CorpusError(f"{self.path} lacks the column {name}")
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            if (group, name) not in self._cache:
                self._cache[group, name] = self._read(group, name)
                while len(self._cache) > 1 and sum(a.nbytes for a in self._cache.values()) > self._cache_bytes:
                    self._cache.popitem(last=False)
            self._cache.move_to_end((group, name))
            return self._cache[group, name][row - int(self._starts[group])].as_py()

    def _read(self, group: int, name: str) -> pa.ChunkedArray:
        column = self._file.metadata.row_group(group).column(self._file.schema_arrow.get_field_index(name))
        if column.total_uncompressed_size > _LARGEST_GROUP:
            raise CorpusError(
                f"{self.path} keeps {column.total_uncompressed_size >> 20} MB of {name} in one row group, "
                f"too much to read for one page; rewrite it once with mmr5_lab.corpus.regroup_pages({str(self.path)!r})"
            )
        try:
            return self._file.read_row_group(group, columns=[name], use_threads=False).column(name)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{self.path} is damaged in row group {group}: {error}") from error


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents, their pages and questions.

    documents: one row each; `doc_name`, `domain`, `split` ("eval" unless the annotations say otherwise),
      `num_pages`, `first_row` (row of page 0 in the parquet file), `extra` (dict of further annotation keys)
    questions: one row each; `question_id` (no white space, unique), `doc_name`, `domain`, `split`, `type`
      (tuple of str, may be empty), `question`, `answer`, `gold_pages` (list of 0-based pages), `boxes`
      (evidence: list of {"page", "page_size": [width, height], "bbox": [x1, y1, x2, y2]}, boxes in the unit
      of page_size), `extra` (dict of further annotation keys)

    Pages are read when asked for. `subset` and `split` give views that share the page file.
    """

    folder: Path
    documents: pd.DataFrame
    questions: pd.DataFrame
    store: PageStore | None = None

    @cached_property
    def _rows(self) -> dict[str, tuple[int, int]]:
        frame = self.documents
        spans = zip(frame["first_row"].tolist(), frame["num_pages"].tolist(), strict=True)
        return dict(zip(frame["doc_name"], spans, strict=True))

    @cached_property
    def by_id(self) -> dict[str, pd.Series]:
        """Question id -> its row of `questions`."""
        return {row["question_id"]: row for _, row in self.questions.iterrows()}

    def _value(self, doc_name: str, page: int, column: str) -> Any:
        num_pages = self.num_pages(doc_name)
        if not 0 <= page < num_pages:
            raise CorpusError(f"{doc_name!r} has no page {page}; it has pages 0 to {num_pages - 1}")
        if self.store is None:
            raise CorpusError(f"{self.folder / PAGES} is missing: page images and texts are read from it")
        return self.store.value(self._rows[doc_name][0] + page, column)

    def num_pages(self, doc_name: str) -> int:
        """Number of pages of a document. Raises CorpusError if the corpus does not have it."""
        if doc_name not in self._rows:
            raise CorpusError(f"{self.folder} has no document {doc_name!r}")
        return self._rows[doc_name][1]

    def rows(self, doc_name: str) -> range:
        """Rows of a document's pages in the page file. Raises CorpusError if the corpus does not have it."""
        num_pages = self.num_pages(doc_name)
        return range(self._rows[doc_name][0], self._rows[doc_name][0] + num_pages)

    def page_bytes(self, doc_name: str, page: int) -> bytes:
        """The page's image file (JPEG or PNG) as stored. Raises CorpusError if it is empty or not there."""
        data = self._value(doc_name, page, "image_binary")
        if isinstance(data, dict):  # as the datasets library keeps images
            data = data.get("bytes")
        if not data:
            raise CorpusError(f"page {page} of {doc_name!r}: the image is empty (0 bytes)")
        return data

    def page_image(self, doc_name: str, page: int, size: tuple[int, int] | None = None) -> Image.Image:
        """The page as an RGB image. Raises CorpusError, naming document and page, if it cannot be decoded.

        size: (width, height) in pixels that are enough; a larger JPEG is then decoded at a fraction of its own
        """
        data = self.page_bytes(doc_name, page)
        try:
            image = Image.open(io.BytesIO(data))
            if size is not None:
                image.draft("RGB", size)
            return as_rgb(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise CorpusError(
                f"page {page} of {doc_name!r}: the image ({len(data)} bytes) is truncated or corrupt: {error}"
            ) from error

    def page_text(self, doc_name: str, page: int, source: str = "ocr_text") -> str:
        """The page's words, from text layer or OCR ("ocr_text") or a VLM ("vlm_text"); "" if it has none."""
        return self._value(doc_name, page, source) or ""

    @cached_property
    def _layout_store(self) -> PageStore:
        path = self.folder / LAYOUTS
        if not path.exists():
            raise CorpusError(f"{path} is missing: the parts of pages are read from it (it is optional)")
        return PageStore(path, needed=("doc_name", "layout_id", "page_id", "type", "bbox", "page_size"))

    def layouts(self, doc_name: str, page: int | None = None) -> pd.DataFrame:
        """The parts that MMDocIR found on a document's pages, or on one of them, in the file's order.

        One row each: `layout_id`, `page` (0-based), `type` ("text", "table", "figure", …), `bbox` ([x1, y1, x2, y2]
        in the unit of `page_size`, [width, height]), `text` (its words, by OCR where it is a picture; "" if none).
        Only the row groups of this document are read, of the columns asked for.

        Raises CorpusError if the layout file is missing, lacks columns, or does not fit the annotations.
        """
        pages, store = range(self.num_pages(doc_name)), self._layout_store
        if page is not None and page not in pages:
            raise CorpusError(f"{doc_name!r} has no page {page}; it has pages 0 to {pages[-1]}")
        [extra] = self.documents.loc[self.documents["doc_name"] == doc_name, "extra"]
        span = extra.get("layout_indices")
        if not is_pair(span) or not 0 <= span[0] <= span[1] < store.num_rows:
            raise CorpusError(
                f"layout_indices of {doc_name!r} is {span}, not [first row, last row] of the {store.num_rows}"
                f" in {store.path}"
            )
        words = [name for name in ("text", "ocr_text") if name in store.columns]
        found = []
        for row in range(span[0], span[1] + 1):  # the end is inclusive
            if (name := store.value(row, "doc_name")) != doc_name:
                raise CorpusError(f"{store.path}, row {row} is a part of {name!r}, but {doc_name!r} has that row")
            if (where := store.value(row, "page_id")) not in pages:
                raise CorpusError(f"{store.path}, row {row}: {doc_name!r} has no page {where}")
            if page in (None, where):
                kept = {name: store.value(row, name) for name in ("layout_id", "type", "bbox", "page_size")}
                text = next(filter(None, (store.value(row, name) for name in words)), "")
                found.append(kept | {"page": where, "text": text})
        return pd.DataFrame(found, columns=LAYOUT_COLUMNS)

    @cached_property
    def pages(self) -> pd.DataFrame:
        """One row a page: `doc_name`, `page` (0-based), `page_id`, `has_text` (is a word in `ocr_text`?).

        Reads all texts. Raises CorpusError if the page file is missing.
        """
        rows = [
            (name, page, page_id(name, page), bool(re.search(r"\w", self.page_text(name, page))))
            for name, (_, num_pages) in self._rows.items()
            for page in range(num_pages)
        ]
        return pd.DataFrame(rows, columns=["doc_name", "page", "page_id", "has_text"])

    def subset(self, doc_names: Iterable[str]) -> "Corpus":
        """The corpus restricted to some documents, in corpus order. Raises CorpusError for unknown names."""
        names = set(doc_names)
        unknown = sorted(names - set(self._rows))
        if unknown:
            raise CorpusError(f"{self.folder} has no document {', '.join(map(repr, unknown))}")
        documents = self.documents[self.documents["doc_name"].isin(names)].reset_index(drop=True)
        questions = self.questions[self.questions["doc_name"].isin(names)].reset_index(drop=True)
        return replace(self, documents=documents, questions=questions)

    def with_questions(self, question_ids: Iterable[str]) -> "Corpus":
        """The same documents with some of their questions. Raises CorpusError for unknown ones."""
        wanted = set(question_ids)
        unknown = sorted(wanted - set(self.questions["question_id"]))
        if unknown:
            raise CorpusError(f"{self.folder} has no question {', '.join(map(repr, unknown[:5]))}")
        questions = self.questions[self.questions["question_id"].isin(wanted)].reset_index(drop=True)
        return replace(self, questions=questions)

    def split(self, name: str) -> "Corpus":
        """The documents of one split ("sft", "rl", "eval"…). Raises CorpusError if there are none."""
        names = self.documents.loc[self.documents["split"] == name, "doc_name"]
        if names.empty:
            known = ", ".join(sorted(self.documents["split"].unique())) or "none"
            raise CorpusError(f"{self.folder} has no documents of split {name!r}; its splits are: {known}")
        return self.subset(names)


def load_corpus(folder: str | Path) -> Corpus:
    """Open a corpus folder: its annotations, and of the page file only sizes and document names.

    Without the page file, documents and questions work and pages raise an error that says what is missing.
    Raises CorpusError, naming file and line or document, if a file is missing or malformed, a question's gold
    page does not exist, or the two files disagree.
    """
    folder = Path(folder)
    path = folder / ANNOTATIONS
    if not path.is_file():
        raise CorpusError(f"{folder} is not a corpus folder: {ANNOTATIONS} is missing")
    documents: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for where, record in read_annotations(path):
        if not is_pair(record.get("page_indices")):
            raise CorpusError(f"{where}: page_indices is not [first row, last row]")
        document, its_questions = parse_document(record, where)
        documents.append(document)
        questions += its_questions
    frame = pd.DataFrame(documents, columns=DOCUMENT_COLUMNS)
    repeated = frame["doc_name"][frame["doc_name"].duplicated()]
    if len(repeated):
        raise CorpusError(f"{path}: document {repeated.iloc[0]!r} is annotated twice")
    store = PageStore(folder / PAGES) if (folder / PAGES).exists() else None
    if store is not None:
        _check_rows(frame, store)
    return Corpus(folder, frame, pd.DataFrame(questions, columns=QUESTION_COLUMNS), store)


def write_corpus(
    out_folder: str | Path,
    annotations: Iterable[dict[str, Any]],
    pages: Iterable[dict[str, Any]],
    *,
    leave_out_empty: bool = False,
) -> None:
    """Write a corpus folder; existing files are replaced only when the new ones are complete.

    annotations: one dict a document, as in MMDocIR's file. `page_indices` may be left out: it is filled in
      from the pages. Extra keys (`split`, or anything JSON can hold) are kept.
    pages: one dict a page, consumed as a stream, each document's pages together and in order. `doc_name` and
      `image_binary` (JPEG or PNG bytes) are needed; `ocr_text`, `vlm_text`, `image_path` are "" where left
      out, `passage_id` is the 0-based page number, `domain` is that of the document's annotation.
    leave_out_empty: annotated documents without pages are left out, not refused.

    Raises CorpusError if a page has no annotated document or a document no pages, if `page_indices`
    contradicts the pages, or if a gold page does not exist. Nothing is replaced in that case.
    """
    folder = Path(out_folder)
    records = [dict(record) for record in annotations]
    domains = dict(_name_and_domain(record, f"annotation {n}") for n, record in enumerate(records))
    spans: dict[str, list[int]] = {}

    def rows() -> Iterator[dict[str, Any]]:
        row = 0
        for name, group in groupby(pages, key=lambda page: page["doc_name"]):
            if name in spans:
                raise CorpusError(f"the pages of {name!r} do not stand together")
            if name not in domains:
                raise CorpusError(f"there are pages of {name!r} but no annotation")
            first = row
            for page in group:
                unknown = sorted(set(page) - set(PAGE_SCHEMA.names))
                if unknown:
                    raise CorpusError(f"a page of {name!r} has unknown columns: {', '.join(unknown)}")
                yield {
                    "domain": domains[name], "passage_id": str(row - first),
                    "image_path": "", "ocr_text": "", "vlm_text": "",
                } | page  # fmt: skip
                row += 1
            spans[name] = [first, row - 1]

    with replacing(folder / PAGES) as new_pages, replacing(folder / ANNOTATIONS) as new_annotations:
        _write_rows(new_pages, rows())
        with new_annotations.open("w", encoding="utf-8") as file:
            for record in records:
                name = record["doc_name"]
                if name not in spans:
                    if leave_out_empty:
                        continue
                    raise CorpusError(f"{name!r} is annotated but has no pages")
                given = record.get("page_indices", spans[name])
                if not is_pair(given) or list(given) != spans[name]:
                    raise CorpusError(f"page_indices of {name!r} is {given}, but its pages are rows {spans[name]}")
                record["page_indices"] = spans[name]
                parse_document(record, "annotations")
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def regroup_pages(path: str | Path) -> None:
    """Rewrite a page file in small row groups, streaming; needed once where all rows are one huge group.

    path: the parquet file, or the corpus folder that holds it
    Takes as much free disk as the file itself. Raises CorpusError if the file is missing or not parquet.
    """
    path = Path(path) / PAGES if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise CorpusError(f"{path} is missing")
    try:
        # Otherwise pyarrow loads the whole column for the first batch.
        source = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        with replacing(path) as new, pq.ParquetWriter(new, source.schema_arrow) as writer:
            for batch in source.iter_batches(batch_size=_ROWS_PER_GROUP, use_threads=False):
                writer.write_batch(batch, row_group_size=_ROWS_PER_GROUP)
    except pa.ArrowException as error:
        raise CorpusError(f"{path} is not a readable parquet file: {error}") from error


def read_annotations(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", record) of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise CorpusError(f"{where} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise CorpusError(f"{where} is not a JSON object")
            yield where, record


def _name_and_domain(record: dict[str, Any], where: str) -> tuple[str, str]:
    for key in ("doc_name", "domain"):
        if not isinstance(record.get(key), str):
            raise CorpusError(f"{where}: {key} is missing or not a text")
    return record["doc_name"], record["domain"]


def parse_document(record: dict[str, Any], where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for `Corpus.documents` and its rows for `Corpus.questions`; `where` begins error messages."""
    name, domain = _name_and_domain(record, where)
    if not isinstance(record.get("questions"), list):
        raise CorpusError(f"{where}: questions is missing or not a list")
    first, last = record["page_indices"]
    num_pages = last - first + 1
    if first < 0 or num_pages < 1:
        raise CorpusError(f"{where}: page_indices {[first, last]} of {name!r} is not a range of rows")
    document = {
        "doc_name": name, "domain": domain, "split": record.get("split", "eval"),
        "num_pages": num_pages, "first_row": first,
        "extra": {key: value for key, value in record.items() if key not in _DOCUMENT_KEYS},
    }  # fmt: skip
    questions = []
    for number, question in enumerate(record["questions"]):
        what = f"{where}: question {number} of {name!r}"
        if not isinstance(question, dict) or not isinstance(question.get("Q"), str):
            raise CorpusError(f"{what} has no text Q")
        gold = question.get("page_id")
        if not isinstance(gold, list) or not gold or not all(type(page) is int for page in gold):
            raise CorpusError(f"{what}: page_id is not a list of page numbers with at least one entry")
        for page in gold:
            if not 0 <= page < num_pages:
                raise CorpusError(f"{what}: gold page {page} does not exist; pages are 0 to {num_pages - 1}")
        questions.append(
            {
                "question_id": question_id(name, number), "doc_name": name, "domain": domain,
                "split": document["split"], "type": _parse_type(question.get("type"), what),
                "question": question["Q"], "answer": str(question.get("A", "")),
                "gold_pages": list(dict.fromkeys(gold)), "boxes": question.get("layout_mapping") or [],
                "extra": {key: value for key, value in question.items() if key not in _QUESTION_KEYS},
            }
        )  # fmt: skip
    return document, questions


def _parse_type(value: Any, what: str) -> tuple[str, ...]:
    """MMDocIR writes a type as one word (`text-only`), or as the text of a Python list, maybe empty."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise CorpusError(f"{what}: type {value!r} is neither a word nor a list of words") from error
    if isinstance(value, str):
        value = [value] if value else []
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)):
        raise CorpusError(f"{what}: type {value!r} is neither a word nor a list of words")
    return tuple(value or ())


def is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value)


def _check_rows(documents: pd.DataFrame, store: PageStore) -> None:
    """The rows of each document must exist and carry its name (with or without `.pdf`)."""
    names = [str(name).removesuffix(".pdf") for name in store.column("doc_name")]
    for name, first, count in zip(documents["doc_name"], documents["first_row"], documents["num_pages"], strict=True):
        rows = set(names[first : first + count])
        if first + count > store.num_rows:
            raise CorpusError(
                f"{store.path} has {store.num_rows} rows, but page_indices of {name!r} goes to row {first + count - 1}"
            )
        if rows != {name.removesuffix(".pdf")}:
            raise CorpusError(
                f"{store.path}: rows {first} to {first + count - 1} should be the pages of {name!r}, "
                f"but carry the names {', '.join(map(repr, sorted(rows)[:3]))}"
            )


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write page rows in small row groups. JPEG bytes neither repeat nor shrink: trying takes longer than rendering."""
    names = [name for name in PAGE_SCHEMA.names if name != "image_binary"]
    compression = dict.fromkeys(names, "zstd") | {"image_binary": "none"}
    with pq.ParquetWriter(path, PAGE_SCHEMA, compression=compression, use_dictionary=names) as writer:
        batch: list[dict[str, Any]] = []

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(batch, schema=PAGE_SCHEMA), row_group_size=_ROWS_PER_GROUP)
            batch.clear()

        for row in rows:
            batch.append(row)
            if len(batch) == _ROWS_PER_GROUP:
                flush()
        if batch:
            flush()


def annotation_records(
    annotations: str | Path | Sequence[dict[str, Any]] | None,
) -> dict[str, dict[str, Any]]:
    """Annotation records by document name."""
    if annotations is None:
        return {}
    if isinstance(annotations, str | Path):
        path = Path(annotations)
        if not path.is_file():
            raise CorpusError(f"the annotation file {path} does not exist")
        pairs = list(read_annotations(path))
    else:
        pairs = [(f"annotation {number}", record) for number, record in enumerate(annotations)]
    records: dict[str, dict[str, Any]] = {}
    for where, record in pairs:
        name, _ = _name_and_domain(record, where)
        if name in records:
            raise CorpusError(f"{where}: document {name!r} is annotated twice")
        records[name] = record
    return records
