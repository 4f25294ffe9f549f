"""Check rankings against their corpus and find the ranks of its gold pages; every measure follows from these."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import pandas as pd

PagesByQuestion = Mapping[Any, Sequence[int]]  # question id -> 0-based pages, best first


class CorpusTables(Protocol):
    """The part of a corpus that metrics read."""

    @property
    def questions(self) -> pd.DataFrame: ...

    @property
    def documents(self) -> pd.DataFrame: ...


@dataclass(frozen=True)
class Labels:
    """A corpus's Q questions, checked.

    ids: question ids; sizes (Q): number of pages of each one's document; gold (Q): number of gold pages;
    starts (Q): where each question's pages start when those of all questions stand in one row; is_gold: that row
    """

    ids: list[Any]
    sizes: np.ndarray
    gold: np.ndarray
    starts: np.ndarray
    is_gold: np.ndarray

    @classmethod
    def of(cls, corpus: CorpusTables) -> "Labels":
        """Raises ValueError, naming questions or documents, for a corpus that cannot be evaluated with."""
        questions, documents = corpus.questions, corpus.documents
        ids = questions["question_id"].tolist()
        if not ids:
            raise ValueError("the corpus has no questions: there is nothing to evaluate")
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"the corpus repeats question ids {_repeated(questions['question_id'])}: give each question its own"
            )
        if documents["doc_name"].duplicated().any():
            raise ValueError(f"the corpus repeats documents: {_repeated(documents['doc_name'])}; keep one row each")
        if "domain" in questions and (lacking := questions["domain"].isna()).any():
            raise ValueError(f"questions without a domain: {first_few(questions['question_id'][lacking])}")
        num_pages = questions["doc_name"].map(documents.set_index("doc_name")["num_pages"])
        if num_pages.isna().any():
            lost = questions["doc_name"][num_pages.isna()].unique()
            raise ValueError(f"questions refer to documents that the corpus lacks: {first_few(lost)}")
        sizes = num_pages.to_numpy(dtype=np.int64)
        gold, question, page = _flat(questions["gold_pages"].tolist(), ids, "gold pages")
        if not gold.all():
            raise ValueError(f"questions without gold pages: {_where(gold == 0, ids)}; leave them out")
        if (wrong := (page < 0) | (page >= sizes[question])).any():
            raise ValueError(
                f"gold pages that the document does not have: {_where_page(wrong, question, page, ids)}; "
                f"{_first_page(page, sizes[question])}"
            )
        starts = np.cumsum(sizes) - sizes
        is_gold = np.zeros(int(sizes.sum()), dtype=bool)
        is_gold[starts[question] + page] = True
        return cls(ids, sizes, np.add.reduceat(is_gold, starts, dtype=np.int64), starts, is_gold)

    def in_order(self, rankings: PagesByQuestion) -> list[Sequence[int]]:
        """Return the rankings in the order of the questions. Raises ValueError unless each question has one."""
        if not isinstance(rankings, Mapping):
            raise ValueError(f"a run is {{question: pages}}, as Rankings.pages is, not a {type(rankings).__name__}")
        if not len(rankings):
            raise ValueError("the run is empty: check that it was written, or retrieve again")
        known = set(self.ids)
        if unknown := [q for q in rankings if q not in known]:
            raise ValueError(
                f"the run has questions that the corpus does not know: {first_few(unknown)}; "
                "evaluate it with the corpus it was made from"
            )
        if missing := [q for q in self.ids if q not in rankings]:
            raise ValueError(
                f"the run lacks questions of the corpus: {first_few(missing)}; rank them too, "
                "or evaluate against a corpus that holds only the questions that were ranked"
            )
        return [rankings[q] for q in self.ids]


@dataclass(frozen=True)
class GoldRanks:
    """The ranks of the H gold pages that rankings hold.

    candidates, gold (Q): number of pages ranked and of gold pages by question, in the corpus's order; question, rank
    (H): question and 0-based rank of each hit, questions one after another and ranks rising
    """

    candidates: np.ndarray
    gold: np.ndarray
    question: np.ndarray
    rank: np.ndarray

    @classmethod
    def of(cls, rankings: PagesByQuestion, labels: Labels) -> "GoldRanks":
        """Raises ValueError as `metrics.evaluate` says."""
        ids = labels.ids
        candidates, question, page = _flat(labels.in_order(rankings), ids, "rankings")
        if not candidates.all():
            raise ValueError(
                f"empty rankings: {_where(candidates == 0, ids)}; a ranker must return its candidates, "
                "in their old order if it cannot judge them"
            )
        if (wrong := (page < 0) | (page >= labels.sizes[question])).any():
            raise ValueError(
                "the run ranks pages that the document does not have: "
                f"{_where_page(wrong, question, page, ids)}; {_first_page(page, labels.sizes[question])}, "
                "and the run must be of this corpus"
            )
        key = labels.starts[question] + page
        if (wrong := np.bincount(key)[key] > 1).any():
            raise ValueError(f"the run repeats pages: {_where_page(wrong, question, page, ids)}; rank each page once")
        hit = np.flatnonzero(labels.is_gold[key])
        rank = hit - (np.cumsum(candidates) - candidates)[question[hit]]
        return cls(candidates, labels.gold, question[hit], rank)

    def hits_above(self, k: int | None) -> np.ndarray:
        """Return the number of gold pages among the first k by question (Q); among all for None."""
        return np.bincount(self.question if k is None else self.question[self.rank < k], minlength=len(self.gold))

    def place(self) -> np.ndarray:
        """Return the 0-based number of each hit among its question's hits (H)."""
        hits = self.hits_above(None)
        return np.arange(len(self.question)) - (np.cumsum(hits) - hits)[self.question]

    def best_order(self) -> "GoldRanks":
        """Return the ranks of the same pages in their best order: gold first."""
        return replace(self, rank=self.place())

    def perfect(self) -> "GoldRanks":
        """Return the ranks with all gold pages first, ranked or not."""
        return replace(self, question=np.repeat(np.arange(len(self.gold)), self.gold)).best_order()


