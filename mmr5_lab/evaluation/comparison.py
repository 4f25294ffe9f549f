"""Systems side by side, as a paper shows them: recall, intervals, differences to a baseline and corrected p-values.

    table = compare({"ColQwen": colqwen, "MM-R5": [seed_0, seed_1, seed_2]}, corpus, baseline="ColQwen")
    print(to_latex(table))

Statistics are those of `metrics`; `holm` corrects for many tests.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmr5_lab.evaluation.gold_ranks import MEASURES, CorpusTables, Run, measure_columns
from mmr5_lab.evaluation.metrics import NEWS, bootstrap_intervals, paired_randomisation_test, per_question
from mmr5_lab.html import html_table, latex_table


def compare(
    runs: Mapping[str, Run | Sequence[Run]],
    corpus: CorpusTables,
    baseline: str | None = None,
    *,
    ks: Sequence[int] = (1, 3, 5),
    measure: str = "R@1",
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """The table that a paper needs: one row a system, in the order given.

    runs: name -> run (`gold_ranks.Run`), or a list of runs with different seeds, whose figures are averaged question by
        question before anything else
    baseline: the system that others are tested against; default: the first
    measure: what intervals and tests are of: its micro mean. "R@1", "nDCG@3" …, "RR" or "AP"

    Columns, as shares:

    - "seeds"; "macro R@k", "macro_ex_news R@k" (where the corpus has that domain), "micro R@k"; "micro" of the measure
      if it is another;
    - "candidate ceiling" and "corpus ceiling": micro mean of the measure for the best order of the system's own pages,
      and of all pages;
    - "sd": standard deviation over seeds of the measure's micro mean, NaN for one;
    - "low", "high": its interval over documents (`metrics.bootstrap_intervals`);
    - "difference", "difference low", "difference high": system - baseline on the same questions, and its interval;
    - "p": paired randomisation of whole documents, "p Holm": the same after Holm's correction for all tests of the
      table. The baseline's are NaN.

    Seeds are averaged, so intervals and p-values are of the questions' variation; that of training shows in "sd".

    Raises ValueError as `metrics.per_question`, naming system and seed; for no systems, a system without runs or an
    unknown baseline or measure; and as `metrics.bootstrap_interval`.
    """
    if not runs:
        raise ValueError("there are no runs to compare: give {name: run, …}")
    first = next(iter(runs)) if baseline is None else baseline
    if first not in runs:
        raise ValueError(f"the baseline {first!r} is not among the systems: {', '.join(map(repr, runs))}")
    known = measure_columns(ks, list(MEASURES))
    if measure not in known:
        raise ValueError(f"unknown measure {measure!r}: choose one of {', '.join(known)}")
    seeds = {name: _seeds(name, given) for name, given in runs.items()}
    asked = (corpus, ks, list(dict.fromkeys(["R", measure.split("@")[0]])))
    measured = {name: _measured(name, its_runs, *asked) for name, its_runs in seeds.items()}
    rows = {name: _row(frames, ks, measure) for name, frames in measured.items()}
    for name, its_runs in seeds.items():
        best = [per_question(run, *asked, order="candidates")[measure].mean() for run in its_runs]
        perfect = per_question(its_runs[0], *asked, order="corpus")[measure].mean()
        rows[name] |= {"candidate ceiling": float(np.mean(best)), "corpus ceiling": float(perfect)}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")

    figures = {name: np.mean([frame[measure] for frame in frames], axis=0) for name, frames in measured.items()}
    documents = measured[first][0]["doc_name"]
    table[["low", "high"]] = bootstrap_intervals(list(figures.values()), documents, samples, seed, level)
    others = [name for name in runs if name != first]
    table[["difference", "difference low", "difference high", "p", "p Holm"]] = np.nan
    if others:
        differences = [figures[name] - figures[first] for name in others]
        table.loc[others, "difference"] = np.mean(differences, axis=1)
        intervals = bootstrap_intervals(differences, documents, samples, seed, level)
        table.loc[others, ["difference low", "difference high"]] = intervals
        p = [paired_randomisation_test(figures[name], figures[first], samples, seed, documents) for name in others]
        table.loc[others, "p"], table.loc[others, "p Holm"] = p, holm(p)
    table.attrs["note"] = (
        f"{len(documents)} questions of {documents.nunique()} documents. Intervals ({level:.0%}) and tests: micro "
        f"{measure}, documents resampled and swapped, {samples} samples; differences to {first}; p after Holm's "
        f"correction for {len(others)} test{'s' * (len(others) != 1)}."
    )
    return table


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


def to_html(table: pd.DataFrame, digits: int = 3) -> str:
    """What `compare` returned as an HTML table for people: intervals beside their figures, names escaped."""
    return html_table(presented(table, digits), table.attrs.get("note", ""))


def to_latex(table: pd.DataFrame, digits: int = 3) -> str:
    """What `compare` returned as a LaTeX table (package booktabs), names escaped."""
    return latex_table(presented(table, digits), table.attrs.get("note", ""))


def presented(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """The table as texts: figures rounded, "[low, high]" in one column, signed differences, Holm's p only."""
    averages = [name for name in table.columns if name.startswith(("macro ", "macro_ex_news ", "micro "))]
    shown = pd.DataFrame(index=table.index)
    if (table["seeds"] > 1).any():
        shown["seeds"] = table["seeds"].map(str)
        shown["sd"] = _rounded(table["sd"], digits)
    for name in [*averages, "candidate ceiling", "corpus ceiling"]:
        shown[name.replace("macro_ex_news", "macro ex News")] = _rounded(table[name], digits)
    shown["interval"] = _interval(table["low"], table["high"], digits)
    shown["difference"] = _rounded(table["difference"], digits, "+")
    shown["its interval"] = _interval(table["difference low"], table["difference high"], digits)
    shown["p"] = _rounded(table["p Holm"], max(digits, 4))
    return shown


