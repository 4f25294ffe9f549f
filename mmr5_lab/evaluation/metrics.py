"""Rankings to figures: recall and other measures by question and domain, ceilings, and statistics to compare runs.

A run is `{question_id: [page, …]}`: 0-based pages of the question's own document, best first. A corpus is
anything with two tables, `questions` (question_id, doc_name, domain, type, gold_pages, …) and `documents`
(doc_name, num_pages), as `mmr5_lab.corpus.documents.load_corpus` gives them.

    from mmr5_lab import evaluate
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmr5_lab.evaluation.gold_ranks import (
    ORDERS,
    CorpusTables,
    GoldRanks,
    Labels,
    Measure,
    Run,
    first_few,
    measure_columns,
)

# In MMDocIR this domain is one document with 137 questions, so one document is a tenth of every macro figure.
NEWS = "News"
SUMMARY_ROWS = ("macro", "macro_ex_news", "micro", "ceiling_macro", "ceiling_micro")


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

    measures: of `gold_ranks.MEASURES`, see `per_question`; the mean of RR is called MRR, that of AP is MAP

    Rows (index "domain"): the corpus's domains in its own order, then "macro", "macro_ex_news" (macro without
    the domain "News"; NaN if there is no other), "micro", and "ceiling_macro" and "ceiling_micro": the best
    order of all pages, min(k, |gold|) ÷ |gold| by question, averaged likewise. Columns: "R@k" for each k, as
    shares, other measures as asked, and last "questions", how many stand behind the row.

    Raises ValueError, naming the questions and what to do, for an empty run, questions missing from the run
    or unknown to the corpus, an empty ranking, pages that the document does not have, repeated pages and
    pages that are not whole numbers; likewise for a corpus whose gold pages are missing or do not exist.
    """
    return evaluate_runs({"": run}, corpus, ks, measures)[""]


def evaluate_runs(
    runs: Mapping[str, Mapping[Any, Any]],
    corpus: CorpusTables,
    ks: Sequence[int] = (1, 3, 5),
    measures: Sequence[str] = ("R",),
    scored: bool = False,
) -> dict[str, pd.DataFrame]:
    """`evaluate` of many runs: name -> table; the corpus is checked and prepared once.

    scored: the runs hold scores instead of rankings: of every page of the question's document, in page order, higher
        is better; equal scores count in page order (`gold_ranks.GoldRanks.of_scores`)

    Raises ValueError as `evaluate`, naming the run, and for scores that are not finite or not one a page.
    """
    columns = measure_columns(ks, measures)
    labels = Labels.of(corpus)
    domains = _Domains.of(corpus)
    ceiling = None
    tables = {}
    for name, run in runs.items():
        try:
            ranks = (GoldRanks.of_scores if scored else GoldRanks.of_run)(run, labels)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from None
        if ceiling is None:
            ceiling = _figures(ranks.perfect(), columns)
        tables[name] = domains.table(_figures(ranks, columns), list(columns), ceiling)
    return tables


def candidate_ceiling(
    run: Run, corpus: CorpusTables, ks: Sequence[int] = (1, 3, 5), measures: Sequence[str] = ("R",)
) -> pd.DataFrame:
    """What the best order of each question's own candidates would reach: the ceiling of a reranker.

    For recall, min(k, |gold ∩ candidates|) ÷ |gold| by question, in the rows of `evaluate` up to "micro". Raises
    like it.
    """
    columns = measure_columns(ks, measures)
    best = GoldRanks.of_run(run, Labels.of(corpus)).best_order()
    return _Domains.of(corpus).table(_figures(best, columns), list(columns))


