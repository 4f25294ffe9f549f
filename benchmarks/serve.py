"""`mmr5 serve` under load: `python benchmarks/serve.py [--quick] [--json OUT]`.

1,000 requests (`--quick`: 100) from 32 clients at once, with faults among them: broken pages, bodies that are no JSON,
too many documents, clients that hang up. Every sound request must get one answer, that of `rank_many`; every broken one
its error. The baseline asks the same sound questions one after another.
"""

import base64
import io
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from common import Report, arguments

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.reranking.local import Reranker

CLIENTS, MODE = 32, "score"
FAULTS = ("broken page", "no JSON", "too many", "hangs up")
EXPECTED = {"broken page": 400, "no JSON": 400, "too many": 400, "hangs up": None}


@contextmanager
def served(model: str):
    command = [sys.executable, "-m", "mmr5_lab.cli", "serve", "--model", model, "--mode", MODE, "--port", "0",
               "--waiting", "1000", "--documents", "20", "--batch-size", "16"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"running on (http://[\d.:]+)", line):
                break
        drain = ThreadPoolExecutor(1).submit(process.stderr.read)  # a full pipe would stop the server
        try:
            yield found[1]
        finally:
            process.terminate()
            drain.result()


def encoded(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    count = 100 if options.quick else 1000
    model = options.model or "data/mini/base"
    corpus, rng = load_corpus(Path("data/mini/corpus")).split("eval"), random.Random(0)
    questions = corpus.questions.to_dict("records")
    pairs = []
    for i in range(count):
        question = questions[i % len(questions)]
        total = int(corpus.documents.set_index("doc_name").loc[question["doc_name"], "num_pages"])
        pages = rng.sample(range(total), 5)
        pairs.append((question["question"], [corpus.page_image(question["doc_name"], page) for page in pages]))
    expected = [ranking.order for ranking in Reranker.from_pretrained(model).rank_many(pairs, mode=MODE)]
    bodies = [{"query": query, "documents": [{"image": encoded(page)} for page in pages]} for query, pages in pairs]
    faults = {i: FAULTS[i // 7 % len(FAULTS)] for i in range(0, count, 7)}

    with served(model) as address, httpx.Client(timeout=300, limits=httpx.Limits(max_connections=CLIENTS)) as client:

        def ask(i: int, fault: str | None = None):
            body, hurry = bodies[i], {}
            if fault == "broken page":
                body = {**body, "documents": [{"image": "AAAA"}, *body["documents"][1:]]}
            if fault == "too many":
                body = {**body, "documents": body["documents"] * 5}
            if fault == "hangs up":
                hurry = {"timeout": 0.02}
            content = {"content": b"{"} if fault == "no JSON" else {"json": body}
            try:
                answer = client.post(f"{address}/v1/rerank", **content, **hurry)
            except httpx.TimeoutException:
                return None
            return [r["index"] for r in answer.json()["results"]] if answer.status_code == 200 else answer.status_code

        some = [i for i in range(count) if i not in faults][: max(40, count // 10)]
        started = time.perf_counter()
        assert [ask(i) for i in some] == [expected[i] for i in some]
        alone = len(some) / (time.perf_counter() - started)
        started = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(lambda i: ask(i, faults.get(i)), range(count)))
        together = count / (time.perf_counter() - started)
        for i, answer in enumerate(answers):
            if i not in faults:
                assert answer == expected[i], f"request {i}: {answer}, not {expected[i]}"
            elif faults[i] != "hangs up" or answer != expected[i]:  # one that was quick enough is a sound one
                assert answer == EXPECTED[faults[i]], f"request {i} ({faults[i]}): {answer}"
        health = client.get(f"{address}/health").json()
        assert health["waiting"] == 0
    report = Report("Requests to mmr5 serve: one after another, and from many clients at once")
    note = f"{len(faults)} with faults; every answer that of rank_many"
    report.write(f"{count} requests, {CLIENTS} at once", alone, together, "requests/s", note)
    report.finish(options.json)


if __name__ == "__main__":
    main()
