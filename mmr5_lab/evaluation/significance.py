"""Is a difference more than chance? Intervals, a test of pairs and a correction for many tests, by document."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmr5_lab.evaluation.gold_ranks import first_few


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
        codes, _ = _cluster_codes(clusters, differences.size)
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

    (NaN, NaN) for a single cluster: nothing varies. Raises ValueError for different lengths, no values, values that
    are not finite, samples < 1, or a level outside (0, 1).
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
    codes, number = _cluster_codes(clusters, figures.shape[1])
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples is {samples} and level {level}, expected samples >= 1 and 0 < level < 1")
    if number < 2:
        return np.full((len(figures), 2), np.nan)
    totals = np.stack([np.bincount(codes, weights=row) for row in (*figures, np.ones(codes.size))], axis=1)
    rng = np.random.default_rng(seed)
    even = np.full(number, 1 / number)
    rows = max(1, 2_000_000 // number)  # bounds memory at some 32 MB
    drawn = np.concatenate([
        rng.multinomial(number, even, size=min(rows, samples - start)).astype(float) @ totals
        for start in range(0, samples, rows)
    ])  # fmt: skip
    means = drawn[:, :-1] / drawn[:, -1:]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of m p-values, in the order given: reject where the result is below the level.

    The i-th smallest (i = 1 …) is multiplied by m - i + 1, made at least as large as the one before, and cut at 1;
    this bounds the chance of any false rejection whatever the tests' dependence. Source: Holm 1979, "A simple
    sequentially rejective multiple test procedure", https://www.jstor.org/stable/4615733.

        >>> holm([0.25, 0.125, 0.5])
        [0.5, 0.375, 0.5]
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must lie within 0 and 1: {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(p.size)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted.tolist()


def _checked_values(name: str, values: Any) -> np.ndarray:
    figures = np.asarray(values, dtype=float)
    if figures.ndim != 1 or figures.size == 0:
        raise ValueError(f"{name} has shape {figures.shape}, expected one figure a question")
    if not np.isfinite(figures).all():
        bad = np.flatnonzero(~np.isfinite(figures))
        raise ValueError(f"{name} holds values that are not finite, at positions {first_few(bad)}")
    return figures


def _cluster_codes(clusters: Any, size: int) -> tuple[np.ndarray, int]:
    """Number of each value's cluster (Q), and how many clusters there are."""
    codes, labels = pd.factorize(np.asarray(clusters), use_na_sentinel=False)
    if codes.size != size:
        raise ValueError(f"{size} values but {codes.size} cluster labels: give one a question")
    return codes, len(labels)