def breakdown(
    run: Run,
    corpus: CorpusTables,
    by: str = "type",
    ks: Sequence[int] = (1, 3, 5),
    measures: Sequence[str] = ("R",),
    samples: int = 0,
) -> pd.DataFrame:
    """Means over groups of questions, each measure beside both of its ceilings.

    by: "domain", "type", or "gold" (number of gold pages). A question with several types counts in each of them, one
        without a type in "(none)".
    samples: of the bootstrap over documents; 0: no intervals

    Rows: the groups (of "gold" rising, else in the corpus's order), then "all", every question once. Columns: for each
    measure its mean, "… candidates" (the best order of the run's own pages) and "… all pages" (the best order of the
    document), and "questions"; with `samples` also "… low" and "… high", the mean's 95 % interval (NaN where a group is
    of one document). Raises like `evaluate`, and for another `by`.
    """
    columns = measure_columns(ks, measures)
    ranks = GoldRanks.of_run(run, Labels.of(corpus))
    frame = _measured(_labels(corpus), ranks, columns)
    frame["gold"] = ranks.gold
    for suffix, ceiling in ((" candidates", ranks.best_order()), (" all pages", ranks.perfect())):
        frame = _measured(frame, ceiling, {name + suffix: measure for name, measure in columns.items()})
    figures = [name + suffix for name in columns for suffix in ("", " candidates", " all pages")]
    groups = grouped(frame, by)
    everything = frame[figures].mean().to_frame("all").T
    table = pd.concat([groups[figures].mean(), everything]).rename_axis(by)
    table["questions"] = [*groups.size(), len(frame)]
    if samples:
        table[[f"{name} {end}" for name in columns for end in ("low", "high")]] = np.nan
        for group, part in [*groups, ("all", frame)]:
            for name in columns if len(set(part["doc_name"])) > 1 else ():
                ends = bootstrap_interval(part[name], part["doc_name"], samples)
                table.loc[group, [f"{name} low", f"{name} high"]] = ends
    return table.rename(columns=_mean_name)


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

    - "nDCG@k": normalised discounted cumulative gain of the first k;
    - "RR": 1 ÷ rank of the first gold page; its mean is MRR;
    - "AP": precision at the gold pages' ranks, averaged over all of them; its mean is MAP. (MMDocIR's code divides by
      the gold pages found instead, which rewards leaving the others out.)

    RR and AP see the whole ranking. All are trec_eval's definitions; the formulas are in
    `gold_ranks`.
    """
    columns = measure_columns(ks, measures)
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: choose one of {', '.join(ORDERS)}")
    ranks = GoldRanks.of_run(run, Labels.of(corpus))
    frame = _labels(corpus)
    frame["gold"] = ranks.gold
    frame["candidates"] = ranks.lengths
    frame["gold_in_candidates"] = ranks.hits_above(None)
    frame = _measured(frame, ORDERS[order](ranks), columns)
    for k in ks:
        frame[f"ceiling@{k}"] = np.minimum(k, ranks.gold) / ranks.gold
    return frame


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
class _Domains:
    """Which of the D domains each of Q questions is of."""

    names: list[str]
    codes: np.ndarray
    rows: pd.Index

    @classmethod
    def of(cls, corpus: CorpusTables) -> "_Domains":
        questions = corpus.questions
        if (lacking := questions["domain"].isna()).any():
            raise ValueError(f"questions without a domain: {first_few(questions['question_id'][lacking])}")
        codes, names = pd.factorize(questions["domain"])
        if clash := sorted(set(names) & set(SUMMARY_ROWS)):
            raise ValueError(f"domains named like summary rows: {clash}; rename them in the corpus")
        return cls(list(names), codes, pd.Index([*names, *SUMMARY_ROWS], name="domain"))

    def table(self, figures: np.ndarray, columns: list[str], ceiling: np.ndarray | None = None) -> pd.DataFrame:
        """Average figures (Q, C), and those of their ceilings, into the rows that `evaluate` documents."""
        counts = np.bincount(self.codes)
        means = self._means(figures)
        others = np.array([name != NEWS for name in self.names])
        ex_news = means[others].mean(axis=0) if others.any() else np.full(len(columns), np.nan)
        total = len(self.codes)
        rows = [*means, means.mean(axis=0), ex_news, figures.mean(axis=0)]
        questions = [*counts, total, counts[others].sum(), total]
        if ceiling is not None:
            rows += [self._means(ceiling).mean(axis=0), ceiling.mean(axis=0)]
            questions += [total, total]
        table = pd.DataFrame(np.stack(rows), self.rows[: len(rows)], [_mean_name(column) for column in columns])
        table["questions"] = questions
        return table

    def _means(self, figures: np.ndarray) -> np.ndarray:
        """Mean of each domain (D, C)."""
        sums = np.stack([np.bincount(self.codes, column) for column in figures.T], axis=1)
        return sums / np.bincount(self.codes)[:, None]


def _figures(ranks: GoldRanks, columns: Mapping[str, tuple[Measure, int | None]]) -> np.ndarray:
    """Each column's measure by question (Q, C)."""
    return np.stack([measure(ranks, k) for measure, k in columns.values()], axis=1)


def _labels(corpus: CorpusTables) -> pd.DataFrame:
    """Who a question is: question_id, doc_name, domain and, where the corpus has it, type."""
    kept = [c for c in ("question_id", "doc_name", "domain", "type") if c in corpus.questions.columns]
    return corpus.questions[kept].reset_index(drop=True)


def _measured(frame: pd.DataFrame, ranks: GoldRanks, columns: Mapping[str, tuple[Measure, int | None]]) -> pd.DataFrame:
    return frame.assign(**{name: measure(ranks, k) for name, (measure, k) in columns.items()})


def _mean_name(column: str) -> str:
    """The mean of RR is called MRR, that of AP is called MAP."""
    return f"M{column}" if column.split()[0] in ("RR", "AP") else column


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
