"""Figures: each function returns a matplotlib Figure with a description of what it shows, for screen readers.

Colours are Okabe and Ito's, safe for colour-blind readers; lines and bars also differ in dashes and hatches.
"""

import textwrap
from collections.abc import Sequence

import pandas as pd
from IPython.core.pylabtools import print_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure as PlainFigure
from PIL import Image

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"  # jfly.uni-koeln.de/color
GOLD_MARK = "★"


class Figure(PlainFigure):
    """A matplotlib figure with `alt`, its description; notebooks and their HTML put it beside the picture."""

    alt = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": print_figure(self, "png")}, {"image/png": {"alt": self.alt}}


def page_sheet(images: Sequence[Image.Image], titles: Sequence[str] | None = None, columns: int = 6) -> Figure:
    """Page images in rows of `columns`, each with its title below."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.5 * rows), layout="constrained")
    for k, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if k < len(images):
            _page(axes, images[k], titles[k] if titles else "", False)
    figure.alt = f"{len(images)} page images" + (f": {', '.join(titles)}" if titles else "")
    return figure


def trace_figure(images: Sequence[Image.Image], positive_ids: Sequence[int], think: str, question: str) -> Figure:
    """Candidate pages in prompt order (positives framed and starred), the reasoning line of each below it."""
    figure = Figure(figsize=(2.4 * len(images), 4.2), layout="constrained")
    figure.suptitle(question, fontsize=11)
    lines = {line.split(":")[0]: line for line in think.splitlines()}
    for i, (axes, image) in enumerate(zip(figure.subplots(1, len(images), squeeze=False).flat, images, strict=True), 1):
        line = lines.get(f"Image {i}", f"Image {i}")
        _page(axes, image, "\n".join(textwrap.wrap(line, 30)), i in positive_ids)
    positives = ", ".join(map(str, positive_ids))
    figure.alt = f"{len(images)} candidate pages for {question!r}, right: image {positives}. {think}"
    return figure


def loss_curve(log: pd.DataFrame) -> Figure:
    """SFT: loss of the completion tokens and the share of them that is right, by step."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left = figure.subplots()
    left.plot(log["step"], log["loss"], color=BLUE, label="loss (nats a token)")
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    if "mean_token_accuracy" in log:
        right = left.twinx()
        right.plot(log["step"], log["mean_token_accuracy"], color=ORANGE, linestyle="--", label="tokens right")
        right.set(ylabel="share of tokens right", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=2)
    figure.alt = f"Loss over {len(log)} steps: {log['loss'].iloc[0]:.2f} at first, {log['loss'].iloc[-1]:.2f} at last"
    return figure


