"""A run checked against its corpus, as the ranks of its gold pages, and the measures over them.

All measures of a ranking with right and wrong pages follow from where the right ones stand, so that is all that is
kept: `Labels` is the corpus's side, checked once, `GoldRanks` a run's.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Protocol

import numpy as np
import pandas as pd

Run = Mapping[Any, Sequence[int]]
Scores = Mapping[Any, Sequence[float] | np.ndarray]

_BLOCK = 128  # gold pages ranked at once: larger arrays go back to the system each time, which costs more than the work


class CorpusTables(Protocol):
    """The part of a corpus that metrics read."""

    @property
    def questions(self) -> pd.DataFrame: ...

    @property
    def documents(self) -> pd.DataFrame: ...


@dataclass(frozen=True)
class Labels:
    """A corpus's Q questions and G gold pages as checked arrays.

    ids: question ids; sizes (Q): pages of each one's document; gold (Q): number of gold pages; gold_question,
    gold_page (G): whose and which, questions one after another
    """

    ids: list[Any]
    sizes: np.ndarray
    gold: np.ndarray
    gold_question: np.ndarray
    gold_page: np.ndarray

    @classmethod
    def of(cls, corpus: CorpusTables) -> "Labels":
        """Raises ValueError, naming questions or documents, for a corpus that cannot be evaluated with."""
        questions = corpus.questions
        ids = questions["question_id"].tolist()
        if not ids:
            raise ValueError("the corpus has no questions: there is nothing to evaluate")
        if len(set(ids)) < len(ids):
            repeated = questions["question_id"][questions["question_id"].duplicated()].unique()
            raise ValueError(f"the corpus repeats question ids {first_few(repeated)}: give each question its own")
        num_pages = questions["doc_name"].map(corpus.documents.set_index("doc_name")["num_pages"])
        if num_pages.isna().any():
            lost = questions["doc_name"][num_pages.isna()].unique()
            raise ValueError(f"questions refer to documents that the corpus lacks: {first_few(lost)}")
        sizes = num_pages.to_numpy(dtype=np.int64)
        gold, gold_question, gold_page = _flatten([sorted({int(p) for p in g}) for g in questions["gold_pages"]])
        if not gold.all():
            raise ValueError(f"questions without gold pages: {_where(gold == 0, ids)}; leave them out")
        wrong = (gold_page < 0) | (gold_page >= sizes[gold_question])
        if wrong.any():
            raise ValueError(
                "gold pages that the document does not have: "
                f"{_where_page(wrong, gold_question, gold_page, ids)}; pages are 0-based"
            )
        return cls(ids, sizes, gold, gold_question, gold_page)

    @cached_property
    def known(self) -> set[Any]:
        return set(self.ids)

    @cached_property
    def starts(self) -> np.ndarray:
        """One number a (question, page): where each question's pages start (Q)."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def gold_keys(self) -> np.ndarray:
        return self.starts[self.gold_question] + self.gold_page

    @cached_property
    def is_gold(self) -> np.ndarray:
        mask = np.zeros(int(self.sizes.sum()), dtype=bool)
        mask[self.gold_keys] = True
        return mask

    @cached_property
    def rivals(self) -> np.ndarray:
        """For each gold page the keys of all pages of its question, one gold page after another."""
        sizes = self.sizes[self.gold_question]
        shift = self.starts[self.gold_question] - (np.cumsum(sizes) - sizes)
        return np.arange(sizes.sum()) + np.repeat(shift, sizes)

    @cached_property
    def blocks(self) -> list[tuple[slice, slice]]:
        """Gold pages in blocks, each with the part of `rivals` that is theirs."""
        ends = [0, *np.cumsum(self.sizes[self.gold_question]).tolist()]
        cuts = [*range(0, len(self.gold_page), _BLOCK), len(self.gold_page)]
        return [(slice(a, b), slice(ends[a], ends[b])) for a, b in pairwise(cuts)]

    @cached_property
    def earlier_rivals(self) -> np.ndarray:
        """Which of them stand before the gold page in the document."""
        return self.rivals < np.repeat(self.gold_keys, self.sizes[self.gold_question])

    def in_order(self, run: Mapping[Any, Any]) -> list[Any]:
        """A run's values in the order of the questions, of which it must have each and no other."""
        if not isinstance(run, Mapping):
            raise ValueError(f"a run is {{question: pages}}, as Run.pages is, not a {type(run).__name__}")
        if not len(run):
            raise ValueError("the run is empty: check that it was written, or retrieve again")
        if run.keys() == self.known:
            return [run[q] for q in self.ids]
        if unknown := [q for q in run if q not in self.known]:
            raise ValueError(
                f"the run has questions that the corpus does not know: {first_few(unknown)}; "
                "evaluate it with the corpus it was made from"
            )
        raise ValueError(
            f"the run lacks questions of the corpus: {first_few(q for q in self.ids if q not in run)}; rank them too, "
            "or evaluate against a corpus that holds only the questions that were ranked"
        )


