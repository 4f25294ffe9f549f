"""Evaluation of many runs against a plain loop over scores and against ir_measures, the bootstrap, and browsing.

    python benchmarks/evaluate.py [--quick] [--json OUT]

Questions are MMDocIR's 1,658 with its documents' page counts where its annotations are (MMR5_SHARED, or `shared` beside
the repository), else as many invented ones; every page has a random score, some of them equal, the same for all ways.
Recall at 1, 3 and 5, macro and micro. Baselines:

- "scores, as MMDocIR": for each k, pages sorted by score, precision, recall, nDCG, AP and RR of the first k, added up
  for all questions and again by domain: what metric_eval.py of github.com/MMDocRAG/MMDocIR does, written anew. It gets
  lists of floats, ours arrays of the same, which it sorts once.
- "rankings, ir_measures": pytrec_eval through ir_measures, with labels and runs as the dictionaries that it takes; ours
  gets lists of pages, ranked before. It gives micro averages only.

Each way's answers are checked against ours.

Browsing: the reasoning browser over 1,658 invented questions with ten candidates each and pages of 1,000 × 1,294 pixels
on disk (`browse.py`, a process of its own), against what it may take: 2 s until it is drawn (kernel and Chromium
added), 200 ms a switch, 500 MB.
"""

import io
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
from common import Report, arguments, interleaved
from PIL import Image, ImageDraw, ImageFont

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.evaluation.metrics import evaluate_runs, per_question
from mmr5_lab.evaluation.significance import bootstrap_interval, bootstrap_intervals
from mmr5_lab.experiments.runs import project_root

KS = (1, 3, 5)
SAMPLES = 10_000
SHARED = Path(os.environ.get("MMR5_SHARED", project_root().parent / "shared"))


def the_corpus() -> tuple[Any, str]:
    """Documents and questions, and where they are from."""
    if (SHARED / "mmdocir" / "MMDocIR_annotations.jsonl").is_file():
        return load_corpus(SHARED / "mmdocir"), "MMDocIR"
    rng = np.random.default_rng(0)
    documents = pd.DataFrame({"doc_name": [f"{i}.pdf" for i in range(313)], "num_pages": rng.integers(5, 125, 313)})
    pages = dict(documents.itertuples(index=False))
    rows = []
    for i in range(1658):
        name = f"{i % 313}.pdf"
        gold = rng.choice(pages[name], size=min(3, rng.geometric(0.8)), replace=False).tolist()
        rows.append((f"{name}:q{i // 313}", name, f"domain {i % 313 % 10}", gold))
    columns = ["question_id", "doc_name", "domain", "gold_pages"]
    return SimpleNamespace(documents=documents, questions=pd.DataFrame(rows, columns=columns)), "invented"


def random_scores(corpus, runs: int) -> list[list[list[float]]]:
    """Scores of every page of each question's document, by run: floats as models give them, a fifth of them tied."""
    rng = np.random.default_rng(0)
    counts = corpus.questions["doc_name"].map(corpus.documents.set_index("doc_name")["num_pages"])
    return [[np.where(rng.random(n) < 0.2, 0.5, rng.random(n)).tolist() for n in counts] for _ in range(runs)]


def loop(questions: list[tuple[str, list[int]]], scores: list[list[float]]) -> dict[int, tuple[float, float]]:
    """k -> macro and micro recall of one run; every measure is computed twice, for all questions and by domain."""
    averages = {}
    for k in KS:
        sums: dict[str, dict[str, float]] = {}
        counts: dict[str, int] = {}
        for (domain, gold), of_page in zip(questions, scores, strict=True):
            ranked = sorted(enumerate(of_page), key=lambda pair: pair[1], reverse=True)
            top = [page for page, _ in ranked[:k]]
            total = sums.setdefault(domain, dict.fromkeys(ALL, 0.0))
            for name, measure in ALL.items():
                for _ in range(2):
                    value = measure(top, gold)
                total[name] += value
            counts[domain] = counts.get(domain, 0) + 1
        by_domain = [total["recall"] / counts[domain] for domain, total in sums.items()]
        micro = sum(total["recall"] for total in sums.values()) / len(questions)
        averages[k] = (sum(by_domain) / len(by_domain), micro)
    return averages


