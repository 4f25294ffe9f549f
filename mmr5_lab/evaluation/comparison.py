"""Systems side by side, as a paper shows them: recall, intervals, differences to a baseline and corrected p-values.

    table = compare({"ColQwen": colqwen, "MM-R5": [seed_0, seed_1, seed_2]}, corpus, baseline="ColQwen")
    print(to_latex(table))

Statistics are those of `significance`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmr5_lab.evaluation.gold_ranks import MEASURES, CorpusTables, PagesByQuestion, measure_columns
from mmr5_lab.evaluation.metrics import AVERAGES, CEILINGS, NEWS, averages, per_question
from mmr5_lab.evaluation.significance import bootstrap_intervals, holm, paired_randomisation_test
from mmr5_lab.html import html_table, latex_table


def compare(
    runs: Mapping[str, PagesByQuestion | Sequence[PagesByQuestion]],
    corpus: CorpusTables,
    baseline: str | None = None,
    *,
    ks: Sequence[int] = (1, 3, 5),
    measure: str = "R@1",
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return the table that a paper needs: one row a system, in the order given.

    runs: name -> rankings `{question: pages}`, or a list of them from different seeds, whose figures are averaged
        question by question before anything else
    baseline: the system that others are tested against; default: the first
    measure: what intervals and tests are of: its micro mean. "R@1", "nDCG@3" …, "RR" or "AP"

    Columns, as shares:

    - "seeds"; "macro R@k", "macro_ex_news R@k" (where the corpus has that domain), "micro R@k"; "micro" of the measure
      if it is another;
    - "candidate ceiling" and "corpus ceiling": micro mean of the measure for the best order of the system's own pages,
      and of all pages;
    - "sd": standard deviation over seeds of the measure's micro mean, NaN for one;
    - "low", "high": its interval over documents (`significance.bootstrap_intervals`);
    - "difference", "difference low", "difference high": system - baseline on the same questions, and its interval;
    - "p": paired randomisation of whole documents, "p Holm": the same after Holm's correction for all tests of the
      table. The baseline's are NaN.

    Seeds are averaged, so intervals and p-values are of the questions' variation; that of training shows in "sd".

    Raises ValueError as `metrics.per_question`, naming system and seed; for no systems, a system without runs or an
    unknown baseline or measure; and as `significance.bootstrap_interval`.
    """
    if not runs:
        raise ValueError("there are no runs to compare: give {name: run, …}")
    first = next(iter(runs)) if baseline is None else baseline
    if first not in runs:
        raise ValueError(f"the baseline {first!r} is not among the systems: {', '.join(map(repr, runs))}")
    known = measure_columns(ks, list(MEASURES))
    if measure not in known:
        raise ValueError(f"unknown measure {measure!r}: choose one of {', '.join(known)}")
    names = list(dict.fromkeys(["R", measure.split("@")[0]]))
    frames = {name: _measured(name, runs_of, corpus, ks, names) for name, runs_of in runs.items()}
    documents = frames[first][0]["doc_name"]
    figures = {name: pd.concat(of_seeds).groupby(level=0).mean(numeric_only=True) for name, of_seeds in frames.items()}
    rows = {name: _row(figures[name], frames[name], ks, measure) for name in runs}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")
    values = {name: frame[measure].to_numpy() for name, frame in figures.items()}
    table[["low", "high"]] = bootstrap_intervals(list(values.values()), documents, samples, seed, level)
    others = [name for name in runs if name != first]
    table[["difference", "difference low", "difference high", "p", "p Holm"]] = np.nan
    if others:
        differences = [values[name] - values[first] for name in others]
        table.loc[others, "difference"] = np.mean(differences, axis=1)
        intervals = bootstrap_intervals(differences, documents, samples, seed, level)
        table.loc[others, ["difference low", "difference high"]] = intervals
        p = [paired_randomisation_test(values[name], values[first], samples, seed, documents) for name in others]
        table.loc[others, "p"], table.loc[others, "p Holm"] = p, holm(p)
    table.attrs["note"] = (
        f"{len(documents)} questions of {documents.nunique()} documents. Intervals ({level:.0%}) and tests: micro "
        f"{measure}, documents resampled and swapped, {samples} samples; differences to {first}; p after Holm's "
        f"correction for {len(others)} test{'s' * (len(others) != 1)}."
    )
    return table