@dataclass(frozen=True)
class GoldRanks:
    """Of the H gold pages that a checked run ranks, whose they are and where they stand.

    lengths, gold (Q): pages ranked and gold pages by question, in the corpus's order; question, rank (H): question
    and 0-based rank of each hit, questions one after another and ranks rising
    """

    lengths: np.ndarray
    gold: np.ndarray
    question: np.ndarray
    rank: np.ndarray

    @classmethod
    def of_run(cls, run: Run, labels: Labels) -> "GoldRanks":
        """Raises ValueError as `metrics.evaluate` says."""
        rankings, ids = labels.in_order(run), labels.ids
        try:
            lengths, question, page = _flatten(rankings)
        except (TypeError, ValueError, OverflowError):
            odd = [q for q, pages in zip(ids, rankings, strict=True) if not _whole_numbers(pages)]
            raise ValueError(
                f"rankings that are not lists of whole page numbers: {first_few(odd)}; a ranking is such as [3, 0, 1]"
            ) from None
        if not lengths.all():
            raise ValueError(
                f"empty rankings: {_where(lengths == 0, ids)}; a ranker must return its candidates, "
                "in their old order if it cannot judge them"
            )
        wrong = (page < 0) | (page >= labels.sizes[question])
        if wrong.any():
            raise ValueError(
                "the run ranks pages that the document does not have: "
                f"{_where_page(wrong, question, page, ids)}; pages are 0-based, and the run must be of this "
                "corpus"
            )
        key = labels.starts[question] + page
        seen = np.bincount(key)
        if seen.max() > 1:
            wrong = seen[key] > 1
            raise ValueError(f"the run repeats pages: {_where_page(wrong, question, page, ids)}; rank each page once")
        hit = np.flatnonzero(labels.is_gold[key])
        rank = hit - (np.cumsum(lengths) - lengths)[question[hit]]
        return cls(lengths, labels.gold, question[hit], rank)

    @classmethod
    def of_scores(cls, scores: Scores, labels: Labels) -> "GoldRanks":
        """From scores of all pages of each question's document, in page order, higher is better.

        A page stands behind all that score more and those before it that score the same: what a stable sort gives,
        as in MMDocIR's evaluation. Raises ValueError, naming the questions, for another number of scores than pages
        and scores that are not finite.
        """
        rows = labels.in_order(scores)
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        if (lengths != labels.sizes).any():
            odd = _where(lengths != labels.sizes, labels.ids)
            raise ValueError(
                f"questions with more or fewer scores than their document has pages: {odd}; score each page"
            )
        flat = np.concatenate([np.asarray(row, dtype=float) for row in rows])
        if not np.isfinite(flat).all():
            owner = np.repeat(np.arange(lengths.size), lengths)
            odd = _where_page(~np.isfinite(flat), owner, np.arange(flat.size) - labels.starts[owner], labels.ids)
            raise ValueError(f"scores that are not finite: {odd}; score these pages again")
        sizes = labels.sizes[labels.gold_question]
        ranks = []
        for golds, part in labels.blocks:
            own = np.repeat(flat[labels.gold_keys[golds]], sizes[golds])
            theirs = flat[labels.rivals[part]]
            before = (theirs > own) | ((theirs == own) & labels.earlier_rivals[part])
            ranks.append(np.add.reduceat(before, np.cumsum(sizes[golds]) - sizes[golds], dtype=np.int64))
        rank = np.concatenate(ranks)
        order = np.lexsort((rank, labels.gold_question))
        return cls(lengths, labels.gold, labels.gold_question, rank[order])

    def hits_above(self, k: int | None) -> np.ndarray:
        """Gold pages among the first k by question (Q); among all for None."""
        return np.bincount(self.question if k is None else self.question[self.rank < k], minlength=len(self.gold))

    def place(self) -> np.ndarray:
        """0-based number of each hit among its question's hits (H)."""
        found = self.hits_above(None)
        return np.arange(len(self.question)) - (np.cumsum(found) - found)[self.question]

    def best_order(self) -> "GoldRanks":
        """The same pages in the best order: gold first."""
        return replace(self, rank=self.place())

    def perfect(self) -> "GoldRanks":
        """All gold pages first, ranked or not."""
        all_gold = replace(self, question=np.repeat(np.arange(len(self.gold)), self.gold))
        return replace(all_gold, rank=all_gold.place())


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
ORDERS: dict[str, Callable[[GoldRanks], GoldRanks]] = {
    "run": lambda ranks: ranks,
    "candidates": GoldRanks.best_order,
    "corpus": GoldRanks.perfect,
}


