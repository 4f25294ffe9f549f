"""Compare ways to rank by time and recall on the same questions."""

import time
from collections.abc import Mapping

import pandas as pd

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.rankings import Rankings
from mmr5_lab.evaluation.metrics import per_question
from mmr5_lab.evaluation.significance import bootstrap_interval
from mmr5_lab.reranking.ranking import Ranker
from mmr5_lab.reranking.whole_runs import pair_of


def compare_modes(
    ways: Mapping[str, tuple[Ranker, str]], corpus: Corpus, run: Rankings, batch_size: int = 16
) -> pd.DataFrame:
    """Rank the same questions in several ways (a ranker and its mode each) and return what each costs and gives.

    Index: names of `ways`; columns: "seconds a query" (wall time, one way after another), "R@1" with the ends of its
    95 % interval over documents ("low", "high"), "R@3" (both micro), "stability" (mean over queries, where the ranker
    says it).
    """
    corpus = corpus.with_questions(run.pages)
    pairs = [pair_of(corpus, corpus.by_id[question_id], pages) for question_id, pages in run.pages.items()]
    rows = {}
    for name, (ranker, mode) in ways.items():
        started = time.perf_counter()
        rankings = ranker.rank_many(pairs, mode, batch_size)
        seconds = (time.perf_counter() - started) / len(pairs)
        lists = zip(run.pages.items(), rankings, strict=True)
        ranked = {question_id: [pages[k] for k in ranking.order] for (question_id, pages), ranking in lists}
        stable = pd.Series([ranking.stability for ranking in rankings], dtype=float).mean()
        each = per_question(ranked, corpus, (1, 3))
        low, high = bootstrap_interval(each["R@1"].to_numpy(), each["doc_name"])
        rows[name] = {
            "seconds a query": seconds, "R@1": each["R@1"].mean(), "low": low, "high": high, "R@3": each["R@3"].mean(),
            "stability": stable,
        }  # fmt: skip
    return pd.DataFrame(rows).T
