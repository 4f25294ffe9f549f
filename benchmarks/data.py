"""Data construction and first-stage retrieval: late interaction from disk.

    python benchmarks/data.py [--quick] [--json OUT] [--only PART…]

Each part is a function in `PARTS` that adds its rows to the report; baselines are named in the rows. Files are made in
the system's temporary folder (3.7 GB for `maxsim`; `--quick` makes a tenth) and deleted.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Peak, Report, interleaved

from mmr5_lab.page_vectors import PageVectors

PAGES, PATCHES, DIMENSIONS = 20_395, 700, 128  # MMDocIR's evaluation set through ColQwen2
QUERY_VECTORS = 24  # a question of about a dozen words, its prefix and ten padding tokens


def _unit(*shape: int) -> np.ndarray:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).numpy()


def _made(folder: Path, pages: int) -> PageVectors:
    """A store of random unit vectors: 500 pages of them, then the same turned by one dimension a time."""
    store = PageVectors(folder, {"model": "random"})
    block = _unit(min(500, pages), PATCHES, DIMENSIONS).astype(np.float16)
    for start in range(0, pages, len(block)):
        count = min(len(block), pages - start)
        store.append(range(start, start + count), list(np.roll(block, start // len(block), -1)[:count]))
    return store


def _forget(path: Path) -> None:
    """Let the system drop the file from memory, so that the next read comes from disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> int:
    buffer, total = bytearray(8 << 20), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def _einsum(query: np.ndarray, pages: np.ndarray) -> np.ndarray:
    return np.einsum("qd,pnd->pqn", query, pages.astype(np.float32)).max(2).sum(1)


def maxsim(report: Report, quick: bool) -> None:
    """MaxSim of one query with every page, against reading the file; within a document, against a plain einsum."""
    pages = PAGES // 10 if quick else PAGES
    query = _unit(QUERY_VECTORS, DIMENSIONS)
    with tempfile.TemporaryDirectory() as folder:
        store = _made(Path(folder), pages)
        path = Path(folder) / "vectors.f16"
        gigabytes = path.stat().st_size / 1e9

        def cold(way: Callable) -> Callable:
            def run():
                _forget(path)
                return way()

            return run

        ways = {"read": lambda: _read(path), "maxsim": lambda: store.maxsim([query])}
        for name, wrapped in (("from disk", {k: cold(way) for k, way in ways.items()}), ("from memory", ways)):
            with Peak() as peak:
                seconds, results = interleaved(wrapped, 1 if quick else 3)
            checked = list(range(0, pages, max(1, pages // 200)))
            difference = np.abs(
                results["maxsim"][0, checked] - _einsum(query, np.stack([store.page(r) for r in checked]))
            )
            assert difference.max() < 1e-3, f"MaxSim differs from the einsum by {difference.max()}"
            note = f"{gigabytes:.2f} GB, peak {peak.megabytes:.0f} MB"
            report.add(
                f"maxsim, {pages} pages {name}: reading", seconds["read"], seconds["maxsim"], gigabytes, "GB/s", note
            )

        document = list(range(min(1000, pages // 2), min(1000, pages // 2) + 65))
        stacked = np.stack([store.page(row) for row in document])
        ways = {"einsum": lambda: _einsum(query, stacked), "ours": lambda: store.maxsim([query], document)[0]}
        seconds, results = interleaved(ways, 3 if quick else 20)
        assert np.abs(results["einsum"] - results["ours"]).max() < 1e-3
        note = f"{np.median(seconds['ours']) * 1000:.0f} ms"
        report.add("maxsim, a document of 65 pages: einsum", seconds["einsum"], seconds["ours"], 1, "documents/s", note)


PARTS = {"maxsim": maxsim}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less data, one round")
    parser.add_argument("--json", metavar="OUT", type=Path, help="also write the rows as JSON")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    given = parser.parse_args()
    report = Report("Data construction and first-stage retrieval")
    for name in given.only:
        started = time.perf_counter()
        PARTS[name](report, given.quick)
        print(f"{'':44}{name} took {time.perf_counter() - started:.0f} s", flush=True)
    report.finish(given.json)


if __name__ == "__main__":
    main()