def to_html(table: pd.DataFrame) -> str:
    """Return a table of `compare` as HTML for people: intervals beside their figures, names escaped."""
    return html_table(presented(table), table.attrs.get("note", ""))


def to_latex(table: pd.DataFrame) -> str:
    """Return a table of `compare` as LaTeX (package booktabs), names escaped."""
    return latex_table(presented(table), table.attrs.get("note", ""))


def presented(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as texts: figures rounded, "[low, high]" in one column, signed differences, Holm's p only."""
    means = [name for name in table.columns if name.split()[0] in AVERAGES]
    shown = pd.DataFrame(index=table.index)
    if (table["seeds"] > 1).any():
        shown["seeds"] = table["seeds"].map(str)
        shown["sd"] = _rounded(table["sd"])
    for name in [*means, "candidate ceiling", "corpus ceiling"]:
        shown[name.replace("macro_ex_news", "macro ex News")] = _rounded(table[name])
    shown["interval"] = _interval(table["low"], table["high"])
    shown["difference"] = _rounded(table["difference"], "+.3f")
    shown["its interval"] = _interval(table["difference low"], table["difference high"])
    shown["p"] = _rounded(table["p Holm"], ".4f")
    return shown


def _measured(
    name: str, runs: PagesByQuestion | Sequence[PagesByQuestion], corpus: CorpusTables, *columns: Any
) -> list[pd.DataFrame]:
    """Measure each seed's rankings question by question; errors name the system and the seed."""
    seeds: list[Any] = [runs] if isinstance(runs, Mapping) else list(runs) if isinstance(runs, Sequence) else []
    if not seeds or not all(isinstance(rankings, Mapping) for rankings in seeds):
        raise ValueError(
            f"system {name!r} is not a run or a list of runs: give {{question: pages}}, as Rankings.pages is"
        )
    frames = []
    for number, rankings in enumerate(seeds):
        try:
            frames.append(per_question(rankings, corpus, *columns))
        except ValueError as error:
            raise ValueError(f"system {name!r}{f', seed {number}' * (len(seeds) > 1)}: {error}") from None
    return frames


def _row(mean: pd.DataFrame, seeds: Sequence[pd.DataFrame], ks: Sequence[int], measure: str) -> dict[str, float]:
    """One system's row: averages of its figures by question (already means over seeds), ceilings and spread."""
    columns = list(dict.fromkeys([*(f"R@{k}" for k in ks), measure]))
    table = averages(mean[columns], seeds[0]["domain"])
    kinds = AVERAGES if NEWS in table.index and len(table) > 1 + len(AVERAGES) else ("macro", "micro")
    row: dict[str, float] = {"seeds": len(seeds)}
    row |= {f"{kind} {column}": float(table.loc[kind, column]) for kind in kinds for column in columns}
    row["sd"] = float(np.std([frame[measure].mean() for frame in seeds], ddof=1)) if len(seeds) > 1 else np.nan
    ceilings = zip(("candidate ceiling", "corpus ceiling"), CEILINGS, strict=True)
    return row | {name: float(mean[measure + suffix].mean()) for name, suffix in ceilings}


def _rounded(values: pd.Series, form: str = ".3f") -> pd.Series:
    return values.map(lambda value: "–" if pd.isna(value) else f"{value:{form}}".replace("-", "−"))


def _interval(low: pd.Series, high: pd.Series) -> pd.Series:
    return ("[" + _rounded(low) + ", " + _rounded(high) + "]").where(low.notna(), "–")
