"""Figures: each function returns a matplotlib Figure with a description of what it shows, for screen readers.

Colours are Okabe and Ito's, safe for colour-blind readers; lines and bars also differ in dashes, markers and hatches.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd
from IPython.core.pylabtools import print_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure as PlainFigure
from PIL import Image

from mmr5_lab.html import GOLD_MARK, data_url, escape_html, visible
from mmr5_lab.prompting.reasons import reasoning_by_image

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"  # jfly.uni-koeln.de/color
PALE = "#bbbbbb"
# hit, then the misses in the order of `errors.MISSES`
OUTCOMES = ((GREEN, ""), ("#56B4E9", ".."), (GREY, "//"), (PURPLE, "xx"), ("#E69F00", "\\\\"), (ORANGE, "--"))
SERIES = (  # colour, line, marker and hatch of each
    (BLUE, "-", "o", ""), (ORANGE, "--", "s", "//"), (GREEN, ":", "D", ".."), (PURPLE, "-.", "^", "xx"),
    (GREY, "-", "v", "\\\\"),
)  # fmt: skip


class Figure(PlainFigure):
    """A matplotlib figure with `alt`, its description; notebooks and their HTML put it beside the picture."""

    alt = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": print_figure(self, "png")}, {"image/png": {"alt": self.alt}}

    def to_html(self) -> str:
        """Return the figure and its description as an HTML image that holds it."""
        return f'<img alt="{escape_html(self.alt)}" src="{data_url(print_figure(self, "png"), "png")}">'


def _figure(width: float, height: float, *grid: int, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes: one, or those of `grid` (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*grid, **options)


# Pages


def page_sheet(images: Sequence[Image.Image], titles: Sequence[str]) -> Figure:
    """Show page images in rows of six, each with its title below."""
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure, grid = _figure(1.9 * columns, 2.5 * rows, rows, columns, squeeze=False)
    for axes, image, title in zip_longest(grid.flat, images, titles):
        axes.axis("off")
        if image is not None:
            _page(axes, image, title, False)
    figure.alt = f"{len(images)} page images: {', '.join(titles)}"
    return figure


def trace_figure(images: Sequence[Image.Image], positive_ids: Sequence[int], think: str, question: str) -> Figure:
    """Show candidate pages in the order of the prompt (positives framed and starred), the reason for each below it."""
    reasons = reasoning_by_image(think, len(images))
    said = {"as in the prompt": [reasons.get(i, "") for i in range(1, len(images) + 1)]}
    return before_after(images, dict.fromkeys(said, range(len(images))), [i - 1 for i in positive_ids], question, said)


def before_after(
    images: Sequence[Image.Image],
    orders: Mapping[str, Sequence[int]],
    gold: Sequence[int],
    question: str,
    reasons: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Show the candidate pages in each system's order, a row a system; gold pages are framed and starred.

    images: in candidate order; orders: system -> 0-based permutation of them; gold: 0-based places in them
    reasons: system -> what it said of the pages, in its order; stands below them
    """
    reasons = reasons or {}
    heights = [2.6 + 0.9 * (name in reasons) for name in orders]
    figure, grid = _figure(
        2.0 * len(images), sum(heights) + 0.4, len(orders), len(images), squeeze=False, height_ratios=heights
    )
    figure.suptitle(_plain(question), fontsize=11)
    for row, (name, order) in zip(grid, orders.items(), strict=True):
        said = reasons.get(name, [""] * len(order))
        for rank, (axes, k, reason) in enumerate(zip(row, order, said, strict=True), 1):
            _page(axes, images[k], "\n".join([f"{rank}. candidate {k + 1}", *textwrap.wrap(reason, 30)]), k in gold)
        row[0].axis("on")
        row[0].set(xticks=[], yticks=[])
        row[0].set_ylabel(_plain(name), fontsize=11)
    places = {name: [r for r, k in enumerate(order, 1) if k in gold] for name, order in orders.items()}
    ranks = "; ".join(f"{name} at rank {', '.join(map(str, ranks))}" for name, ranks in places.items())
    quotes = "".join(
        f". {name} says: " + " ".join(f"{rank}: {reason}" for rank, reason in enumerate(said, 1) if reason)
        for name, said in reasons.items()
    )
    figure.alt = f"Candidate pages for {question!r} in each system's order. Gold pages: {ranks}{quotes}"
    return figure


