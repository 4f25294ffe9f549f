"""Rankings to figures: recall and other measures by question and domain, ceilings, and statistics to compare runs.

A run is `{question_id: [page, …]}`: 0-based pages of the question's own document, best first. A corpus is
anything with two tables, `questions` (question_id, doc_name, domain, type, gold_pages, …) and `documents`
(doc_name, num_pages), as `mmr5_lab.corpus.load_corpus` gives them.

    from mmr5_lab.metrics import evaluate
    print(evaluate(run, corpus))

Definitions are MMDocIR's (arXiv 2501.08828, page-level retrieval; the figures of arXiv 2506.12364 use them):
recall@k of a question is the share of its gold pages among the first k, micro is the mean over questions,
macro the mean over domains of each domain's mean. Nothing is averaged away: a run that does not fit its
corpus is a ValueError that names the questions.

Ties. A run is an order, so it has none: whoever makes one decides. Here equal scores stand in page order
(`retrieve`), in a TREC run in the order of the written ranks (`read_trec`), and `write_trec` lowers equal scores so
that trec_eval, which sorts by score alone and equal ones by name, sees the same order.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import pandas as pd

# In MMDocIR this domain is one document with 137 questions, so one document is a tenth of every macro figure.
NEWS = "News"
SUMMARY_ROWS = ("macro", "macro_ex_news", "micro", "ceiling_macro", "ceiling_micro")
MEASURES = ("R", "nDCG", "RR", "AP")  # as trec_eval's users write them

Run = Mapping[Any, Sequence[int]]


class CorpusTables(Protocol):
    """The part of a corpus that metrics read."""

    @property
    def questions(self) -> pd.DataFrame: ...

    @property
    def documents(self) -> pd.DataFrame: ...


def recall_at_k(ranking: Sequence[int], gold: Iterable[int], k: int) -> float:
    """|first k of ranking ∩ gold| ÷ |gold|, MMDocIR's page recall, in [0, 1].

    `gold` is read as a set. A ranking shorter than k is not padded. With |gold| > k no ranking reaches 1.
    Raises ValueError for empty gold, k < 1, and a ranking that repeats a page: a repeat is a fault of the
    ranker, and counting it once would quietly reward or punish it.

        >>> recall_at_k([4, 0, 2], gold=[2, 7], k=3)
        0.5
    """
    wanted = set(gold)
    pages = list(ranking)
    if not wanted:
        raise ValueError("gold is empty: recall is undefined for a question without gold pages")
    if operator.index(k) < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if len(set(pages)) < len(pages):
        raise ValueError(f"the ranking repeats pages {sorted({p for p in pages if pages.count(p) > 1})}")
    return len(wanted.intersection(pages[:k])) / len(wanted)


def evaluate(
    run: Run, corpus: CorpusTables, ks: Sequence[int] = (1, 3, 5), measures: Sequence[str] = ("R",)
) -> pd.DataFrame:
    """The result table of one run: recall@k by domain, averaged in three ways, beside what can be reached.

    measures: of `MEASURES`, see `per_question`; the mean of RR is called MRR, that of AP is MAP

    Rows (index "domain"): the corpus's domains in its own order, then "macro", "macro_ex_news" (macro without
    the domain "News"; NaN if there is no other), "micro", and "ceiling_macro" and "ceiling_micro": the best
    order of all pages, min(k, |gold|) ÷ |gold| by question, averaged likewise. Columns: "R@k" for each k, as
    shares, other measures as asked, and last "questions", how many stand behind the row.

    Raises ValueError, naming the questions and what to do, for an empty run, questions missing from the run
    or unknown to the corpus, an empty ranking, pages that the document does not have, repeated pages and
    pages that are not whole numbers; likewise for a corpus whose gold pages are missing or do not exist.
    """
    columns = measure_columns(ks, measures)
    ranked = _Ranked.build(run, corpus)
    frame = _labels(corpus)
    return _table(_measured(frame, ranked, columns), list(columns), _measured(frame, ranked.perfect(), columns))


def candidate_ceiling(
    run: Run, corpus: CorpusTables, ks: Sequence[int] = (1, 3, 5), measures: Sequence[str] = ("R",)
) -> pd.DataFrame:
    """What the best order of each question's own candidates would reach: the ceiling of a reranker.

    For recall, min(k, |gold ∩ candidates|) ÷ |gold| by question, in the rows of `evaluate` up to "micro". Raises
    like it.
    """
    columns = measure_columns(ks, measures)
    best = _Ranked.build(run, corpus).best_order()
    return _table(_measured(_labels(corpus), best, columns), list(columns))


def breakdown(
    run: Run, corpus: CorpusTables, by: str = "type", ks: Sequence[int] = (1, 3, 5), measures: Sequence[str] = ("R",)
) -> pd.DataFrame:
    """Means over groups of questions, each measure beside both of its ceilings.

    by: "domain", "type", or "gold" (number of gold pages). A question with several types counts in each of them, one
        without a type in "(none)".

    Rows: the groups (of "gold" rising, else in the corpus's order), then "all", every question once. Columns: for each
    measure its mean, "… candidates" (the best order of the run's own pages) and "… all pages" (the best order of the
    document), and "questions". Raises like `evaluate`, and for another `by`.
    """
    columns = measure_columns(ks, measures)
    ranked = _Ranked.build(run, corpus)
    frame = _measured(_labels(corpus), ranked, columns)
    frame["gold"] = ranked.gold
    for suffix, ceiling in ((" candidates", ranked.best_order()), (" all pages", ranked.perfect())):
        frame = _measured(frame, ceiling, {name + suffix: measure for name, measure in columns.items()})
    figures = [name + suffix for name in columns for suffix in ("", " candidates", " all pages")]
    groups = grouped(frame, by)
    everything = frame[figures].mean().to_frame("all").T
    table = pd.concat([groups[figures].mean(), everything]).rename_axis(by)
    table["questions"] = [*groups.size(), len(frame)]
    return table.rename(columns=_mean_names)


def grouped(frame: pd.DataFrame, by: str) -> Any:
    """A frame of questions grouped by "domain", "type" (a row for each of a question's types) or "gold" (a number)."""
    if by not in ("domain", "type", "gold") or by not in frame.columns:
        raise ValueError(f"cannot group questions by {by!r}: choose domain, type or gold, and a corpus that has it")
    if by == "type":
        kinds = frame["type"].map(lambda types: [types] if isinstance(types, str) else list(types) or ["(none)"])
        frame = frame.assign(type=kinds).explode("type")
    return frame.groupby(by, sort=by == "gold")


def per_question(
    run: Run,
    corpus: CorpusTables,
    ks: Sequence[int] = (1, 3, 5),
    measures: Sequence[str] = ("R",),
    order: str = "run",
) -> pd.DataFrame:
    """One row a question, in the corpus's order; raises like `evaluate`.

    order: what is measured: "run", the run as it is; "candidates", the best order of its pages; "corpus", the best
        order of all pages

    Columns: question_id, doc_name, domain, type (if the corpus has it), gold (number of gold pages),
    candidates (length of the ranking), gold_in_candidates, then "R@k" and "ceiling@k" for each k, and other measures:

    - "nDCG@k": Σ 1 ÷ log2(1 + rank) over gold pages at ranks up to k, ÷ the same sum for ranks 1 to min(k, |gold|)
      (Järvelin and Kekäläinen 2002, https://doi.org/10.1145/582415.582418, gains 0 and 1);
    - "RR": 1 ÷ rank of the first gold page, 0 without one; its mean is MRR;
    - "AP": over the gold pages, the mean of the precision at each one's rank, 0 for one that is not ranked; its mean
      is MAP. (MMDocIR's code divides by the gold pages found instead, which rewards leaving the others out.)

    RR and AP see the whole ranking. All are trec_eval's definitions.
    """
    columns = measure_columns(ks, measures)
    if order not in _ORDERS:
        raise ValueError(f"unknown order {order!r}: choose one of {', '.join(_ORDERS)}")
    ranked = _Ranked.build(run, corpus)
    frame = _labels(corpus)
    frame["gold"] = ranked.gold
    frame["candidates"] = ranked.lengths
    frame["gold_in_candidates"] = ranked.hits_above(None)
    frame = _measured(frame, _ORDERS[order](ranked), columns)
    for k in ks:
        frame[f"ceiling@{k}"] = np.minimum(k, ranked.gold) / ranked.gold
    return frame


def measure_columns(ks: Sequence[int], measures: Sequence[str]) -> "dict[str, tuple[Measure, int | None]]":
    """Column name -> (measure, its cut-off): a column for each cut-off of R and nDCG, one for RR and AP."""
    cuts = _checked_ks(ks)
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures or len(set(measures)) < len(measures):
        raise ValueError(f"measures is {list(measures)}, expected some of {', '.join(MEASURES)}, each once")
    columns: dict[str, tuple[Measure, int | None]] = {}
    for name in measures:
        if name in ("RR", "AP"):
            columns[name] = (_MEASURES[name], None)
        else:
            columns |= {f"{name}@{k}": (_MEASURES[name], k) for k in cuts}
    return columns


def paired_randomisation_test(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    samples: int = 10_000,
    seed: int = 0,
    clusters: Sequence[Any] | np.ndarray | pd.Series | None = None,
) -> float:
    """Two-sided p of the hypothesis that two systems differ only by chance, from figures by question.

    a and b (Q values each, same questions in the same order) are swapped within each question by fair coins,
    `samples` times; p = (1 + times that |mean difference| is at least the observed) ÷ (1 + samples). The
    added ones keep p above 0 (Davison and Hinkley 1997). Source: Smucker, Allan and Carterette 2007, "A
    comparison of statistical significance tests for information retrieval evaluation",
    https://doi.org/10.1145/1321440.1321528.

    clusters (Q labels, such as doc_name): one coin for all questions of a cluster, since questions of one document
    are not independent and a coin for each finds too many differences. Without it they are taken as independent.

    Raises ValueError for different lengths, no values, values that are not finite, or samples < 1.
    """
    left, right = _checked_values("a", a), _checked_values("b", b)
    if left.shape != right.shape:
        raise ValueError(f"a has {left.size} values and b has {right.size}: pair them by question first")
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    differences = left - right
    if clusters is not None:
        codes, _ = _checked_clusters(clusters, differences.size)
        differences = np.bincount(codes, weights=differences)
    differences = differences[np.abs(differences) > 1e-12]  # a swap of equal figures changes nothing
    if differences.size == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    # Recall has few distinct values, so exact ties with the observed sum are common: round-off must not
    # decide them.
    observed = abs(differences.sum()) - 1e-9
    at_least = 0
    rows = max(1, 2_000_000 // differences.size)  # bounds memory at some 16 MB
    for start in range(0, samples, rows):
        kept = rng.random((min(rows, samples - start), differences.size), dtype=np.float32) < 0.5
        # Σ ±d = 2 Σ kept d − Σ d
        sums = 2 * (kept @ differences) - differences.sum()
        at_least += int(np.count_nonzero(np.abs(sums) >= observed))
    return (1 + at_least) / (1 + samples)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | pd.Series,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean over questions, resampling whole documents.

    values: Q figures by question; clusters: Q labels (doc_name). Questions of one document are not
    independent, so documents are drawn with replacement, each with all its questions, and the mean is taken
    over the questions drawn. Source: Davison and Hinkley 1997, Bootstrap Methods and their Application, 3.8.

    Raises ValueError for different lengths, no values, values that are not finite, fewer than two clusters
    (nothing varies), samples < 1, or a level outside (0, 1).
    """
    [(low, high)] = bootstrap_intervals([values], clusters, samples, seed, level)
    return float(low), float(high)


def bootstrap_intervals(
    values: Sequence[Sequence[float] | np.ndarray] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | pd.Series,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> np.ndarray:
    """`bootstrap_interval` of S systems on the same draws of documents: values (S, Q), result (S, 2)."""
    figures = np.stack([_checked_values("values", row) for row in values])
    codes, labels = _checked_clusters(clusters, figures.shape[1])
    if len(labels) < 2:
        raise ValueError(f"all values belong to one cluster ({labels[0]}): an interval needs at least two")
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples is {samples} and level {level}, expected samples >= 1 and 0 < level < 1")
    totals = np.stack([np.bincount(codes, weights=row) for row in (*figures, np.ones(codes.size))], axis=1)
    rng = np.random.default_rng(seed)
    even = np.full(len(labels), 1 / len(labels))
    rows = max(1, 2_000_000 // len(labels))  # bounds memory at some 32 MB
    drawn = np.concatenate([
        rng.multinomial(len(labels), even, size=min(rows, samples - start)).astype(float) @ totals
        for start in range(0, samples, rows)
    ])  # fmt: skip
    means = drawn[:, :-1] / drawn[:, -1:]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


@dataclass(frozen=True)
class _Ranked:
    """A checked run as flat arrays: of its H gold pages that are ranked, whose they are and where they stand.

    lengths, gold (Q): pages ranked and gold pages by question, in the corpus's order; question, rank (H): question
    and 0-based rank of each hit, questions one after another and ranks rising.
    """

    lengths: np.ndarray
    gold: np.ndarray
    question: np.ndarray
    rank: np.ndarray

    def hits_above(self, k: int | None) -> np.ndarray:
        """Gold pages among the first k by question (Q); among all for None."""
        return np.bincount(self.question if k is None else self.question[self.rank < k], minlength=len(self.gold))

    def place(self) -> np.ndarray:
        """0-based number of each hit among its question's hits (H)."""
        found = self.hits_above(None)
        return np.arange(len(self.question)) - (np.cumsum(found) - found)[self.question]

    def best_order(self) -> "_Ranked":
        """The same pages in the best order: gold first."""
        return replace(self, rank=self.place())

    def perfect(self) -> "_Ranked":
        """All gold pages first, ranked or not."""
        all_gold = replace(self, question=np.repeat(np.arange(len(self.gold)), self.gold))
        return replace(all_gold, rank=all_gold.place())

    @classmethod
    def build(cls, run: Run, corpus: CorpusTables) -> "_Ranked":
        questions = corpus.questions
        ids = questions["question_id"].tolist()
        if not ids:
            raise ValueError("the corpus has no questions: there is nothing to evaluate")
        if not len(run):
            raise ValueError("the run is empty: check that it was written, or retrieve again")
        known = set(ids)
        if len(known) < len(ids):
            repeated = questions["question_id"][questions["question_id"].duplicated()].unique()
            raise ValueError(f"the corpus repeats question ids {first_few(repeated)}: give each question its own")
        if unknown := [q for q in run if q not in known]:
            raise ValueError(
                f"the run has questions that the corpus does not know: {first_few(unknown)}; "
                "evaluate it with the corpus it was made from"
            )
        if missing := [q for q in ids if q not in run]:
            raise ValueError(
                f"the run lacks questions of the corpus: {first_few(missing)}; rank them too, "
                "or evaluate against a corpus that holds only the questions that were ranked"
            )
        num_pages = questions["doc_name"].map(corpus.documents.set_index("doc_name")["num_pages"])
        if num_pages.isna().any():
            lost = questions["doc_name"][num_pages.isna()].unique()
            raise ValueError(f"questions refer to documents that the corpus lacks: {first_few(lost)}")
        sizes = num_pages.to_numpy(dtype=np.int64)

        golds = [sorted({int(p) for p in pages}) for pages in questions["gold_pages"]]
        gold, gold_question, gold_page = _flatten(golds)
        if not gold.all():
            raise ValueError(f"questions without gold pages: {_where(gold == 0, ids)}; leave them out")
        wrong = (gold_page < 0) | (gold_page >= sizes[gold_question])
        if wrong.any():
            raise ValueError(
                "gold pages that the document does not have: "
                f"{_where_page(wrong, gold_question, gold_page, ids)}; pages are 0-based"
            )

        rankings = [run[q] for q in ids]
        try:
            lengths, question, page = _flatten(rankings)
        except (TypeError, ValueError, OverflowError):
            odd = [q for q, pages in zip(ids, rankings, strict=True) if not _whole_numbers(pages)]
            raise ValueError(f"rankings that are not lists of whole page numbers: {first_few(odd)}") from None
        if not lengths.all():
            raise ValueError(
                f"empty rankings: {_where(lengths == 0, ids)}; a ranker must return its candidates, "
                "in their old order if it cannot judge them"
            )
        wrong = (page < 0) | (page >= sizes[question])
        if wrong.any():
            raise ValueError(
                "the run ranks pages that the document does not have: "
                f"{_where_page(wrong, question, page, ids)}; pages are 0-based, and the run must be of this "
                "corpus"
            )

        # One number a (question, page): page numbers start where those of the question before end.
        offsets = np.cumsum(sizes) - sizes
        key, gold_key = offsets[question] + page, offsets[gold_question] + gold_page
        seen = np.bincount(key, minlength=int(sizes.sum()))
        if seen.max() > 1:
            wrong = seen[key] > 1
            raise ValueError(f"the run repeats pages: {_where_page(wrong, question, page, ids)}; rank each page once")
        is_gold = np.zeros(seen.size, dtype=bool)
        is_gold[gold_key] = True
        rank = np.arange(page.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        hit = is_gold[key]
        return cls(lengths, gold, question[hit], rank[hit])


Measure = Callable[[_Ranked, int | None], np.ndarray]


def _recall(ranked: _Ranked, k: int | None) -> np.ndarray:
    return ranked.hits_above(k) / ranked.gold


def _ndcg(ranked: _Ranked, k: int | None) -> np.ndarray:
    gains = _gains(ranked, k)
    return gains / _gains(ranked.perfect(), k)


def _gains(ranked: _Ranked, k: int | None) -> np.ndarray:
    gain = 1 / np.log2(ranked.rank + 2)
    if k is not None:
        gain[ranked.rank >= k] = 0
    return np.bincount(ranked.question, gain, len(ranked.gold))


def _reciprocal_rank(ranked: _Ranked, k: int | None) -> np.ndarray:
    first = ranked.place() == 0
    return np.bincount(ranked.question[first], 1 / (ranked.rank[first] + 1), len(ranked.gold))


def _average_precision(ranked: _Ranked, k: int | None) -> np.ndarray:
    precision = (ranked.place() + 1) / (ranked.rank + 1)
    return np.bincount(ranked.question, precision, len(ranked.gold)) / ranked.gold


_ORDERS: dict[str, Callable[[_Ranked], _Ranked]] = {
    "run": lambda ranked: ranked,
    "candidates": _Ranked.best_order,
    "corpus": _Ranked.perfect,
}
_MEASURES: dict[str, Measure] = {"R": _recall, "nDCG": _ndcg, "RR": _reciprocal_rank, "AP": _average_precision}


def _labels(corpus: CorpusTables) -> pd.DataFrame:
    """Who a question is: question_id, doc_name, domain and, where the corpus has it, type."""
    kept = [c for c in ("question_id", "doc_name", "domain", "type") if c in corpus.questions.columns]
    return corpus.questions[kept].reset_index(drop=True)


def _measured(frame: pd.DataFrame, ranked: _Ranked, columns: Mapping[str, tuple[Measure, int | None]]) -> pd.DataFrame:
    return frame.assign(**{name: measure(ranked, k) for name, (measure, k) in columns.items()})


def _flatten(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths (Q), then of each entry its list's index and its value (P); ValueError if not whole numbers."""
    lengths = np.fromiter((len(x) for x in lists), dtype=np.int64, count=len(lists))
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


def _table(frame: pd.DataFrame, columns: Sequence[str], ceiling: pd.DataFrame | None = None) -> pd.DataFrame:
    """Average a frame of questions, and one of their ceilings, into the rows that `evaluate` documents."""
    if clash := sorted(set(frame["domain"].dropna()) & set(SUMMARY_ROWS)):
        raise ValueError(f"domains named like summary rows: {clash}; rename them in the corpus")
    if frame["domain"].isna().any():
        raise ValueError(f"questions without a domain: {first_few(frame['question_id'][frame['domain'].isna()])}")
    groups = frame.groupby("domain", sort=False)
    domains = groups[list(columns)].mean()
    counts = groups.size()
    ex_news = domains.index != NEWS
    rows = {
        "macro": (domains.mean(), len(frame)),
        "macro_ex_news": (domains[ex_news].mean(), int(counts[ex_news].sum())),
        "micro": (frame[columns].mean(), len(frame)),
    }
    if ceiling is not None:
        best = ceiling.groupby("domain", sort=False)[list(columns)].mean()
        rows["ceiling_macro"] = (best.mean(), len(frame))
        rows["ceiling_micro"] = (ceiling[columns].mean(), len(frame))
    summary = pd.DataFrame({name: figures for name, (figures, _) in rows.items()}).T
    table = pd.concat([domains, summary])
    table["questions"] = [*counts, *(count for _, count in rows.values())]
    table.index.name = "domain"
    return table.rename(columns=_mean_names)


def _mean_names(column: str) -> str:
    """The mean of RR is called MRR, that of AP is called MAP."""
    return f"M{column}" if column.split()[0] in ("RR", "AP") else column


def _checked_ks(ks: Sequence[int]) -> list[int]:
    checked = [operator.index(k) for k in ks]
    if not checked or min(checked) < 1 or len(set(checked)) < len(checked):
        raise ValueError(f"ks is {list(ks)}, expected distinct cut-offs of at least 1, such as (1, 3, 5)")
    return checked


def _checked_values(name: str, values: Any) -> np.ndarray:
    figures = np.asarray(values, dtype=float)
    if figures.ndim != 1 or figures.size == 0:
        raise ValueError(f"{name} has shape {figures.shape}, expected one figure a question")
    if not np.isfinite(figures).all():
        bad = np.flatnonzero(~np.isfinite(figures))
        raise ValueError(f"{name} holds values that are not finite, at positions {first_few(bad)}")
    return figures


def _checked_clusters(clusters: Any, size: int) -> tuple[np.ndarray, Any]:
    """Code of each value's cluster (Q), and the labels that codes stand for."""
    codes, labels = pd.factorize(np.asarray(clusters), use_na_sentinel=False)
    if codes.size != size:
        raise ValueError(f"{size} values but {codes.size} cluster labels: give one a question")
    return codes, labels


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
