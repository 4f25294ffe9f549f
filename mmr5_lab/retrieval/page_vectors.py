"""Page vectors on disk, and how queries score against them.

A folder holds what one model made of the pages of one corpus:

    about.json     what the vectors depend on, and their dimensions; a folder made with something else is refused
    pages.i32      two numbers a page: its row in the corpus's page file, and how many vectors it has
    vectors.f16    the vectors in half precision, page after page

Both files are only ever appended to, so that encoding goes on where it was interrupted. Models with one vector a page
(CLIP, DSE, GME…) and with one a patch (late interaction: ColQwen) are kept and scored alike, by MaxSim: for each vector
of the query the best dot product with a vector of the page, summed (https://arxiv.org/abs/2004.12832, section 3.3).
With one vector on both sides that is their dot product.
"""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmr5_lab.files import replacing

_BLOCK = 4096  # page vectors compared at once by a thread: about 2 MB of each kind, which stays in a core's cache
_QUERY_VECTORS = 1024  # query vectors compared at once; more are taken in several passes over the file


class VectorsError(ValueError):
    """Page vectors that cannot be used; the message names the folder."""


class PageVectors:
    """The vectors of one folder, by the rows of the corpus's page file.

    rows: int array, the row of each page in the order of the files
    starts: int array, one longer; page i has the vectors starts[i] to starts[i + 1] - 1

    about: JSON values that the vectors depend on (model, prompts, pages…)
    Raises VectorsError if the folder was made with another `about`.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]):
        self.folder = Path(folder)
        self.about = json.loads(json.dumps(about))
        self.dimensions: int | None = None
        self.rows = np.zeros(0, dtype=np.int64)
        self.starts = np.zeros(1, dtype=np.int64)
        self._place: dict[int, int] = {}
        self._load()

    @property
    def _vectors(self) -> Path:
        return self.folder / "vectors.f16"

    def _load(self) -> None:
        if (self.folder / "about.json").exists():
            stored = json.loads((self.folder / "about.json").read_text())
            self.dimensions = stored.pop("dimensions")
            other = [key for key in {**stored, **self.about} if stored.get(key) != self.about.get(key)]
            if other:
                told = ", ".join(f"{key} {stored.get(key)!r}, now {self.about.get(key)!r}" for key in other)
                raise VectorsError(f"{self.folder} holds vectors made otherwise ({told}): delete it or choose another")
            self._add(self._whole_pages())

    def _add(self, pages: np.ndarray) -> None:
        self._place.update(zip(pages[:, 0].tolist(), range(len(self), len(self) + len(pages)), strict=True))
        self.rows = np.concatenate([self.rows, pages[:, 0]])
        self.starts = np.concatenate([self.starts, self.starts[-1] + np.cumsum(pages[:, 1], dtype=np.int64)])

    def _whole_pages(self) -> np.ndarray:
        """Row and count of each page whose vectors are all there; what an interruption cut off is not."""
        if not (self.folder / "pages.i32").exists():  # ended before its first page
            return np.zeros((0, 2), dtype=np.int32)
        data = (self.folder / "pages.i32").read_bytes()
        pages = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.int32).reshape(-1, 2)
        there = self._vectors.stat().st_size // (2 * (self.dimensions or 1))
        return pages[np.cumsum(pages[:, 1], dtype=np.int64) <= there]

    def __len__(self) -> int:
        return len(self.rows)

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Those of some rows that have no vectors yet."""
        return [row for row in rows if row not in self._place]

    def append(self, rows: Sequence[int], vectors: Sequence[np.ndarray]) -> None:
        """Add pages: arrays of shape (vectors of the page, dimensions). Raises VectorsError for what does not fit."""
        halves = [np.ascontiguousarray(array, dtype=np.float16) for array in vectors]
        for row, array in zip(rows, halves, strict=True):
            if array.ndim != 2 or not len(array) or self.dimensions not in (None, array.shape[1]):
                raise VectorsError(
                    f"row {row}: vectors of shape {array.shape} do not go with {self.dimensions} dimensions"
                )
            if not np.isfinite(array).all():
                raise VectorsError(f"row {row}: a vector is not finite; the model's numbers overflowed or it is broken")
            if self.dimensions is None:
                self.dimensions = array.shape[1]
                with replacing(self.folder / "about.json") as new:
                    new.write_text(json.dumps(self.about | {"dimensions": self.dimensions}, indent=1) + "\n")
        with self._vectors.open("ab") as file:
            file.truncate(int(self.starts[-1]) * 2 * (self.dimensions or 1))
            for array in halves:
                file.write(array.tobytes())
        counts = np.array([[row, len(array)] for row, array in zip(rows, halves, strict=True)], dtype=np.int32)
        with (self.folder / "pages.i32").open("ab") as file:
            file.truncate(len(self) * 8)
            file.write(counts.tobytes())
        self._add(counts.reshape(-1, 2))

    def page(self, row: int) -> np.ndarray:
        """The vectors of one page, memory-mapped. Raises VectorsError if the page has none."""
        if row not in self._place:
            raise VectorsError(f"{self.folder} has no vectors of row {row}")
        return self.all()[self.starts[self._place[row]] : self.starts[self._place[row] + 1]]

    def all(self) -> np.ndarray:
        """All vectors, memory-mapped, shape (vectors, dimensions)."""
        return np.memmap(self._vectors, np.float16, "r", shape=(int(self.starts[-1]), self.dimensions or 1))

    def maxsim(
        self, queries: Sequence[np.ndarray], rows: Sequence[int] | None = None, device: str = "cpu"
    ) -> np.ndarray:
        """MaxSim of each query with each page, in single precision; shape (queries, pages).

        queries: arrays of shape (vectors of the query, dimensions)
        rows: the pages, in the order of the scores; None: all, in the order of the files
        device: where to multiply; the vectors go there block by block

        The file is read in blocks of about 1 MB by a few threads more than torch has, so memory does not grow with it.
        Raises VectorsError for pages without vectors and for queries of other dimensions.
        """
        if rows is None:
            places = np.arange(len(self))
        else:
            missing = self.missing(rows)
            if missing:
                raise VectorsError(
                    f"{self.folder} has no vectors of {len(missing)} pages, the first is row {missing[0]}"
                )
            places = np.array([self._place[row] for row in rows], dtype=np.int64)
        for query in queries:
            if query.ndim != 2 or not len(query) or query.shape[1] != self.dimensions:
                raise VectorsError(f"a query of shape {query.shape} does not go with {self.dimensions} dimensions")
        scores = np.empty((len(queries), len(places)), dtype=np.float32)
        order = np.argsort(places, kind="stable")
        start = 0
        while start < len(queries):
            stop, total = start + 1, len(queries[start])
            while stop < len(queries) and total + len(queries[stop]) <= _QUERY_VECTORS:
                total += len(queries[stop])
                stop += 1
            maxima = self._maxima(np.concatenate(queries[start:stop]), places[order], device)
            firsts = np.cumsum([0] + [len(query) for query in queries[start : stop - 1]])
            scores[start:stop, order] = np.add.reduceat(maxima, firsts, axis=1).T
            start = stop
        return scores

    def _maxima(self, query: np.ndarray, places: np.ndarray, device: str) -> np.ndarray:
        """The best dot product of each query vector with each page, shape (pages, query vectors); places ascend."""
        transposed = torch.from_numpy(np.ascontiguousarray(query, dtype=np.float32)).to(device).T.contiguous()
        maxima = torch.empty((len(places), len(query)), device=device)
        blocks = self._blocks(places)
        largest = max((int(self.starts[places[b - 1] + 1] - self.starts[places[a]]) for a, b in blocks), default=0)
        width = query.shape[1]
        scratch = threading.local()
        file = os.open(self._vectors, os.O_RDONLY)

        def compare(block: tuple[int, int]) -> None:
            if not hasattr(scratch, "half"):  # made once a thread: fresh memory for each block fragments the heap
                scratch.half = np.empty((largest, width), dtype=np.float16)
                scratch.single = torch.empty((largest, width), device=device)
                scratch.dots = torch.empty((largest, len(query)), device=device)
            offsets = self.starts[places[block[0]] : places[block[1] - 1] + 2]
            first, count = int(offsets[0]), int(offsets[-1] - offsets[0])
            half = scratch.half[:count]
            _read_into(file, half, first * half.itemsize * width, self._vectors)
            single = scratch.single[:count].copy_(torch.from_numpy(half))
            dots = torch.mm(single, transposed, out=scratch.dots[:count])
            for place, (begin, end) in enumerate(zip(offsets[:-1] - first, offsets[1:] - first, strict=True), block[0]):
                torch.amax(dots[begin:end], 0, out=maxima[place])

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of each worker below
        try:
            # Two more than can compute: they wait for the disk.
            with torch.inference_mode(), ThreadPoolExecutor(threads + 2 if device == "cpu" else 2) as pool:
                for _ in pool.map(compare, blocks):
                    pass
        finally:
            torch.set_num_threads(threads)
            os.close(file)
        return maxima.cpu().numpy()

    def _blocks(self, places: np.ndarray) -> list[tuple[int, int]]:
        """Stretches [a, b) of `places` that lie side by side in the file, each of about `_BLOCK` vectors."""
        blocks: list[tuple[int, int]] = []
        begin = 0
        for i in range(1, len(places) + 1):
            full = i < len(places) and self.starts[places[i] + 1] - self.starts[places[begin]] > _BLOCK
            if i == len(places) or full or places[i] != places[i - 1] + 1:
                blocks.append((begin, i))
                begin = i
        return blocks


def _read_into(file: int, array: np.ndarray, offset: int, path: Path) -> None:
    """Fill an array from a place in an open file, safely among threads."""
    view = array.data.cast("B")
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if not count:
            raise VectorsError(f"{path} ends before byte {offset + len(view)}: it was changed while being read")
        done += count
