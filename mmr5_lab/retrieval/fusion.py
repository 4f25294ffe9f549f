"""Fuse the rankings of several retrievers into one: `mmr5 fuse corpus bm25.trec colqwen.trec --out both.trec`."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import Rankings, read_trec, write_trec

K = 60  # of reciprocal rank fusion, as published


def fuse(runs: Sequence[Rankings], weights: Sequence[float] | None = None, top_k: int | None = None) -> Rankings:
    """Return each question's pages by Σ weight ÷ (60 + rank) over the runs that rank them, equal sums in page order.

    Reciprocal rank fusion (Cormack et al. 2009, https://doi.org/10.1145/1571941.1572114). Only ranks count, so that
    scores of different scales need no comparison. weights: one a run; None: 1 each

    Raises ValueError for no runs and for weights that are not one positive number a run.
    """
    weights = [1.0] * len(runs) if weights is None else list(weights)
    if not runs or len(weights) != len(runs) or min(weights) <= 0:
        raise ValueError(f"{len(runs)} runs and the weights {weights}: give one weight above 0 for each run")
    sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for run, weight in zip(runs, weights, strict=True):
        for question, pages in run.pages.items():
            for rank, page in enumerate(pages, 1):
                sums[question][page] += weight / (K + rank)
    ordered = {q: sorted(of.items(), key=lambda item: (-item[1], item[0]))[:top_k] for q, of in sums.items()}
    return Rankings(
        {question: [page for page, _ in items] for question, items in ordered.items()},
        {question: [score for _, score in items] for question, items in ordered.items()},
    )


def fuse_files(
    corpus: str | Path,
    runs: Sequence[str],
    out: str | Path,
    *,
    weights: Sequence[float] | None,
    top_k: int,
    split: str | None,
) -> str:
    """Write the fusion of TREC files to the file `out`, and return what it holds as a line of text."""
    part = load_corpus(corpus, split)
    fused = fuse([read_trec(run, part) for run in runs], weights, top_k)
    write_trec(fused, part, out, tag="rrf")
    return f"{out}: {len(fused.pages)} questions, up to {top_k} pages each"