def measure_columns(ks: Sequence[int], measures: Sequence[str]) -> dict[str, tuple[Measure, int | None]]:
    """Column name -> (measure, its cut-off): a column for each cut-off of R and nDCG, one for RR and AP."""
    cuts = _checked_ks(ks)
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures or len(set(measures)) < len(measures):
        raise ValueError(f"measures is {list(measures)}, expected some of {', '.join(MEASURES)}, each once")
    columns: dict[str, tuple[Measure, int | None]] = {}
    for name in measures:
        if name in ("RR", "AP"):
            columns[name] = (MEASURES[name], None)
        else:
            columns |= {f"{name}@{k}": (MEASURES[name], k) for k in cuts}
    return columns


def _checked_ks(ks: Sequence[int]) -> list[int]:
    checked = [operator.index(k) for k in ks]
    if not checked or min(checked) < 1 or len(set(checked)) < len(checked):
        raise ValueError(f"ks is {list(ks)}, expected distinct cut-offs of at least 1, such as (1, 3, 5)")
    return checked


def _flatten(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths (Q), then of each entry its list's index and its value (P); ValueError if not whole numbers."""
    lengths = np.fromiter((len(x) for x in lists), dtype=np.int64, count=len(lists))
    if all(isinstance(x, np.ndarray) for x in lists):
        values = np.concatenate(lists)
    else:
        values = np.array(list(chain.from_iterable(lists)))
    if values.size == 0:
        values = values.astype(np.int64)
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise ValueError("not whole numbers")
    return lengths, np.repeat(np.arange(len(lists)), lengths), values.astype(np.int64)


def _whole_numbers(pages: Any) -> bool:
    try:
        return all(isinstance(p, int | np.integer) and not isinstance(p, bool) and abs(int(p)) < 2**63 for p in pages)
    except TypeError:
        return False


def first_few(items: Iterable[Any], most: int = 5) -> str:
    """A list for an error message: "q1, q2 and 3 more"."""
    listed = [str(x) for x in items]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _where(mask: np.ndarray, ids: Sequence[Any]) -> str:
    return first_few(ids[i] for i in np.flatnonzero(mask).tolist())


def _where_page(mask: np.ndarray, question: np.ndarray, page: np.ndarray, ids: Sequence[Any]) -> str:
    pairs = dict.fromkeys(zip(question[mask].tolist(), page[mask].tolist(), strict=True))
    return first_few(f"page {p} of question {ids[q]}" for q, p in pairs)