def reward_curves(
    log: pd.DataFrame, rewards: Sequence[str] = ("rank_reward", "format_reward"), smooth: int = 5
) -> Figure:
    """GRPO: mean of each reward, share of groups without variance (they teach nothing), completion length."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    for name, colour, style in zip(rewards, (BLUE, GREEN, PURPLE), ("-", "--", ":"), strict=False):
        _smoothed(first, log, f"rewards/{name}/mean", smooth, colour, style, name)
    first.set(title="rewards (mean of a step)", xlabel="step", ylim=(0, 1.02))
    first.legend()
    _smoothed(second, log, "frac_reward_zero_std", smooth, ORANGE, "-", None)
    second.set(title="groups without variance", xlabel="step", ylim=(0, 1.02))
    _smoothed(third, log, "completions/mean_length", smooth, GREY, "-", None)
    third.set(title="completion length (tokens)", xlabel="step", ylim=(0, None))
    edge = max(1, len(log) // 4)
    means = {name: log[f"rewards/{name}/mean"] for name in rewards}
    ends = [f"{name} {mean.head(edge).mean():.2f}, {mean.tail(edge).mean():.2f}" for name, mean in means.items()]
    figure.alt = f"Means of the first and the last quarter of {len(log)} steps: {'; '.join(ends)}"
    return figure


def before_after(
    images: Sequence[Image.Image], orders: dict[str, Sequence[int]], gold: Sequence[int], question: str
) -> Figure:
    """One row a system: the candidate pages in its order; gold pages are framed and starred.

    images: in candidate order; orders: system -> 0-based permutation of them; gold: 0-based places in them.
    """
    figure = Figure(figsize=(2.0 * len(images), 2.6 * len(orders) + 0.4), layout="constrained")
    figure.suptitle(question, fontsize=11)
    grid = figure.subplots(len(orders), len(images), squeeze=False)
    for row, (name, order) in zip(grid, orders.items(), strict=True):
        for rank, (axes, k) in enumerate(zip(row, order, strict=True), 1):
            _page(axes, images[k], f"{rank}. candidate {k + 1}", k in gold)
        row[0].set_ylabel(name, fontsize=11)
        row[0].axis("on")
        row[0].set(xticks=[], yticks=[])
    places = {name: [r for r, k in enumerate(order, 1) if k in gold] for name, order in orders.items()}
    ranks = "; ".join(f"{name} at rank {', '.join(map(str, ranks))}" for name, ranks in places.items())
    figure.alt = f"Candidate pages for {question!r} in each system's order. Right pages: {ranks}"
    return figure


def recall_bars(table: pd.DataFrame, intervals: pd.DataFrame | None = None, ceiling: float | None = None) -> Figure:
    """Recall@k of each system (rows of `table`, columns R@k), with 95 % intervals of R@1 (columns low, high)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(table.columns)
    for c, (column, colour, hatch) in enumerate(
        zip(table.columns, (BLUE, ORANGE, GREEN), ("", "//", ".."), strict=False)
    ):
        places = [x + c * width for x in range(len(table))]
        bars = axes.bar(places, table[column], width * 0.94, label=column, color=colour, hatch=hatch, edgecolor="white")
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
        if c == 0 and intervals is not None:
            errors = [table[column] - intervals["low"], intervals["high"] - table[column]]
            axes.errorbar(places, table[column], yerr=errors, fmt="none", color="black", capsize=3)
    if ceiling is not None:
        axes.axhline(ceiling, color=GREY, linestyle=":", label="ceiling of R@1")
    axes.set_xticks([x + width * (len(table.columns) - 1) / 2 for x in range(len(table))], table.index)
    axes.set(ylabel="micro recall", ylim=(0, 1.08))
    figure.legend(loc="outside upper center", ncols=4)
    means = "; ".join(
        f"{name} " + ", ".join(f"{c} {value:.3f}" for c, value in row.items()) for name, row in table.iterrows()
    )
    figure.alt = f"Micro recall by system: {means}"
    return figure


def frontier(table: pd.DataFrame, retriever: float, questions: int) -> Figure:
    """What quality costs: one point a way to rank (rows; columns "seconds a query", "R@1"), the retriever as a line."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(retriever, color=GREY, linestyle=":", label="retriever")
    axes.scatter(table["seconds a query"], table["R@1"], color=BLUE, zorder=3)
    for k, (name, row) in enumerate(table.sort_values("seconds a query").iterrows()):
        axes.annotate(
            str(name), (row["seconds a query"], row["R@1"]), (6, 6 if k % 2 else -12), textcoords="offset points"
        )
    axes.set(xscale="log", xlabel="seconds a query", ylabel="micro recall@1", ylim=(0, 1))
    axes.set_title(f"{questions} questions", fontsize=10)
    axes.margins(x=0.35)
    axes.legend(loc="lower right")
    points = "; ".join(f"{name} {row['R@1']:.2f} in {row['seconds a query']:.3f} s" for name, row in table.iterrows())
    figure.alt = f"Recall@1 against seconds a query: {points}; the retriever {retriever:.2f}"
    return figure


def _page(axes: Axes, image: Image.Image, caption: str, gold: bool) -> None:
    axes.imshow(image)
    axes.set_title((f"{GOLD_MARK} gold\n" if gold else "") + caption, fontsize=8, y=-0.05, va="top")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=ORANGE if gold else "#bbbbbb", linewidth=3 if gold else 0.8)
    if not gold:
        axes.axis("off")


def _smoothed(
    axes: Axes, log: pd.DataFrame, column: str, smooth: int, colour: str, style: str, label: str | None
) -> None:
    axes.plot(log["step"], log[column], color=colour, alpha=0.25, linewidth=1)
    mean = log[column].rolling(smooth, min_periods=1, center=True).mean()
    axes.plot(log["step"], mean, color=colour, linestyle=style, label=label)
