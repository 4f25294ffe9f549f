"""Why a reranker missed: one cause for each miss, gains and losses by question, and the cost of each system.

    outcomes = classify(pd.read_parquet("mm-r5.generations.parquet"), corpus)
    count_outcomes(outcomes, by="domain")
    outcomes.query("outcome == 'inversion'")

The input is the table that `reranking.whole_runs.rerank_run` writes, one row a question.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.evaluation.gold_ranks import first_few
from mmr5_lab.evaluation.metrics import grouped, per_question
from mmr5_lab.evaluation.significance import bootstrap_interval
from mmr5_lab.prompting.answers import parse_ranking

HIT = "hit"
MISSES = ("ambiguous gold", "candidate miss", "truncation", "fault", "inversion")
NEEDED = ("question_id", "candidates", "pages", "text", "faults")


def classify(generations: pd.DataFrame, corpus: Corpus) -> pd.DataFrame:
    """Return the outcome of each question at rank 1; one row a question, in the corpus's order.

    generations: columns `NEEDED` as `rerank_run` writes them (more are ignored)

    "outcome" is "hit" where the page ranked first is gold, else the first of these that holds:

    - "ambiguous gold": the same question, word for word, is asked of this document again, and there this page is gold
      (MMDocIR has such pairs in News): the label is in doubt, not the system;
    - "candidate miss": no candidate is gold, so no order could be right: the retriever's miss;
    - "truncation": the text ended too early, and the first place is not an id that the model wrote first;
    - "fault": likewise, for another fault of the text (`answers.FAULTS`): the first place is the parser's repair;
    - "inversion": the model put a wrong page before a gold one.

    A faulty text whose first id was read, such as [2, 2, 1], is thus an inversion: the fault did not cost the place.
    Where text and order are not of the same candidates (windows, consensus) a miss with faults counts as theirs.

    Other columns: question_id, doc_name, domain, type, gold (number of gold pages), first (page ranked first),
    faults (tuple), rank (of the best gold page, 1-based, NaN if none is ranked), retriever_rank (the same in the
    candidates' order), and R@1, retriever_R@1, change (R@1 - retriever_R@1: 1 a gain, -1 a loss where one page is
    gold).

    Raises ValueError, naming the questions, for missing columns, no rows, a question twice, rows without pages,
    pages that are not the candidates in another order, and as `metrics.evaluate`.
    """
    rows = _checked(generations)
    reranked, retrieved = (
        per_question({q: row[column] for q, row in rows.items()}, corpus, ks=[1], measures=["R", "RR"])
        for column in ("pages", "candidates")
    )
    asked_again = _gold_by_words(corpus)
    frame = reranked[["question_id", "doc_name", "domain", "type", "gold"]].copy()
    in_order = [rows[q] for q in frame["question_id"]]
    texts = zip(in_order, *(corpus.questions[c] for c in ("gold_pages", "doc_name", "question")), strict=True)
    frame["outcome"] = [
        _outcome(row, set(gold), asked_again[doc_name, _words(question)]) for row, gold, doc_name, question in texts
    ]
    frame["first"] = [row["pages"][0] for row in in_order]
    frame["faults"] = [tuple(row["faults"] or ()) for row in in_order]
    for before, figures in (("", reranked), ("retriever_", retrieved)):
        frame[f"{before}rank"] = (1 / figures["RR"].where(figures["RR"] > 0)).round()
        frame[f"{before}R@1"] = figures["R@1"]
    frame["change"] = frame["R@1"] - frame["retriever_R@1"]
    return frame


def pages_by_question(frame: pd.DataFrame) -> dict[str, list[int]]:
    """Return {question_id: pages} of a frame with one row a question.

    Raises ValueError, naming questions, where one has two rows (a dictionary would keep the last in silence) or no
    pages.
    """
    names = frame["question_id"]
    if names.duplicated().any():
        raise ValueError(f"these rows hold questions twice: {first_few(names[names.duplicated()])}; keep one row each")
    if (lacking := frame["pages"].isna()).any():
        raise ValueError(f"rows without pages: {first_few(names[lacking])}; rank these questions again")
    return dict(zip(names, map(list, frame["pages"]), strict=True))


def records(generations: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows of generations as they were written: lists as lists, and None for what is missing.

    In a table, and the more so in one from a parquet file, lists are arrays and a missing text is NaN.
    """
    rows = generations.astype(object).where(generations.notna(), None).to_dict("records")
    return [{str(k): list(v) if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]


def count_outcomes(outcomes: pd.DataFrame, by: str = "domain") -> pd.DataFrame:
    """Count questions of each outcome by "domain", "type" or "gold": a row a group, and "all" for every question once.

    Columns: "hit", the misses in the order of `MISSES`, "questions". A question with several types counts in each.
    """
    return _counts(outcomes, {name: outcomes["outcome"] == name for name in (HIT, *MISSES)}, by)


def gains_and_losses(outcomes: pd.DataFrame, by: str = "domain") -> pd.DataFrame:
    """Count questions that the reranker made better or worse at rank 1 than the retriever, by group, and "all".

    Columns: "gains", "losses", "unchanged", "questions", and "change", the mean of R@1 - retriever_R@1. Query by query
    they are the rows of `classify`: `outcomes[outcomes["change"] < 0]`.
    """
    change = outcomes["change"]
    counts = _counts(outcomes, {"gains": change > 0, "losses": change < 0, "unchanged": change == 0}, by)
    return counts.assign(change=[*grouped(outcomes, by)["change"].mean(), change.mean()])


def _counts(outcomes: pd.DataFrame, marks: dict[str, pd.Series], by: str) -> pd.DataFrame:
    """How many questions of each group have a mark, and how many there are; a last row for all."""
    marked = outcomes.assign(**marks, questions=True)
    table = grouped(marked, by)[[*marks, "questions"]].sum()
    table.loc["all"] = marked[[*marks, "questions"]].sum()
    return table


def cost(written: Mapping[str, pd.DataFrame], corpus: Corpus, samples: int = 2000) -> pd.DataFrame:
    """Return what each system's rankings cost and give: tokens and seconds a query, recall@1 (see `plots.frontier`).

    written: name -> frame with question_id, pages, tokens, seconds (generations, or `robustness.consensus`)

    Index: the names; columns "tokens a query", "seconds a query", "R@1" (micro), "low" and "high" (95 %, documents
    resampled; NaN for a single one), "questions". Raises ValueError, naming the system, as `metrics.evaluate`, for
    tokens or seconds that are missing, and for systems that did not rank the same questions.
    """
    if not written:
        raise ValueError("there are no systems: give {name: generations, …}")
    corpus = corpus.with_questions(next(iter(written.values()))["question_id"])
    rows = {}
    for name, frame in written.items():
        try:
            figures = per_question(pages_by_question(frame), corpus, [1])
            if (lacking := frame[["tokens", "seconds"]].isna().any(axis=1)).any():
                raise ValueError(
                    f"no tokens or seconds for {first_few(frame['question_id'][lacking])}; rank them again"
                )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        ends = bootstrap_interval(figures["R@1"], figures["doc_name"], samples)
        rows[name] = (*frame[["tokens", "seconds"]].mean(), figures["R@1"].mean(), *ends, len(frame))
    columns = ["tokens a query", "seconds a query", "R@1", "low", "high", "questions"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("system")


def _checked(generations: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Rows by question."""
    if missing := [name for name in NEEDED if name not in generations.columns]:
        raise ValueError(
            f"the generations lack the columns {', '.join(missing)}: give the frame that `mmr5 rerank` writes "
            "(….generations.parquet)"
        )
    if generations.empty:
        raise ValueError("the generations are empty: rerank the run first")
    pages_by_question(generations)
    rows = {row["question_id"]: row for row in records(generations[list(NEEDED)])}
    if odd := [q for q, row in rows.items() if sorted(row["pages"]) != sorted(row["candidates"])]:
        raise ValueError(
            f"pages are not the candidates in another order: {first_few(odd)}; rerank these questions again"
        )
    return rows


def _outcome(row: dict, gold: set[int], gold_elsewhere: set[int]) -> str:
    first = row["pages"][0]
    if first in gold:
        return HIT
    if first in gold_elsewhere:
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


def _gold_by_words(corpus: Corpus) -> dict[tuple[str, str], set[int]]:
    """Gold pages of all questions with the same words in the same document."""
    gold: dict[tuple[str, str], set[int]] = {}
    columns = ["doc_name", "question", "gold_pages"]
    for doc_name, question, pages in corpus.questions[columns].itertuples(index=False):
        gold.setdefault((doc_name, _words(question)), set()).update(pages)
    return gold


def _words(question: str) -> str:
    return " ".join(question.casefold().split())