Measure = Callable[[GoldRanks, int | None], np.ndarray]


def recall(ranks: GoldRanks, k: int | None) -> np.ndarray:
    """|first k ∩ gold| ÷ |gold| by question (Q)."""
    return ranks.hits_above(k) / ranks.gold


def ndcg(ranks: GoldRanks, k: int | None) -> np.ndarray:
    """Σ 1 ÷ log2(1 + rank) over gold pages at ranks up to k, ÷ the same sum for ranks 1 to min(k, |gold|).

    Järvelin and Kekäläinen 2002, https://doi.org/10.1145/582415.582418, gains 0 and 1.
    """
    return _gains(ranks, k) / _gains(ranks.perfect(), k)


def reciprocal_rank(ranks: GoldRanks, k: int | None) -> np.ndarray:
    """1 ÷ rank of the first gold page, 0 without one."""
    first = ranks.place() == 0
    return np.bincount(ranks.question[first], 1 / (ranks.rank[first] + 1), len(ranks.gold))


def average_precision(ranks: GoldRanks, k: int | None) -> np.ndarray:
    """Mean over the gold pages of the precision at each one's rank, 0 for one that is not ranked."""
    precision = (ranks.place() + 1) / (ranks.rank + 1)
    return np.bincount(ranks.question, precision, len(ranks.gold)) / ranks.gold


def _gains(ranks: GoldRanks, k: int | None) -> np.ndarray:
    gain = 1 / np.log2(ranks.rank + 2)
    if k is not None:
        gain[ranks.rank >= k] = 0
    return np.bincount(ranks.question, gain, len(ranks.gold))


# as trec_eval's users write them; R and nDCG have cut-offs
MEASURES: dict[str, Measure] = {"R": recall, "nDCG": ndcg, "RR": reciprocal_rank, "AP": average_precision}


def measure_columns(ks: Sequence[int], measures: Sequence[str]) -> dict[str, tuple[Measure, int | None]]:
    """Column name -> (measure, its cut-off): a column for each cut-off of R and nDCG, one for RR and AP."""
    cuts = [operator.index(k) for k in ks]
    if not cuts or min(cuts) < 1 or len(set(cuts)) < len(cuts):
        raise ValueError(f"ks is {list(ks)}, expected distinct cut-offs of at least 1, such as (1, 3, 5)")
    if not measures or not set(measures) <= set(MEASURES) or len(set(measures)) < len(measures):
        raise ValueError(f"measures is {list(measures)}, expected some of {', '.join(MEASURES)}, each once")
    columns: dict[str, tuple[Measure, int | None]] = {}
    for name in measures:
        if name in ("RR", "AP"):
            columns[name] = (MEASURES[name], None)
        else:
            columns |= {f"{name}@{k}": (MEASURES[name], k) for k in cuts}
    return columns


def _flat(lists: Sequence[Sequence[int]], ids: Sequence[Any], what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lengths of lists (Q), then of each entry its list's index and its value (P)."""
    try:
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        arrays = all(isinstance(x, np.ndarray) for x in lists)
        values = np.concatenate(lists) if arrays else np.array(list(chain.from_iterable(lists)))
        if values.size and (values.dtype.kind not in "iu" or values.ndim != 1):
            raise ValueError  # numpy makes floats of mixed lists, and a page 2.0 may have been 2.4 somewhere before
        return lengths, np.repeat(np.arange(len(lists)), lengths), values.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        odd = [q for q, pages in zip(ids, lists, strict=True) if not _whole_numbers(pages)]
        raise ValueError(
            f"{what} that are not lists of whole page numbers: {first_few(odd)}; write them such as [3, 0, 1]"
        ) from None


def _whole_numbers(pages: Any) -> bool:
    try:
        return all(isinstance(p, int | np.integer) and not isinstance(p, bool) and abs(int(p)) < 2**63 for p in pages)
    except TypeError:
        return False


def _first_page(pages: np.ndarray, sizes: np.ndarray) -> str:
    """What is probably wrong with pages of which some do not exist."""
    counts_from_1 = pages.min() == 1 and (pages - sizes).max() == 0
    return "they seem to count from 1, but pages are 0-based" if counts_from_1 else "pages are 0-based"


def first_few(items: Iterable[Any], most: int = 5) -> str:
    """A list for an error message: "q1, q2 and 3 more"."""
    listed = [str(x) for x in items]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _repeated(names: pd.Series) -> str:
    return first_few(names[names.duplicated()].unique())


def _where(mask: np.ndarray, ids: Sequence[Any]) -> str:
    return first_few(ids[i] for i in np.flatnonzero(mask).tolist())


def _where_page(mask: np.ndarray, question: np.ndarray, page: np.ndarray, ids: Sequence[Any]) -> str:
    pairs = dict.fromkeys(zip(question[mask].tolist(), page[mask].tolist(), strict=True))
    return first_few(f"page {p} of question {ids[q]}" for q, p in pairs)
