"""Table 2 of the paper on the miniature: each retriever's ten pages, before and after a reranker.

    python benchmarks/retrievers.py runs/03_grpo/*/model [--questions N]

The retrievers are BM25 and those in data/mini/retrievers; the models (SFT + RL, one a seed) rank ten candidates in
windows of five, for which they were trained, from the back to the front, greedily. Seeds are averaged question by
question, then whole documents are resampled and swapped (`mmr5_lab.evaluation.comparison`).
"""

import argparse
from pathlib import Path

import pandas as pd

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.evaluation.comparison import compare
from mmr5_lab.mini.retrievers import STEPS
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.strategies import Windows
from mmr5_lab.reranking.whole_runs import rerank_run
from mmr5_lab.retrieval.retrieve import retrieve

SHOWN = ["seeds", "macro R@1", "micro R@1", "micro R@3", "micro R@5", "sd", "low", "high", "difference", "p Holm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--corpus", default="data/mini/corpus")
    parser.add_argument("--split", default="eval")
    parser.add_argument("--retrievers", type=Path, default=Path("data/mini/retrievers"))
    parser.add_argument("--methods", nargs="+", default=["bm25", *STEPS])
    parser.add_argument("--questions", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/retrievers"), help="for rankings; a stopped run goes on")
    given = parser.parse_args()
    corpus = load_corpus(given.corpus, given.split)
    corpus = corpus.with_questions(corpus.questions["question_id"][: given.questions])
    rerankers = {str(m): Windows(Reranker.from_pretrained(m, max_new_tokens=220), 5, 3) for m in given.models}
    for method in given.methods:
        weights = {} if method == "bm25" else {"model": given.retrievers / method, "batch_size": 32}
        first = retrieve(corpus, method, 10, **weights)
        reranked = []
        for k, (model, reranker) in enumerate(rerankers.items()):
            frame = rerank_run(reranker, corpus, first, given.out / method, f"model {k}", settings={"model": model})
            reranked.append(dict(zip(frame["question_id"], frame["pages"], strict=True)))
        table = compare({method: first.pages, f"{method} + SFT + RL": reranked}, corpus, baseline=method)
        with pd.option_context("display.width", 200, "display.max_columns", None, "display.precision", 3):
            print(table[[name for name in SHOWN if name in table]].to_string(), flush=True)


if __name__ == "__main__":
    main()
