"""Check rankings against their corpus and find the ranks of its gold pages; every measure follows from these."""

import math
import operator
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import pandas as pd

PagesByQuestion = Mapping[Any, Sequence[int]]  # question id -> 0-based pages, best first


class CorpusTables(Protocol):
    """The part of a corpus that metrics read."""

    @property
    def questions(self) -> pd.DataFrame: ...

    @property
    def documents(self) -> pd.DataFrame: ...


def gold_ranks(rankings: PagesByQuestion, corpus: CorpusTables) -> tuple[list[list[int]], list[int], list[int]]:
    """Return, for each question in the corpus's order, the 1-based ranks of its gold pages, rising, as far as the
    ranking holds them; the number of its gold pages; and the number of pages ranked.

    Raises ValueError as `metrics.evaluate` says.
    """
    questions, documents = corpus.questions, corpus.documents
    ids, domains = questions["question_id"], questions.get("domain", pd.Series(dtype=str))
    num_pages = questions["doc_name"].map(dict(zip(documents["doc_name"], documents["num_pages"], strict=True)))
    for fault, names in {
        "the corpus repeats question ids": ids[ids.duplicated()],
        "the corpus repeats documents": documents["doc_name"][documents["doc_name"].duplicated()],
        "questions without a domain": ids[domains.isna()] if len(domains) else (),
        "questions refer to documents that the corpus lacks": questions["doc_name"][num_pages.isna()],
    }.items():
        if len(names):
            raise ValueError(f"{fault}: {first_few(dict.fromkeys(names))}")
    if questions.empty:
        raise ValueError("the corpus has no questions: there is nothing to evaluate")
    if not isinstance(rankings, Mapping):
        raise ValueError(f"a run is {{question: pages}}, as Rankings.pages is, not a {type(rankings).__name__}")
    if not rankings:
        raise ValueError("the run is empty: check that it was written, or retrieve again")
    sizes = dict(zip(ids.tolist(), num_pages.astype(int).tolist(), strict=True))
    if unknown := [q for q in rankings if q not in sizes]:
        raise ValueError(
            f"the run has questions that the corpus does not know: {first_few(unknown)}; "
            "evaluate it with the corpus it was made from"
        )
    if missing := [q for q in sizes if q not in rankings]:
        raise ValueError(
            f"the run lacks questions of the corpus: {first_few(missing)}; rank them too, "
            "or evaluate against a corpus that holds only the questions that were ranked"
        )
    gold = _checked_pages(dict(zip(sizes, questions["gold_pages"], strict=True)), sizes, "gold pages")
    ranked = _checked_pages({q: rankings[q] for q in sizes}, sizes, "ranked pages")
    if repeats := [q for q, pages in ranked.items() if len(set(pages)) < len(pages)]:
        some = {q: [p for p in dict.fromkeys(ranked[q]) if ranked[q].count(p) > 1] for q in repeats[:6]}
        raise ValueError(f"the run repeats pages: {_places(some)}; rank each page once")
    wanted = [set(pages) for pages in gold.values()]
    hits = [[r for r, p in enumerate(ranked[q], 1) if p in pages] for q, pages in zip(ranked, wanted, strict=True)]
    return hits, list(map(len, wanted)), list(map(len, ranked.values()))


def _checked_pages(lists: Mapping[Any, Any], sizes: Mapping[Any, int], what: str) -> dict[Any, list[int]]:
    """The lists as plain integers; raises ValueError, naming questions, for what are no pages of their documents."""
    pages: dict[Any, list[int]] = {}
    odd = []
    for question, listed in lists.items():
        try:
            pages[question] = list(map(operator.index, listed))  # a page 2.0 may have been 2.4 somewhere before
        except TypeError:
            odd.append(question)
    if odd:
        raise ValueError(
            f"{what} that are not lists of whole page numbers: {first_few(odd)}; write them such as [3, 0, 1]"
        )
    if empty := [q for q, listed in pages.items() if not listed]:
        raise ValueError(f"questions without {what}: {first_few(empty)}; each needs one at least")
    if wrong := {q: listed for q, listed in pages.items() if min(listed) < 0 or max(listed) >= sizes[q]}:
        beyond = {q: [p for p in listed if not 0 <= p < sizes[q]] for q, listed in wrong.items()}
        from_1 = min(map(min, pages.values())) == 1 and all(max(listed) <= sizes[q] for q, listed in wrong.items())
        raise ValueError(
            f"{what} that the document does not have: {_places(beyond)}; "
            f"{'they seem to count from 1, but ' if from_1 else ''}pages are 0-based, and of this corpus"
        )
    return pages


Measure = Callable[[Sequence[int], int, int], float]  # of ranks of gold pages, number of gold pages, cut-off


def recall(ranks: Sequence[int], gold: int, k: int) -> float:
    """|first k ∩ gold| ÷ |gold|."""
    return bisect(ranks, k) / gold


def ndcg(ranks: Sequence[int], gold: int, k: int) -> float:
    """Σ 1 ÷ log2(1 + rank) over gold pages at ranks up to k, ÷ the same sum for ranks 1 to min(k, |gold|).

    Järvelin and Kekäläinen 2002, https://doi.org/10.1145/582415.582418, gains 0 and 1.
    """
    found, best = (sum(1 / math.log2(1 + r) for r in some[: bisect(some, k)]) for some in (ranks, range(1, gold + 1)))
    return found / best


def reciprocal_rank(ranks: Sequence[int], gold: int, k: int) -> float:
    """1 ÷ rank of the first gold page, 0 without one."""
    return 1 / ranks[0] if ranks else 0.0


def average_precision(ranks: Sequence[int], gold: int, k: int) -> float:
    """Mean over the gold pages of the precision at each one's rank, 0 for one that is not ranked."""
    return sum(number / rank for number, rank in enumerate(ranks, 1)) / gold


# as trec_eval's users write them; R and nDCG have cut-offs
MEASURES: dict[str, Measure] = {"R": recall, "nDCG": ndcg, "RR": reciprocal_rank, "AP": average_precision}


def measure_columns(ks: Sequence[int], measures: Sequence[str]) -> dict[str, tuple[Measure, int]]:
    """Column name -> (measure, its cut-off): a column for each cut-off of R and nDCG, one for RR and AP (0: none)."""
    cuts = [operator.index(k) for k in ks]
    if not cuts or min(cuts) < 1 or len(set(cuts)) < len(cuts):
        raise ValueError(f"ks is {list(ks)}, expected distinct cut-offs of at least 1, such as (1, 3, 5)")
    if not measures or not set(measures) <= set(MEASURES) or len(set(measures)) < len(measures):
        raise ValueError(f"measures is {list(measures)}, expected some of {', '.join(MEASURES)}, each once")
    columns: dict[str, tuple[Measure, int]] = {}
    for name in measures:
        if name in ("RR", "AP"):
            columns[name] = (MEASURES[name], 0)
        else:
            columns |= {f"{name}@{k}": (MEASURES[name], k) for k in cuts}
    return columns


def first_few(items: Iterable[Any], most: int = 5) -> str:
    """A list for an error message: "q1, q2 and 3 more"."""
    listed = [str(x) for x in items]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _places(pages: Mapping[Any, Iterable[int]]) -> str:
    return first_few(f"page {page} of question {question}" for question, some in pages.items() for page in some)
