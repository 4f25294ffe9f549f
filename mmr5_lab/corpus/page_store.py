"""The parquet file of a corpus's pages, read a row group and a column at a time."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmr5_lab.corpus.ids import CorpusError

_LARGEST_GROUP = 512 << 20  # bytes of one column
_CACHE_BYTES = 64 << 20


class PageStore:
    """Rows of a pages parquet file, read one row group and column at a time.

    names: our name of a column -> its name in the file, where they differ (`image_binary` is `image` in MMDocIR's
      training files)
    needed: columns that must be there
    sort_by: columns by whose values rows are numbered; (): as they stand in the file

    Keeps the groups last used, 64 MB of them, and never the whole file. Safe to share among threads.
    Raises CorpusError for a file that is not parquet or lacks columns.
    """

    def __init__(
        self,
        path: Path,
        names: Mapping[str, str] | None = None,
        needed: Sequence[str] = ("doc_name", "image_binary", "ocr_text"),
        sort_by: Sequence[str] = (),
    ):
        self.path = path
        self._names = dict(names or {})
        self._cache: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        try:
            self._file = pq.ParquetFile(path, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{path} is not a readable parquet file: {error}") from error
        self.columns = self._file.schema_arrow.names
        if missing := [column for name in needed if (column := self._names.get(name, name)) not in self.columns]:
            raise CorpusError(f"{path} lacks the columns {', '.join(missing)}")
        metadata = self._file.metadata
        self.num_rows: int = metadata.num_rows
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._order: Sequence[int] = range(self.num_rows)  # rows of the file, in our order
        if sort_by:
            keys = list(zip(*(self.column(name) for name in sort_by), strict=True))
            self._order = sorted(self._order, key=keys.__getitem__)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the file's footer, which holds the size of each column of each row group."""
        with self.path.open("rb") as file:
            file.seek(-8, 2)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, 2)
            return hashlib.sha256(file.read(length)).hexdigest()[:12]

    def column(self, name: str) -> list[Any]:
        """Return a whole column. Meant for names and texts; the images of a corpus need not fit in memory."""
        name = self._names.get(name, name)
        values = self._file.read(columns=[name]).column(name).to_pylist()
        return [values[row] for row in self._order]

    def value(self, row: int, name: str) -> Any:
        """Return one cell. Raises CorpusError for an unknown column or a row group too large to hold."""
        name = self._names.get(name, name)
        if name not in self.columns:
            raise CorpusError(f"{self.path} lacks the column {name}")
        row = self._order[row]
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            if (group, name) not in self._cache:
                self._cache[group, name] = self._read(group, name)
                while len(self._cache) > 1 and sum(a.nbytes for a in self._cache.values()) > _CACHE_BYTES:
                    self._cache.popitem(last=False)
            self._cache.move_to_end((group, name))
            return self._cache[group, name][row - int(self._starts[group])].as_py()

    def has(self, row: int, name: str) -> bool:
        """Return whether a row has this column."""
        return self._names.get(name, name) in self.columns

    def _read(self, group: int, name: str) -> pa.ChunkedArray:
        column = self._file.metadata.row_group(group).column(self._file.schema_arrow.get_field_index(name))
        if column.total_uncompressed_size > _LARGEST_GROUP:
            raise CorpusError(
                f"{self.path} keeps {column.total_uncompressed_size >> 20} MB of {name} in one row group, "
                f"too much to read for one page; rewrite it once with mmr5_lab.corpus.writing.regroup_pages("
                f"{str(self.path)!r})"
            )
        try:
            return self._file.read_row_group(group, columns=[name], use_threads=False).column(name)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{self.path} is damaged in row group {group}: {error}") from error


class JoinedStores:
    """Several page files as one: their rows, numbered one after another. Columns are those that all files have."""

    def __init__(self, stores: "Sequence[PageStore | JoinedStores]"):
        self._stores = stores
        self._starts = np.cumsum([0, *(store.num_rows for store in stores)])
        self.num_rows: int = int(self._starts[-1])
        first, *others = stores
        self.columns: list[str] = [name for name in first.columns if all(name in store.columns for store in others)]

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the files' fingerprints."""
        return hashlib.sha256(" ".join(store.fingerprint for store in self._stores).encode()).hexdigest()[:12]

    def _place(self, row: int) -> "tuple[PageStore | JoinedStores, int]":
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._stores[place], row - int(self._starts[place])

    def has(self, row: int, name: str) -> bool:
        """Return whether a row's own file has this column."""
        store, row = self._place(row)
        return store.has(row, name)

    def value(self, row: int, name: str) -> Any:
        """Return one cell. Raises CorpusError as the file's own store does."""
        store, row = self._place(row)
        return store.value(row, name)