def recall(top, gold):
    return len(set(top) & set(gold)) / len(gold)


def precision(top, gold):
    return len(set(top) & set(gold)) / len(top)


def ndcg(top, gold):
    best = sum(1 / math.log2(i + 2) for i in range(min(len(top), len(gold))))
    return sum(1 / math.log2(i + 2) for i, page in enumerate(top) if page in gold) / best


def average_precision(top, gold):
    found, total = 0, 0.0
    for i, page in enumerate(top, 1):
        if page in gold:
            found += 1
            total += found / i
    return total / found if found else 0.0


def reciprocal_rank(top, gold):
    return next((1 / i for i, page in enumerate(top, 1) if page in gold), 0.0)


ALL = {
    "recall": recall, "precision": precision, "ndcg": ndcg, "ap": average_precision, "rr": reciprocal_rank
}  # fmt: skip


def averages_of(tables: dict[str, pd.DataFrame]) -> list[dict[int, tuple[float, float]]]:
    return [{k: tuple(table.loc[["macro", "micro"], f"R@{k}"]) for k in KS} for table in tables.values()]


def same(a, b) -> bool:
    return all(np.allclose(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in KS)


def pages_and_run(folder: Path, pages_each: int) -> None:
    """A corpus of the size of MMDocIR's questions, with pages full of words, and a run of ten candidates."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(8):
        page = Image.new("RGB", (1000, 1294), "white")
        draw = ImageDraw.Draw(page)
        for line in range(31):
            words = ("".join(map(chr, rng.integers(97, 123, rng.integers(2, 11)))) for _ in range(22))
            draw.text((60, 40 + 40 * line), " ".join(words)[:70], "black", ImageFont.load_default(15))
        file = io.BytesIO()
        page.save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    questions = [1658 // 313 + (k < 1658 % 313) for k in range(313)]
    annotations = [
        {
            "doc_name": f"{k}.pdf", "domain": f"domain {k % 10}", "questions": [
                {"Q": f"What is said of item {q} in report {k}?", "A": "", "page_id": [int(rng.integers(pages_each))],
                 "type": "['Chart']", "layout_mapping": []} for q in range(questions[k])
            ],
        } for k in range(313)
    ]  # fmt: skip
    names = [annotation["doc_name"] for annotation in annotations for _ in range(pages_each)]
    pages = ({"doc_name": name, "image_binary": images[k % 8]} for k, name in enumerate(names))
    write_corpus(folder, annotations, pages)
    rows = []
    for question in load_corpus(folder).questions["question_id"]:
        candidates = rng.permutation(pages_each)[:10].tolist()
        order = rng.permutation(len(candidates)).tolist()
        think = "\n".join(f"Image {k}: {'it shows a table of other years and measures, ' * 3}" for k in range(1, 11))
        text = f"<think>{think}</think><answer>{[k + 1 for k in order]}</answer>"
        rows.append({"question_id": question, "candidates": candidates, "pages": [candidates[k] for k in order],
                     "text": text, "think": think, "faults": [], "tokens": 400, "seconds": 1.0})  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "run.generations.parquet")


def browsing(report: Report, pages_each: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pages_and_run(Path(folder), pages_each)
        command = [sys.executable, str(Path(__file__).with_name("browse.py")), folder]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    first = found["built"] + (found["drawn"] or 0)
    painted = "no Chromium: kernel only" if found["drawn"] is None else f"of which Chromium {found['drawn']:.2f} s"
    report.write("browser, first paint", 1 / 2, 1 / first, "paints/s", f"{first:.2f} s, {painted}; limit 2 s")
    median, slow = np.quantile(found["switches"], [0.5, 0.99])
    report.write(
        "browser, switching a question", 1 / 0.2, 1000 / slow, "switches/s",
        f"{slow:.0f} ms (99th percentile), {median:.0f} ms (median), thumbnails not made yet; limit 200 ms",
    )  # fmt: skip
    report.write(
        "browser, all questions looked at", 1658 / 500, 1658 / found["memory"], "questions/MB",
        f"{found['memory']:.0f} MB, {found['before']:.0f} MB before the widget; limit 500 MB",
    )  # fmt: skip


def main() -> None:
    given = arguments(__doc__.split("\n")[0])
    corpus, source = the_corpus()
    runs = 20
    rounds = 1 if given.quick else 3
    scores = random_scores(corpus, runs)
    questions = list(zip(corpus.questions["domain"], corpus.questions["gold_pages"], strict=True))
    report = Report(f"Evaluation: {len(questions)} questions ({source}), {runs} runs, recall at {KS}")
    work = runs * len(questions)

    ids = corpus.questions["question_id"].tolist()
    arrays = {str(i): {q: np.array(row) for q, row in zip(ids, run, strict=True)} for i, run in enumerate(scores)}

    def ranked() -> dict[str, dict[str, np.ndarray]]:
        return {name: {q: np.argsort(-row, kind="stable") for q, row in run.items()} for name, run in arrays.items()}

    seconds, results = interleaved(
        {
            "all": lambda: [loop(questions, run) for run in scores],
            "ours": lambda: evaluate_runs(ranked(), corpus, KS),
        },
        rounds,
    )
    assert same(results["all"], averages_of(results["ours"])), "the loop and evaluate_runs disagree"
    report.add("scores, as MMDocIR", seconds["all"], seconds["ours"], work, "questions/s", "same answers")

    rankings = {name: {q: pages.tolist() for q, pages in run.items()} for name, run in ranked().items()}
    gold_pages = dict(zip(corpus.questions["question_id"], corpus.questions["gold_pages"], strict=True))
    qrels = {q: {str(page): 1 for page in gold} for q, gold in gold_pages.items()}
    measures = [ir_measures.R @ k for k in KS]
    theirs = [
        {q: {str(page): -float(rank) for rank, page in enumerate(pages)} for q, pages in run.items()}
        for run in rankings.values()
    ]

    def with_ir_measures() -> list[dict]:
        evaluator = ir_measures.evaluator(measures, qrels)
        return [evaluator.calc_aggregate(run) for run in theirs]

    seconds, results = interleaved(
        {
            "ir_measures": with_ir_measures,
            "ours": lambda: list(evaluate_runs(rankings, corpus, KS).values()),
        },
        rounds,
    )
    for table, expected in zip(results["ours"], results["ir_measures"], strict=True):
        for k, measure in zip(KS, measures, strict=True):
            assert np.isclose(table.loc["micro", f"R@{k}"], expected[measure]), "ir_measures and evaluate disagree"
    report.add("rankings, ir_measures", seconds["ir_measures"], seconds["ours"], work, "questions/s", "same answers")

    few = list(rankings.values())[:10]
    frames = [per_question(run, corpus, (1,)) for run in few]
    figures, documents = [frame["R@1"].to_numpy() for frame in frames], frames[0]["doc_name"]
    seconds, results = interleaved(
        {
            "each": lambda: [bootstrap_interval(row, documents, SAMPLES) for row in figures],
            "together": lambda: bootstrap_intervals(figures, documents, SAMPLES),
        },
        rounds,
    )
    assert np.allclose(results["each"], results["together"]), "the intervals differ"
    took = sorted(seconds["together"])[rounds // 2]
    report.add(
        f"bootstrap of {len(few)} runs, {SAMPLES} samples",
        *seconds.values(),
        len(few) * SAMPLES,
        "samples/s",
        f"{took:.2f} s, against one run at a time; same intervals",
    )
    browsing(report, 12 if given.quick else 16)
    report.finish(given.json)


if __name__ == "__main__":
    main()