def _seeds(name: str, given: Run | Sequence[Run]) -> list[Run]:
    """The runs of a system."""
    seeds: list[Any] = [given] if isinstance(given, Mapping) else list(given) if isinstance(given, Sequence) else [None]
    if not seeds or not all(isinstance(run, Mapping) for run in seeds):
        raise ValueError(f"system {name!r} is not a run or a list of runs: give {{question: pages}}, as Run.pages is")
    return seeds


def _measured(
    name: str, seeds: Sequence[Run], corpus: CorpusTables, ks: Sequence[int], measures: Sequence[str]
) -> list[pd.DataFrame]:
    """`per_question` of each seed; its errors name the system and seed."""
    frames = []
    for number, run in enumerate(seeds):
        try:
            frames.append(per_question(run, corpus, ks, measures))
        except ValueError as error:
            raise ValueError(f"system {name!r}{f', seed {number}' * (len(seeds) > 1)}: {error}") from None
    return frames


def _row(frames: Sequence[pd.DataFrame], ks: Sequence[int], measure: str) -> dict[str, float]:
    """Averages of one system, over seeds first."""
    columns = list(dict.fromkeys([*(f"R@{k}" for k in ks), measure]))
    figures = pd.concat(frames).groupby(level=0)[columns].mean()
    domains = figures.groupby(frames[0]["domain"], sort=False).mean()
    averages = {"macro": domains.mean(), "micro": figures.mean()}
    if NEWS in domains.index and len(domains) > 1:
        averages = {"macro": domains.mean(), "macro_ex_news": domains.drop(index=NEWS).mean(), "micro": figures.mean()}
    row: dict[str, float] = {"seeds": len(frames)}
    row |= {f"{kind} {name}": float(value) for kind, means in averages.items() for name, value in means.items()}
    row["sd"] = float(np.std([frame[measure].mean() for frame in frames], ddof=1)) if len(frames) > 1 else np.nan
    return row


def _rounded(values: pd.Series, digits: int, sign: str = "") -> pd.Series:
    return values.map(lambda value: "–" if pd.isna(value) else f"{value:{sign}.{digits}f}".replace("-", "−"))


def _interval(low: pd.Series, high: pd.Series, digits: int) -> pd.Series:
    texts = "[" + _rounded(low, digits) + ", " + _rounded(high, digits) + "]"
    return texts.where(low.notna(), "–")
