"""Rendering, MMDocIR at its size, late interaction from disk, traces from a teacher on a server.

    python benchmarks/data.py [--quick] [--json OUT] [--only PART…]

Each part is a function in `PARTS` that adds its rows to the report; baselines are named in the rows. Files are made in
the system's temporary folder (3.7 GB for `maxsim`, 1.6 GB for `opening`; `--quick` makes a tenth) and deleted.
"""

import argparse
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pyarrow.parquet as pq
import torch
from common import Peak, Report, chat_server, interleaved
from PIL import Image

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.ingest import build_corpus
from mmr5_lab.corpus.rankings import Rankings
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.html import data_url
from mmr5_lab.models.chat import Chat
from mmr5_lab.prompting.prompts import teacher_prompt
from mmr5_lab.retrieval.page_vectors import PageVectors
from mmr5_lab.traces.account import Account
from mmr5_lab.traces.construction import Candidates, make_traces, read_traces, rejected_path, training_candidates
from mmr5_lab.traces.teachers import ServerTeacher

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


LATENCY, FAILING, CONCURRENCY = 0.2, 0.05, 16  # seconds, share of the requests, requests under way
RELEASED_THREADS, RELEASED_TRIES = 10, 5


def _asked_corpus(folder: Path, questions: int) -> Corpus:
    """Ten questions a document of ten pages, each page a JPEG of about 160 kB, as real ones are."""
    draw = np.random.default_rng(0)
    pages = []
    for _ in range(10):
        noise = draw.integers(0, 256, (150, 105, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((840, 1190), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        pages.append(file.getvalue())
    records: list[dict[str, Any]] = [
        {
            "doc_name": f"d{k}",
            "domain": "PDF",
            "questions": [{"Q": f"What is {k} {page}?", "page_id": [page]} for page in range(10)],
        }
        for k in range(questions // 10)
    ]
    rows = ({"doc_name": r["doc_name"], "image_binary": page, "ocr_text": ""} for r in records for page in pages)
    write_corpus(folder, records, rows)
    return load_corpus(folder)


def _released_way(url: str, corpus: Corpus, candidates: list[Candidates], path: Path) -> int:
    """The released script's way, written anew: threads over questions, each page decoded and encoded again for each
    call, tried again at once whatever the error, lines appended without a lock. Returns the calls that were answered.
    """
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    answered = []

    def ask(prompt: str, image: Image.Image) -> str | None:
        for _ in range(RELEASED_TRIES):
            try:
                file = io.BytesIO()
                image.save(file, "JPEG")
                part = {"type": "image_url", "image_url": {"url": data_url(file.getvalue(), "jpeg")}}
                content: Any = [{"role": "user", "content": [{"type": "text", "text": prompt}, part]}]
                answer = client.chat.completions.create(model="m", messages=content)
                answered.append(1)
                return answer.choices[0].message.content
            except Exception:
                continue
        return None

    def trace(chosen: Candidates) -> None:
        name, asked = chosen.question["doc_name"], chosen.question["question"]
        lines = [
            ask(teacher_prompt(asked, place in chosen.positive_ids), corpus.page_image(name, page))
            for place, page in enumerate(chosen.pages, 1)
        ]
        if all(lines):
            with path.open("a") as file:
                file.write(json.dumps({"query": asked, "think": lines}) + "\n")

    with ThreadPoolExecutor(RELEASED_THREADS) as pool:
        list(pool.map(trace, candidates))
    return len(answered)


def teacher(report: Report, quick: bool) -> None:
    """Traces from a server of 200 ms that fails in 5 % of the requests: calls answered a second, every trace made."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = _asked_corpus(folder / "corpus", 100 if quick else 400)
        golds = zip(corpus.questions["question_id"], corpus.questions["gold_pages"], strict=True)
        run = {question: [gold, *(page for page in range(10) if page != gold)] for question, [gold] in golds}
        candidates = training_candidates(corpus, Rankings(run), 5)
        calls = sum(len(c.pages) for c in candidates)
        with chat_server(LATENCY, FAILING) as url:
            released = folder / "released.jsonl"
            account = Account(folder / "answers.sqlite")
            server = ServerTeacher(corpus, Chat(url, "m", concurrency=CONCURRENCY), account)
            path = folder / "ours" / "traces.jsonl"
            ways = {
                "released": lambda: _released_way(url, corpus, candidates, released),
                "ours": lambda: make_traces(corpus, candidates, server, path),
            }
            seconds, results = interleaved(ways, 1)
        made = len(read_traces(path)) + len(read_traces(rejected_path(path)))
        assert made == len(candidates), f"{made} of {len(candidates)} traces were made"
        assert account.summary().loc["m", "answers"] == calls, "each page was asked for once"
        theirs, ours = results["released"] / seconds["released"][0], calls / seconds["ours"][0]
        note = (
            f"{made} of {made} traces; released: {len(released.read_text().splitlines())}, {RELEASED_THREADS} threads"
        )
        report.write("teacher: the released script's way", theirs, ours, "calls/s", note)
        ideal = CONCURRENCY / LATENCY * (1 - FAILING)
        report.write("teacher: concurrency ÷ latency, less failures", ideal, ours, "calls/s")


def rendering(report: Report, quick: bool) -> None:
    """Rendering with two processes against one: MMDocIR's PDFs where they are, or else drawn ones."""
    shared = Path(os.environ.get("MMR5_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "mmdocir" / "pdfs"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pdfs"
        source.mkdir()
        found = sorted(shared.glob("*.pdf")) or [_drawn(Path(folder) / f"{n}.pdf") for n in range(12)]
        for copy in range(1 if quick else 3):  # as many pages as a folder of thirty reports
            for pdf in found:
                (source / f"{copy}_{pdf.name}").symlink_to(pdf)

        def way(workers: int) -> Callable:
            def run():
                out = Path(folder) / f"out{workers}"
                shutil.rmtree(out, ignore_errors=True)
                return build_corpus(source, out, ocr="none", workers=workers)

            return run

        seconds, results = interleaved({"one": way(1), "two": way(2)}, 1 if quick else 2)
        pages = len(results["one"].pages)
        for name in results["one"].documents["doc_name"]:
            assert results["one"].page_bytes(name, 0) == results["two"].page_bytes(name, 0), "workers changed a page"
        note = f"{pages} pages; start of the processes and the corpus file included"
        report.add("rendering, 2 processes: 1 process", seconds["one"], seconds["two"], pages, "pages/s", note)


def _drawn(path: Path) -> Path:
    """A PDF of 25 pages with text and a picture on each."""
    from matplotlib import pyplot as plt
    from matplotlib.backends.backend_pdf import PdfPages

    with PdfPages(path) as pdf:
        for number in range(25):
            figure, axes = plt.subplots(2, figsize=(8, 11))
            axes[0].imshow(np.random.default_rng(number).random((300, 300)))
            axes[1].text(0, 0, "\n".join(f"line {line} of page {number}" for line in range(30)))
            pdf.savefig(figure)
            plt.close(figure)
    return path


def opening(report: Report, quick: bool) -> None:
    """Opening a corpus of MMDocIR's size, its first and last page, against reading the columns that this needs."""
    documents, pages = (31, 65) if quick else (313, 65)
    generator = np.random.default_rng(0)
    noise = generator.bytes(150_000)
    words = " ".join(f"word{n}" for n in range(400))

    def rows():
        for document in range(documents):
            for page in range(pages):
                start = (document * 977 + page * 131) % 70_000
                yield {"doc_name": f"{document}.pdf", "image_binary": noise[start : start + 78_000],
                       "ocr_text": f"{document} {page} {words}", "vlm_text": f"{page} {words}"}  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        questions = [{"Q": "?", "A": "", "page_id": [64], "type": "text-only", "layout_mapping": []}] * 5
        records = [{"doc_name": f"{n}.pdf", "domain": "Laws", "questions": questions} for n in range(documents)]
        write_corpus(folder, records, rows())
        path = Path(folder) / "MMDocIR_pages.parquet"

        def whole():
            table = pq.read_table(path, columns=["doc_name", "image_binary"])
            return [table["image_binary"][row].as_py() for row in (0, len(table) - 1)]

        def ours():
            corpus = load_corpus(folder)
            return [corpus.page_bytes("0.pdf", 0), corpus.page_bytes(f"{documents - 1}.pdf", pages - 1)]

        with Peak() as peak:
            seconds, results = interleaved({"ours": ours}, 3)
        plain, wanted = interleaved({"whole": whole}, 1 if quick else 3)
        assert results["ours"] == wanted["whole"]
        size = f"{path.stat().st_size / 1e9:.2f} GB, {documents * pages} pages"
        note = f"{size}: {np.median(seconds['ours']):.2f} s, peak {peak.megabytes:.0f} MB"
        report.add("opening, two pages: reading the images", plain["whole"], seconds["ours"], 1, "openings/s", note)


PARTS = {"rendering": rendering, "opening": opening, "maxsim": maxsim, "teacher": teacher}


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
