"""Why a reranker missed: each miss gets one cause, each question its gain or loss, each system its cost.

    outcomes = classify(pd.read_parquet("mm-r5.generations.parquet"), corpus)
    count_outcomes(outcomes, by="domain")
    outcomes.query("outcome == 'inversion'")

Input is what `rerank_run.rerank_run` writes, one row a question.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.evaluation.gold_ranks import first_few
from mmr5_lab.evaluation.metrics import bootstrap_interval, grouped, per_question
from mmr5_lab.prompting.answers import parse_ranking

HIT = "hit"
MISSES = ("ambiguous gold", "candidate miss", "truncation", "fault", "inversion")
NEEDED = ("question_id", "candidates", "pages", "text", "faults")


def classify(generations: pd.DataFrame, corpus: Corpus) -> pd.DataFrame:
    """What became of each question at rank 1; one row a question, in the corpus's order.

    generations: columns `NEEDED` as `rerank_run` writes them (more are ignored)

    "outcome" is "hit" where the page ranked first is gold, else the first of these that holds:

    - "ambiguous gold": the same question, word for word, is asked of this document again, and there this page is gold
      (MMDocIR has such pairs in News): the label is in doubt, not the system;
    - "candidate miss": no candidate is gold, so no order could be right: the retriever's miss;
    - "truncation": the text ended too early, and the first place is not an id that the model wrote first;
    - "fault": likewise, for another fault of the text (`parsing.FAULTS`): the first place is the parser's repair;
    - "inversion": the model put a wrong page before a gold one.

    A faulty text whose first id was read, such as [2, 2, 1], is thus an inversion: the fault did not cost the place.
    Where text and order are not of the same candidates (windows, consensus) a miss with faults counts as theirs.

    Other columns: question_id, doc_name, domain, type, gold (number of gold pages), first (page ranked first),
    faults (tuple), rank (of the best gold page, 1-based, NaN if none is ranked), retriever_rank (the same in the
    candidates' order), and R@1, retriever_R@1, change (R@1 - retriever_R@1: 1 a gain, -1 a loss where one page is
    gold).

    Raises ValueError, naming the questions, for missing columns, no rows, a question twice, scores that are NaN,
    pages that are not the candidates in another order, and runs that do not fit the corpus, as `metrics.evaluate` does.
    """
    rows = _checked(generations)
    reranked = per_question({q: row["pages"] for q, row in rows.items()}, corpus, ks=[1], measures=["R", "RR"])
    retrieved = per_question({q: row["candidates"] for q, row in rows.items()}, corpus, ks=[1], measures=["R", "RR"])
    twins = _twins(corpus)
    frame = reranked[[c for c in ("question_id", "doc_name", "domain", "type", "gold") if c in reranked]].copy()
    in_order = [rows[q] for q in frame["question_id"]]
    frame["outcome"] = [
        _outcome(row, set(gold), twins[doc_name, _words(question)])
        for row, gold, doc_name, question in zip(
            in_order, *(corpus.questions[c] for c in ("gold_pages", "doc_name", "question")), strict=True
        )
    ]
    frame["first"] = [row["pages"][0] for row in in_order]
    frame["faults"] = [tuple(row["faults"]) for row in in_order]
    frame["rank"] = _ranks(reranked["RR"])
    frame["retriever_rank"] = _ranks(retrieved["RR"])
    frame["R@1"], frame["retriever_R@1"] = reranked["R@1"], retrieved["R@1"]
    frame["change"] = frame["R@1"] - frame["retriever_R@1"]
    return frame


def records(generations: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of generations as they were written: lists as lists, and None for what is missing.

    In a table, and the more so in one from a parquet file, lists are arrays and a missing text is NaN.
    """
    rows = generations.astype(object).where(generations.notna(), None).to_dict("records")
    return [{str(k): list(v) if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]


def count_outcomes(outcomes: pd.DataFrame, by: str = "domain") -> pd.DataFrame:
    """Questions of each outcome by "domain", "type" or "gold", a row a group and "all" for every question once.

    Columns: "hit", the misses in the order of `MISSES`, "questions". A question with several types counts in each.
    """
    names = [HIT, *MISSES]
    return _counts(outcomes.assign(**{name: outcomes["outcome"] == name for name in names}), names, by)


def gains_and_losses(outcomes: pd.DataFrame, by: str = "domain") -> pd.DataFrame:
    """Questions that the reranker made better or worse at rank 1 than the retriever, by group, and "all".

    Columns: "gains", "losses", "unchanged", "questions", and "change", the mean of R@1 - retriever_R@1. Query by query
    they are the rows of `classify`: `outcomes[outcomes["change"] < 0]`.
    """
    change = outcomes["change"]
    marked = outcomes.assign(gains=change > 0, losses=change < 0, unchanged=change == 0)
    counts = _counts(marked, ["gains", "losses", "unchanged"], by)
    return counts.assign(change=[*grouped(outcomes, by)["change"].mean(), change.mean()])


def cost(written: Mapping[str, pd.DataFrame], corpus: Corpus, samples: int = 2000) -> pd.DataFrame:
    """What each system's rankings cost and give: tokens and seconds a query, recall@1 (`plots.frontier` draws it).

    written: name -> frame with question_id, pages, tokens, seconds (generations, or `audit.consensus`), all of the same
        questions

    Index: the names; columns "tokens a query", "seconds a query", "R@1" (micro), "low" and "high" (95 %, documents
    resampled; NaN for a single one), "questions". Raises ValueError, naming the system, as `metrics.evaluate`, and for
    no systems.
    """
    if not written:
        raise ValueError("there are no systems: give {name: generations, …}")
    rows = {}
    for name, frame in written.items():
        try:
            part = corpus.with_questions(frame["question_id"])
            figures = per_question(dict(zip(frame["question_id"], map(list, frame["pages"]), strict=True)), part, [1])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        several = len(set(figures["doc_name"])) > 1
        low, high = bootstrap_interval(figures["R@1"], figures["doc_name"], samples) if several else (np.nan, np.nan)
        rows[name] = {
            "tokens a query": frame["tokens"].mean(), "seconds a query": frame["seconds"].mean(),
            "R@1": figures["R@1"].mean(), "low": low, "high": high, "questions": len(frame),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")


def _counts(marked: pd.DataFrame, columns: list[str], by: str) -> pd.DataFrame:
    """How many questions of each group are marked in each column, and how many there are; a last row for all."""
    marked = marked.assign(questions=True)
    table = grouped(marked, by)[[*columns, "questions"]].sum()
    table.loc["all"] = marked[[*columns, "questions"]].sum()
    return table


def _checked(generations: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Rows by question."""
    if missing := [name for name in NEEDED if name not in generations.columns]:
        raise ValueError(
            f"the generations lack the columns {', '.join(missing)}: give the frame that `mmr5 rerank` writes "
            "(….generations.parquet)"
        )
    if generations.empty:
        raise ValueError("the generations are empty: rerank the run first")
    names = generations["question_id"]
    if names.duplicated().any():
        raise ValueError(
            f"the generations hold questions twice: {first_few(names[names.duplicated()])}; keep one row each"
        )
    if "scores" in generations and (unsure := names[generations["scores"].map(_has_nan)]).size:
        raise ValueError(f"scores that are not numbers: {first_few(unsure)}; their order means nothing, rerank them")
    rows = {row["question_id"]: row for row in records(generations[list(NEEDED)])}
    if odd := [q for q, row in rows.items() if sorted(row["pages"]) != sorted(row["candidates"])]:
        raise ValueError(
            f"pages are not the candidates in another order: {first_few(odd)}; rerank these questions again"
        )
    return rows


def _ranks(reciprocal: pd.Series) -> pd.Series:
    return (1 / reciprocal.where(reciprocal > 0)).round()


def _has_nan(scores: list[float] | None) -> bool:
    return scores is not None and bool(np.isnan(scores).any())


def _outcome(row: dict, gold: set[int], gold_of_twins: set[int]) -> str:
    first = row["pages"][0]
    if first in gold:
        return HIT
    if first in gold_of_twins:
        return "ambiguous gold"
    if not gold.intersection(row["candidates"]):
        return "candidate miss"
    if row["faults"] and not _wrote_first(row):
        return "truncation" if "truncated" in row["faults"] else "fault"
    return "inversion"


def _wrote_first(row: dict) -> bool:
    """Is the page ranked first the one whose id the model wrote first?"""
    answer = parse_ranking(row["text"] or "", len(row["candidates"])).answer
    if not answer or not 1 <= answer[0] <= len(row["candidates"]):
        return False
    return row["candidates"][answer[0] - 1] == row["pages"][0]


def _twins(corpus: Corpus) -> dict[tuple[str, str], set[int]]:
    """Gold pages of all questions with the same words in the same document."""
    gold: dict[tuple[str, str], set[int]] = {}
    columns = ["doc_name", "question", "gold_pages"]
    for doc_name, question, pages in corpus.questions[columns].itertuples(index=False):
        gold.setdefault((doc_name, _words(question)), set()).update(pages)
    return gold


def _words(question: str) -> str:
    return " ".join(question.casefold().split())