def visual_tokens(image: Image.Image, rows: int, columns: int, merge: int) -> Figure:
    """Show what a visual token sees: the page cut into patches and merged squares, and one of these squares enlarged.

    rows, columns: patches of the page; merge: patches along a side of a token (`memory.patch_grid`). The enlarged token
    is the one with the most ink.
    """
    high, wide = rows // merge, columns // merge
    page = np.asarray(image.convert("L"), dtype=float)
    squares = [square for row in np.array_split(page, high) for square in np.array_split(row, wide, axis=1)]
    number = int(np.argmax([square.std() for square in squares]))
    r, c = divmod(number, wide)
    aspect = page.shape[0] * wide / (page.shape[1] * high)
    height = 8 * 0.55 * max(0.6, min(1.5, page.shape[0] / page.shape[1]))
    figure, (whole, one) = _figure(8, height, 1, 2, width_ratios=(3, 2))
    whole.imshow(image.convert("RGB"), extent=(0, wide, high, 0), aspect=aspect)
    one.imshow(squares[number], cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0), aspect=aspect)
    for axes, across, down in ((whole, wide, high), (one, 1, 1)):
        axes.set(xticks=range(across + 1), yticks=range(down + 1))
        axes.set_xticks(np.arange(across * merge + 1) / merge, minor=True)
        axes.set_yticks(np.arange(down * merge + 1) / merge, minor=True)
        axes.grid(color=BLUE, linewidth=1.6, alpha=0.8)
        axes.grid(which="minor", color=BLUE, linewidth=0.4 if axes is whole else 1.6, alpha=0.8)
        axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    for k in range(len(squares) if len(squares) <= 60 else 0):
        whole.text(k % wide + 0.06, k // wide + 0.28, str(k + 1), color=BLUE, fontsize=8)
    whole.plot([c, c + 1, c + 1, c, c], [r, r, r + 1, r + 1, r], color=ORANGE, linewidth=3)
    whole.set_title(f"{rows} × {columns} patches, {len(squares)} visual tokens", fontsize=10)
    one.set_title(f"token {number + 1}: {merge} × {merge} patches", fontsize=10)
    figure.alt = (
        f"A page of {rows} × {columns} patches; each {merge} × {merge} of them are one visual token,"
        f" {len(squares)} in all. Token {number + 1}, enlarged, holds the part in row {r + 1}, column {c + 1}"
    )
    return figure


def heat_map(image: Image.Image, tokens: Sequence[str], likeness: np.ndarray, shown: int = 4) -> Figure:
    """Show where a page answers to the words of a question, as a late-interaction retriever sees it.

    tokens, likeness: of `ColQwenEncoder.heat_map`; `shown` tokens are drawn, those that single out a patch most, in the
    order of the question.
    """
    peaks = likeness.max(axis=(1, 2)) - np.median(likeness, axis=(1, 2))
    peaks[[len(token) < 3 or not token.isalnum() for token in tokens]] = -np.inf  # "of", "?"
    chosen = sorted(np.argsort(-peaks, kind="stable")[:shown])
    high, wide = likeness.shape[1:]
    figure, panels = _figure(2.2 * len(chosen), 2.2 * image.height / image.width + 0.5, 1, len(chosen), squeeze=False)
    spoken = []
    for axes, k in zip(panels[0], chosen, strict=True):
        shape: dict[str, Any] = {"extent": (0, wide, high, 0), "aspect": image.height * wide / image.width / high}
        axes.imshow(image.convert("L"), cmap="gray", **shape)
        axes.imshow(likeness[k], cmap="Oranges", alpha=0.55, vmin=likeness.min(), vmax=likeness.max(), **shape)
        axes.set(xticks=[], yticks=[])
        axes.set_title(_plain(f"{tokens[k]}  {likeness[k].max():.2f}"), fontsize=10)
        row, column = np.unravel_index(likeness[k].argmax(), (high, wide))
        spoken.append(f"{visible(tokens[k])} in row {row + 1}, column {column + 1} ({likeness[k].max():.2f})")
    places = "; ".join(spoken)
    figure.alt = f"A page of {high} × {wide} patches, and where the question's words find most likeness: {places}"
    return figure


# Training


def loss_curve(log: pd.DataFrame) -> Figure:
    """Show SFT's loss on the completion tokens and the share of them that is predicted correctly, by step."""
    figure, left = _figure(8, 3)
    left.plot(log["step"], log["loss"], color=BLUE, label="loss (nats per token)")
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    if "mean_token_accuracy" in log:
        right = left.twinx()
        right.plot(log["step"], log["mean_token_accuracy"], color=ORANGE, linestyle="--", label="token accuracy")
        right.set(ylabel="token accuracy", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=2)
    figure.alt = f"Loss over {len(log)} steps: {log['loss'].iloc[0]:.2f} at first, {log['loss'].iloc[-1]:.2f} at last"
    return figure


def reward_curves(log: pd.DataFrame, rewards: Sequence[str] = ("rank_reward", "format_reward")) -> Figure:
    """Show GRPO's mean rewards, share of groups whose rewards are all equal (they teach nothing), completion length."""
    return _curves(log, [
        ("mean reward", {name.replace("_", " "): f"rewards/{name}/mean" for name in rewards}, 1.02),
        ("share of groups without variance", {"": "frac_reward_zero_std"}, 1.02),
        ("completion length (tokens)", {"": "completions/mean_length"}, None),
    ])  # fmt: skip


def answer_curves(log: pd.DataFrame) -> Figure:
    """Show GRPO's valid and right answers, faults, similarity of the answers to the input order, entropy and KL."""
    faults = log[[name for name in log if name.startswith("faults/")]].mean().sort_values(ascending=False)
    return _curves(log, [
        ("share of answers", {"valid": "answers/valid", "right page first": "answers/first_right"}, 1.02),
        ("most frequent faults", {name[7:].replace("_", " "): name for name in faults.index[:4]}, None),
        ("similarity to the input order", {"Kendall tau": "order/tau", "share of copies": "order/copied"}, None),
        ("uncertainty (nats)", {"entropy": "entropy", "KL divergence": "kl"}, None),
    ])  # fmt: skip


def _curves(log: pd.DataFrame, panels: Sequence[tuple[str, Mapping[str, str], float | None]]) -> Figure:
    """Columns of a log by step, faintly, and means over five steps; panels: title, {label: column}, end of the axis."""
    figure, grid = _figure(3.4 * len(panels), 3.3, 1, len(panels))
    edge, ends = max(1, len(log) // 4), []
    for axes, (title, columns, top) in zip(grid, panels, strict=True):
        shown = {label: log[column] for label, column in columns.items() if column in log}
        for (label, values), (colour, line, _, _) in zip(shown.items(), SERIES, strict=False):
            axes.plot(log["step"], values, color=colour, alpha=0.25, linewidth=1)
            mean = values.rolling(5, min_periods=1, center=True).mean()
            axes.plot(log["step"], mean, color=colour, linestyle=line, label=label)
            ends.append(f"{label or title} {values.head(edge).mean():.2f}, {values.tail(edge).mean():.2f}")
        negative = any((values < 0).any() for values in shown.values())
        axes.set(title=title, xlabel="step", ylim=(None if negative else 0, top))
        if any(shown):
            axes.legend(fontsize=8)
    figure.alt = f"Means of the first and the last quarter of {len(log)} steps: {'; '.join(ends)}"
    return figure


# Rewards


def reward_by_rank(rewards: pd.DataFrame) -> Figure:
    """Show rewards (columns) for the one gold page at each rank (index, from 1), and what each rank gained adds."""
    gained = (rewards - rewards.shift(-1)).iloc[:-1]
    figure, (left, right) = _figure(9, 3.2, 1, 2)
    for name, (colour, line, marker, _) in zip(rewards, SERIES, strict=False):
        left.plot(rewards.index, rewards[name], color=colour, linestyle=line, marker=marker, label=name)
    _grouped_bars(right, gained, [f"{rank + 1} to {rank}" for rank in gained.index])
    left.set(title="reward", xlabel="rank of the gold page", ylim=(0, 1.05), xticks=list(rewards.index))
    right.set(title="reward added by moving up a rank", xlabel="from rank to rank")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    spoken = "; ".join(f"{name} {_listed(rewards[name], ': ')}" for name in rewards)
    figure.alt = f"Reward for the one gold page at each rank. {spoken}"
    return figure


def group_advantages(rewards: Sequence[float], advantages: Sequence[float], labels: Sequence[str]) -> Figure:
    """Show one group of GRPO, a row a completion: its reward beside the group's mean and spread, and its advantage."""
    values = pd.Series(rewards, dtype=float)
    mean, spread = values.mean(), values.std()
    figure, (left, right) = _figure(9, 0.34 * len(labels) + 1.1, 1, 2, sharey=True)
    left.barh(range(len(values)), values, color=PALE)
    left.axvline(mean, color="black", label=f"mean {mean:.2f}")
    left.axvspan(mean - spread, mean + spread, color=GREY, alpha=0.2, label=f"± std {spread:.2f}")
    left.set_yticks(range(len(values)), map(_plain, labels), fontsize=8)
    left.invert_yaxis()
    left.set_title("reward", fontsize=10)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    above = [advantage > 0 for advantage in advantages]
    right.barh(range(len(values)), advantages, color=[BLUE if up else ORANGE for up in above],
               hatch=["" if up else "//" for up in above], edgecolor="white")  # fmt: skip
    right.axvline(0, color="black", linewidth=0.8)
    right.set_title("advantage (above 0: becomes more likely)", fontsize=10)
    pairs = "; ".join(f"{r:.2f}, {a:+.2f}" for r, a in zip(values, advantages, strict=True))
    figure.alt = f"A group of {len(values)} completions, mean {mean:.2f}, std {spread:.2f}. Reward, advantage: {pairs}"
    return figure


def exploits(batteries: Mapping[str, pd.DataFrame]) -> Figure:
    """Show `reward_lab.battery` of each set of rewards, a panel each: the reward of each exploit and of honesty."""
    first = next(iter(batteries.values()))
    size = 3.2 + 2.1 * len(batteries), 0.3 * len(first) + 1.3
    figure, [grid] = _figure(*size, 1, len(batteries), sharex=True, sharey=True, squeeze=False)
    spoken = []
    for axes, (name, table) in zip(grid, batteries.items(), strict=True):
        y, pays = range(len(table)), table["pays"]
        axes.hlines(y, table["honest"], table["paid"], color=PALE, zorder=1)
        axes.scatter(table["honest"], y, marker="|", s=140, color="black", label="honest answer")
        axes.scatter(table["paid"].mask(pays), y, color=BLUE, marker="o", s=45, label="exploit", zorder=3)
        axes.scatter(table["paid"].where(pays), y, color=ORANGE, marker="X", s=45, label="exploit that pays", zorder=3)
        axes.set_title(f"{_plain(name)}: {pays.sum()} pay", fontsize=10)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
        paying = (f"{row.Index} ({row.paid:.2f}, honest {row.honest:.2f})" for row in table[pays].itertuples())
        spoken.append(f"{name}: {', '.join(paying) or 'none'}")
    grid[0].set_xlim(left=min(0, *(table["paid"].min() for table in batteries.values())) - 0.1)
    grid[0].set_yticks(range(len(first)), list(first.index))
    grid[0].invert_yaxis()
    figure.supxlabel("reward", fontsize=10)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.alt = f"{len(first)} exploits under each reward; those that pay: {'; '.join(spoken)}"
    return figure


def reward_bars(summary: pd.DataFrame) -> Figure:
    """Show rewards replayed on saved completions (`reward_lab.summary`): what each misses and gets right."""
    shown = summary[["no_variance", "best_right", "agreement"]].set_axis(
        ["groups without variance", "best-rewarded answer is right", f"agreement with {summary.index[0]}"], axis=1
    )
    figure, axes = _figure(9, 3)
    _grouped_bars(axes, shown, map(_plain, summary.index))
    axes.set_ylim(min(0, shown.min().min()), 1.1)
    figure.legend(loc="outside upper center", ncols=3)
    figure.alt = f"Replayed rewards. {_spoken(shown)}"
    return figure


# Evaluation


def recall_bars(
    table: pd.DataFrame,
    intervals: pd.DataFrame | None = None,
    ceiling: float | None = None,
    questions: int | None = None,
) -> Figure:
    """Show recall@k of each system (rows of `table`, columns R@k), with 95 % intervals of R@1 (columns low, high)."""
    figure, axes = _figure(9, 3.6)
    errors = None if intervals is None else abs(intervals[["low", "high"]].sub(table[table.columns[0]], axis=0)).T
    _grouped_bars(axes, table, map(_plain, table.index), errors)
    if ceiling is not None:
        axes.axhline(ceiling, color=GREY, linestyle=":", label="ceiling of R@1")
    axes.set(ylabel="micro recall", ylim=(0, 1.08), xlabel=f"n = {questions} questions" if questions else "")
    figure.legend(loc="outside upper center", ncols=4)
    figure.alt = f"Micro recall by system: {_spoken(table, '.3f')}"
    return figure


def frontier(table: pd.DataFrame, retriever: float, questions: int) -> Figure:
    """Show what quality costs: a point a way to rank (rows; columns "seconds a query", "R@1"), the retriever as a line.

    With columns "low" and "high", intervals; ways that no cheaper one reaches are joined: the frontier.
    """
    cost = "seconds a query"
    figure, axes = _figure(8, 4)
    axes.axhline(retriever, color=GREY, linestyle=":", label="retriever")
    best = table.sort_values([cost, "R@1"], ascending=[True, False])
    best = best[best["R@1"] > best["R@1"].cummax().shift(fill_value=-1)]
    axes.plot(best[cost], best["R@1"], color=GREEN, linestyle="--", drawstyle="steps-post", label="frontier")
    whiskers = _whiskers(table, "R@1") if "low" in table else None
    axes.errorbar(table[cost], table["R@1"], yerr=whiskers, fmt="o", color=BLUE, capsize=3, zorder=3)
    for k, (name, row) in enumerate(table.sort_values(cost).iterrows()):
        # neighbours on other sides, and the dearest on the left, as its name might not fit on the right
        across, side = (-6, "right") if k % 2 or 0 < k == len(table) - 1 else (6, "left")
        place = (across, 8 if k % 2 else -14)
        axes.annotate(_plain(str(name)), (row[cost], row["R@1"]), place, textcoords="offset points", ha=side)
    axes.set(xscale="log", xlabel=cost, ylabel="micro recall@1", ylim=(0, 1))
    axes.set_title(f"{questions} questions{', 95 % intervals over documents' if 'low' in table else ''}", fontsize=10)
    axes.margins(x=0.35)
    axes.legend(loc="lower right")
    points = "; ".join(f"{name} {row['R@1']:.2f} in {row[cost]:.3f} s" for name, row in table.iterrows())
    figure.alt = f"Recall@1 against {cost}: {points}; the retriever {retriever:.2f}"
    return figure


def outcome_bars(counts: pd.DataFrame, title: str = "") -> Figure:
    """Show the outcomes of the questions of each group (rows, all but "all"): shares of `errors.count_outcomes`."""
    groups = counts.drop(index="all", errors="ignore")
    outcomes = groups.drop(columns="questions")
    shares = outcomes.div(groups["questions"], axis=0)
    figure, axes = _figure(9, 0.36 * len(groups) + 1.4)
    before = shares.cumsum(axis=1) - shares
    names = [_plain(f"{name} (n = {n})") for name, n in groups["questions"].items()]
    for column, (colour, hatch) in zip(shares, OUTCOMES, strict=True):
        if shares[column].any():
            axes.barh(names, shares[column], left=before[column], label=column, color=colour, hatch=hatch, ec="white")
    axes.invert_yaxis()
    axes.set(xlabel="share of the questions", xlim=(0, 1), title=_plain(title))
    figure.legend(loc="outside upper center", ncols=3)
    figure.alt = f"{title or 'Outcomes'} by group: {_spoken(outcomes.where(outcomes > 0), '.0f')}"
    return figure


def group_bars(tables: dict[str, pd.DataFrame], measure: str = "R@1") -> Figure:
    """Show `metrics.breakdown` of each system: a row a group, a mark a system, and what the best order would reach.

    The ceiling is the first system's. Groups' n stand at their names. Whiskers where the tables hold intervals.
    """
    first = next(iter(tables.values()))
    ceiling = first[f"{measure} candidates"]
    figure, axes = _figure(9, 0.5 * len(first) + 1.3)
    places = np.arange(len(first))
    axes.scatter(ceiling, places, marker="|", s=400, color="black", label="best order")
    shifts = np.linspace(-0.25, 0.25, len(tables)) if len(tables) > 1 else [0.0]
    for (name, table), shift, (colour, _, marker, _) in zip(tables.items(), shifts, SERIES, strict=False):
        whiskers = _whiskers(table, measure) if f"{measure} low" in table else None
        axes.errorbar(table[measure], places + shift, xerr=whiskers, color=colour, fmt=marker,
                      markersize=6, elinewidth=1, label=_plain(name), zorder=3)  # fmt: skip
    axes.set_yticks(places, [_plain(f"{group} (n = {n:.0f})") for group, n in first["questions"].items()])
    axes.grid(axis="y", alpha=0.3)
    axes.set(xlabel=measure, xlim=(-0.03, 1.03), ylim=(len(first) - 0.5, -0.5))
    figure.legend(loc="outside upper center", ncols=5)
    values = {name: table[measure] for name, table in tables.items()} | {"best order of the candidates": ceiling}
    figure.alt = f"{measure} by {first.index.name}, {_spoken(pd.DataFrame(values))}"
    return figure


def position_curve(bias: pd.DataFrame) -> Figure:
    """Show `robustness.position_bias`: how often each place of the prompt is ranked first, also when it is gold."""
    figure, grid = _figure(9, 3.4, 1, 2)
    parts = (("first", "shown", "ranked first", BLUE), ("found", "gold", "ranked first when gold", GREEN))
    for axes, (name, n, title, colour) in zip(grid, parts, strict=True):
        axes.errorbar(bias.index, bias[name], yerr=_whiskers(bias, name), color=colour, marker="o", capsize=3)
        axes.set(title=title, xlabel="place in the prompt", ylabel="share of the rankings", ylim=(0, 1.05))
        axes.set_xticks(bias.index, [f"{place}\nn = {count}" for place, count in bias[n].items()])
    grid[0].plot(bias.index, bias["even"], color=GREY, linestyle=":", label="no preference")
    grid[0].legend()
    shown = bias[["first", "found"]].set_axis(["ranked first", "found"], axis="columns")
    figure.alt = f"Position bias, with 95 % intervals over documents. {_spoken(shown, head='place {}: ')}"
    return figure


def faithfulness(table: pd.DataFrame) -> Figure:
    """Show `robustness.faithfulness`: a panel a measure, a point a perturbation, with 95 % intervals over documents."""
    measures = list(dict.fromkeys(table["measure"]))
    names = list(dict.fromkeys(table["perturbation"]))
    rows = -(-len(measures) // 4)
    figure, grid = _figure(10, 0.3 * rows * (len(names) + 3), rows, 4, squeeze=False, sharey=True, sharex=True)
    for axes, measure in zip_longest(grid.flat, measures):
        if measure is None:
            axes.axis("off")
            continue
        part = table[table["measure"] == measure].set_index("perturbation").reindex(names)
        axes.errorbar(part["mean"], range(len(names)), xerr=_whiskers(part, "mean"), fmt="o", color=BLUE, capsize=3)
        for y, (mean, n) in enumerate(zip(part["mean"], part["questions"], strict=True)):
            if pd.notna(mean):
                axes.annotate(f"{mean:.2f} (n = {n:.0f})", (0.03, y - 0.22), fontsize=7, color=GREY)
        axes.set(xlim=(0, 1.03), ylim=(len(names) - 0.5, -0.7), yticks=range(len(names)), yticklabels=names)
        axes.set_title(measure, fontsize=10)
    means = "; ".join(f"{row.perturbation}, {row.measure}: {row.mean:.2f}" for row in table.itertuples())
    figure.alt = f"Faithfulness under perturbations, with 95 % intervals over documents. {means}"
    return figure


# Sweeps


def parallel_axes(table: pd.DataFrame, settings: Sequence[str], figure_of_merit: str = "micro R@1") -> Figure:
    """Show each row of a leaderboard as a line through its settings to its figure of merit; better lines are darker.

    settings: columns with numbers or names, an axis each; values stand in order of size (names: of the alphabet)
    """
    figure, axes = _figure(2.2 * (len(settings) + 1) + 1, 4)
    merit = table[figure_of_merit].astype(float).reset_index(drop=True)
    low, high = merit.min(), merit.max()
    scaled = (merit - low) / (high - low or 1)
    heights = []  # of the lines at each axis, from 0.05 to 0.95
    for x, name in enumerate(settings):
        codes, values = pd.factorize(table[name], sort=True)
        steps = 0.05 + 0.9 * np.arange(len(values)) / max(1, len(values) - 1)
        heights.append(steps[codes])
        for value, height in zip(values, steps, strict=True):
            axes.annotate(f"{value}", (x, height), (-6, 5), textcoords="offset points", ha="right")
    heights.append(scaled * 0.9 + 0.05)
    for value, height in {low: heights[-1].min(), high: heights[-1].max()}.items():
        axes.annotate(f"{value:.3f}", (len(settings), height), (6, -3), textcoords="offset points")
    lines = np.array(heights, dtype=float).T
    for shade, line in sorted(zip(scaled, lines.tolist(), strict=True)):
        colour = BLUE if shade == 1 else GREY
        axes.plot(line, color=colour, alpha=0.2 + 0.8 * shade, linewidth=1 + 2 * shade, marker="o")
    axes.vlines(range(len(settings) + 1), 0, 1.06, color=PALE, linewidth=1, zorder=0)
    axes.set_xticks(range(len(settings) + 1), [*settings, figure_of_merit])
    axes.set(yticks=[], ylim=(0, 1.06), xlim=(-0.4, len(settings) + 0.4))
    axes.spines[:].set_visible(False)
    best = ", ".join(f"{name} {table[name].iloc[int(merit.argmax())]}" for name in settings)
    figure.alt = f"{len(table)} settings against {figure_of_merit}, {low:.3f} to {high:.3f}; best: {best}"
    return figure


def seed_spread(values: Mapping[str, Sequence[float]], figure_of_merit: str = "micro R@1") -> Figure:
    """Show a figure of merit of each system, a point a seed and the mean: is a difference more than that of seeds?"""
    figure, axes = _figure(8, 0.5 * len(values) + 1.2)
    places = np.arange(len(values))
    axes.vlines([np.mean(v) for v in values.values()], places - 0.3, places + 0.3, color=ORANGE, lw=3, label="mean")
    for k, of_seeds in enumerate(values.values()):
        axes.scatter(of_seeds, [k] * len(of_seeds), color=BLUE, zorder=3, label="" if k else "seed")
    axes.set_yticks(places, list(values))
    axes.set(xlabel=figure_of_merit, ylim=(len(values) - 0.4, -0.6))
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=2)
    ranges = "; ".join(f"{name} {min(v):.3f} to {max(v):.3f} ({len(v)})" for name, v in values.items())
    figure.alt = f"{figure_of_merit} by system, lowest and highest seed (number of seeds): {ranges}"
    return figure


def _grouped_bars(axes: Axes, table: pd.DataFrame, names: Iterable[str], errors: pd.DataFrame | None = None) -> None:
    """Draw labelled bars in groups: a group a row of the table, a bar a column; errors: of the first column."""
    width = 0.8 / len(table.columns)
    for c, (column, (colour, _, _, hatch)) in enumerate(zip(table, SERIES, strict=False)):
        places = np.arange(len(table)) + (c - (len(table.columns) - 1) / 2) * width
        bars = axes.bar(places, table[column], width * 0.94, yerr=None if c else errors, capsize=3, label=column,
                        color=colour, hatch=hatch, edgecolor="white")  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=8)  # above the whisker
    axes.set_xticks(range(len(table)), list(names))


def _whiskers(table: pd.DataFrame, name: str) -> list[pd.Series]:
    """Distances from a mean to its interval's ends; 0 where there is no interval."""
    low, high = (table.get(f"{name} {end}", table.get(end)) for end in ("low", "high"))
    return [(table[name] - low).fillna(0).clip(lower=0), (high - table[name]).fillna(0).clip(lower=0)]


def _spoken(table: pd.DataFrame, digits: str = ".2f", head: str = "{} ") -> str:
    """A table in words, row by row: "BM25 R@1 0.50, R@3 0.70; SFT …"; absent numbers are left out."""
    return "; ".join(head.format(name) + _listed(row, " ", digits) for name, row in table.iterrows())


def _listed(values: pd.Series, between: str, digits: str = ".2f") -> str:
    return ", ".join(f"{name}{between}{value:{digits}}" for name, value in values.items() if pd.notna(value))


def _plain(text: str) -> str:
    """Text of others for a figure: dollar signs begin no formula, control characters are shown as escapes."""
    return visible(text).replace("$", r"\$")


def _page(axes: Axes, image: Image.Image, caption: str, gold: bool) -> None:
    axes.imshow(image)
    axes.set_title((f"{GOLD_MARK} gold\n" if gold else "") + _plain(caption), fontsize=8, y=-0.05, va="top")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=ORANGE if gold else PALE, linewidth=3 if gold else 0.8)
    if not gold:
        axes.axis("off")
