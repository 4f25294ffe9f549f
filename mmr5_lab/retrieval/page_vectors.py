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
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmr5_lab.files import write_json

_BLOCK = 8192  # page vectors compared at once: 2 MB of 128 dimensions, which stay in a core's cache
_QUERY_VECTORS = 1024  # query vectors compared at once, so that products take 32 MB


class VectorsError(ValueError):
    """Page vectors that cannot be used; the message names the folder."""


class PageVectors:
    """The vectors of one folder, by the rows of the corpus's page file.

    starts: int array, page i of the files has the vectors starts[i] to starts[i + 1] - 1

    about: JSON values that the vectors depend on (model, prompts, pages…)
    Raises VectorsError if the folder was made with another `about`.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]):
        self.folder = Path(folder)
        self.about = json.loads(json.dumps(about))
        self.dimensions: int | None = None
        self.starts = np.zeros(1, dtype=np.int64)
        self._position: dict[int, int] = {}
        self._vectors = self.folder / "vectors.f16"
        if (self.folder / "about.json").exists():
            stored = json.loads((self.folder / "about.json").read_text())
            self.dimensions = stored.pop("dimensions")
            changed = [key for key in {**stored, **self.about} if stored.get(key) != self.about.get(key)]
            if changed:
                changes = ", ".join(f"{key} {stored.get(key)!r}, now {self.about.get(key)!r}" for key in changed)
                raise VectorsError(f"{self.folder} has other vectors ({changes}): delete it or choose another")
            self._add(self._whole_pages())

    def _add(self, pages: np.ndarray) -> None:
        self._position.update(zip(pages[:, 0].tolist(), range(len(self), len(self) + len(pages)), strict=True))
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
        return len(self.starts) - 1

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Return those of some rows that have no vectors yet."""
        return [row for row in rows if row not in self._position]

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
                write_json(self.folder / "about.json", self.about | {"dimensions": self.dimensions}, indent=1)
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
        """Return the vectors of one page, memory-mapped. Raises VectorsError if the page has none."""
        if row not in self._position:
            raise VectorsError(f"{self.folder} has no vectors of row {row}")
        vectors = np.memmap(self._vectors, np.float16, "r", shape=(int(self.starts[-1]), self.dimensions or 1))
        return vectors[self.starts[self._position[row]] : self.starts[self._position[row] + 1]]

    def maxsim(
        self, queries: Sequence[np.ndarray], rows: Sequence[int] | None = None, device: str = "cpu"
    ) -> np.ndarray:
        """Return MaxSim of each query with each page, in single precision; shape (queries, pages).

        queries: arrays of shape (vectors of the query, dimensions)
        rows: the pages, in the order of the scores; None: all, in the order of the files
        device: where to multiply; the vectors go there block by block

        The file is read once, in blocks of about 2 MB, so memory does not grow with it.
        Raises VectorsError for pages without vectors and for queries of other dimensions.
        """
        if missing := self.missing(rows or []):
            raise VectorsError(f"{self.folder} has no vectors of {len(missing)} pages, the first is row {missing[0]}")
        for query in queries:
            if query.ndim != 2 or not len(query) or query.shape[1] != self.dimensions:
                raise VectorsError(f"a query of shape {query.shape} does not go with {self.dimensions} dimensions")
        positions = np.arange(len(self)) if rows is None else np.array([self._position[row] for row in rows], dtype=int)
        batches = [
            (
                batch,
                np.cumsum([0] + [len(query) for query in queries[batch][:-1]]),
                torch.from_numpy(np.concatenate(queries[batch]).astype(np.float32)).to(device).T.contiguous(),
            )
            for batch in _batches([len(query) for query in queries], _QUERY_VECTORS)
        ]
        scores = np.empty((len(queries), len(positions)), dtype=np.float32)
        order = np.argsort(positions, kind="stable")
        for block in self._blocks(positions[order]):
            starts = self.starts[positions[order[block.start]] : positions[order[block.stop - 1]] + 2]
            vectors = torch.from_numpy(self._read(starts[0], starts[-1])).to(device).float()
            for batch, firsts, columns in batches:
                best = np.maximum.reduceat(torch.mm(vectors, columns).cpu().numpy(), starts[:-1] - starts[0], axis=0)
                scores[batch, order[block]] = np.add.reduceat(best, firsts, axis=1).T
        return scores

    def _blocks(self, positions: np.ndarray) -> list[slice]:
        """Return stretches of ascending `positions` side by side in the file, each of about `_BLOCK` vectors."""
        gaps = (np.flatnonzero(np.diff(positions) != 1) + 1).tolist()
        lengths = np.diff(self.starts)[positions].tolist()
        return [
            slice(first + block.start, first + block.stop)
            for first, stop in pairwise([0, *gaps, len(positions)])
            for block in _batches(lengths[first:stop], _BLOCK)
        ]

    def _read(self, start: int, stop: int) -> np.ndarray:
        width = self.dimensions or 1
        vectors = np.fromfile(self._vectors, np.float16, (stop - start) * width, offset=2 * start * width)
        if len(vectors) < (stop - start) * width:
            raise VectorsError(f"{self._vectors} ends before vector {stop}: it was changed while being read")
        return vectors.reshape(-1, width)


def _batches(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Cut a sequence into slices whose lengths add up to at most `most`, or of one item."""
    start, total = 0, 0
    for end, length in enumerate(lengths):
        if end > start and total + length > most:
            yield slice(start, end)
            start, total = end, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))
