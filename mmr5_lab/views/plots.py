"""Figures: each function returns a matplotlib Figure with a description of what it shows, for screen readers.

Colours are Okabe and Ito's, safe for colour-blind readers; lines and bars also differ in dashes and hatches.
"""

import numbers
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.core.pylabtools import print_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure as PlainFigure
from PIL import Image

from mmr5_lab.html import GOLD_MARK, data_url, escape_html, visible

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"  # jfly.uni-koeln.de/color
# hit, then the misses in the order of `analysis.MISSES`
OUTCOMES = ((GREEN, ""), ("#56B4E9", ".."), (GREY, "//"), (PURPLE, "xx"), ("#E69F00", "\\\\"), (ORANGE, "--"))


class Figure(PlainFigure):
    """A matplotlib figure with `alt`, its description; notebooks and their HTML put it beside the picture."""

    alt = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": print_figure(self, "png")}, {"image/png": {"alt": self.alt}}

    def to_html(self) -> str:
        """The figure and its description as an HTML image that holds it."""
        return f'<img alt="{escape_html(self.alt)}" src="{data_url(print_figure(self, "png"), "png")}">'


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
    figure.suptitle(_plain(question), fontsize=11)
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


def answer_curves(log: pd.DataFrame, smooth: int = 5) -> Figure:
    """GRPO, step by step: what is right, which faults, the answers' likeness to the input order, entropy and KL."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    styles = [(BLUE, "-"), (ORANGE, "--"), (GREEN, ":"), (PURPLE, "-.")]
    faults = [name for name in log if name.startswith("faults/")]
    worst = log[faults].mean().sort_values(ascending=False).index[:4]
    chosen = {
        "answers": ["answers/valid", "answers/first_right"],
        "commonest faults": list(worst),
        "likeness to the input order": ["order/tau", "order/copied"],
        "uncertainty (nats)": ["entropy", "kl"],
    }
    for axes, (title, names) in zip(panels, chosen.items(), strict=True):
        shown = [name for name in names if name in log]
        for name, (colour, style) in zip(shown, styles, strict=False):
            _smoothed(axes, log, name, smooth, colour, style, name.split("/")[-1])
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=8)
    panels[0].set_ylim(0, 1.02)
    panels[1].set_ylim(0, None)
    edge = max(1, len(log) // 4)
    told = [name for names in chosen.values() for name in names if name in log]
    ends = [f"{name} {log[name].head(edge).mean():.2f}, {log[name].tail(edge).mean():.2f}" for name in told]
    figure.alt = f"Means of the first and the last quarter of {len(log)} steps: {'; '.join(ends)}"
    return figure


def visual_tokens(image: Image.Image, rows: int, columns: int, merge: int) -> Figure:
    """What a visual token sees: the page cut into patches and merged squares, and one of these squares enlarged.

    rows, columns: patches of the page; merge: patches along a side of a token (`budget.patch_grid`). The enlarged token
    is the one with the most ink.
    """
    high, wide = rows // merge, columns // merge
    page = np.asarray(image.convert("L"), dtype=float)
    height, width = page.shape
    tall, broad = height / high, width / wide  # pixels of a token
    squares = {
        (r, c): page[round(r * tall) : round((r + 1) * tall), round(c * broad) : round((c + 1) * broad)]
        for r in range(high)
        for c in range(wide)
    }
    chosen = max(squares, key=lambda place: squares[place].std())
    number = chosen[0] * wide + chosen[1] + 1
    figure = Figure(figsize=(8, 8 * 0.55 * max(0.6, min(1.5, height / width))), layout="constrained")
    whole, one = figure.subplots(1, 2, width_ratios=(3, 2))
    whole.imshow(image.convert("RGB"), extent=(0, wide, high, 0))
    one.imshow(squares[chosen], cmap="gray", vmin=0, vmax=255, extent=(0, merge, merge, 0), aspect=tall / broad)
    whole.set_aspect(tall / broad)
    for places, line in ((range(rows + 1), whole.axhline), (range(columns + 1), whole.axvline)):
        for k in places:
            line(k / merge, color=BLUE, linewidth=1.6 if k % merge == 0 else 0.4, alpha=0.8)
    for k in range(merge + 1):
        one.axhline(k, color=BLUE, linewidth=1.5)
        one.axvline(k, color=BLUE, linewidth=1.5)
    for k, (r, c) in enumerate(squares, 1):
        if len(squares) <= 60:
            whole.text(c + 0.06, r + 0.28, str(k), color=BLUE, fontsize=8)
    r, c = chosen
    whole.plot([c, c + 1, c + 1, c, c], [r, r, r + 1, r + 1, r], color=ORANGE, linewidth=3)
    whole.set_title(f"{rows} × {columns} patches, {len(squares)} visual tokens", fontsize=10)
    one.set_title(f"token {number}: {merge} × {merge} patches", fontsize=10)
    for axes in (whole, one):
        axes.set(xticks=[], yticks=[])
    figure.alt = (
        f"A page of {rows} × {columns} patches; each {merge} × {merge} of them are one visual token,"
        f" {len(squares)} in all. Token {number}, enlarged, holds the part in row {r + 1}, column {c + 1}"
    )
    return figure


def reward_by_rank(paid: pd.DataFrame) -> Figure:
    """What rewards (columns) pay for the one right page at each rank (index, from 1), and for each place gained."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    gained = (paid - paid.shift(-1)).iloc[:-1]
    width = 0.8 / len(paid.columns)
    styles = zip(paid, (BLUE, ORANGE, GREEN), ("-", "--", ":"), "osD", ("", "//", ".."), strict=False)
    for c, (name, colour, line, marker, hatch) in enumerate(styles):
        left.plot(paid.index, paid[name], color=colour, linestyle=line, marker=marker, label=name)
        places = [k + (c - (len(paid.columns) - 1) / 2) * width for k in range(len(gained))]
        right.bar(places, gained[name], width * 0.94, color=colour, hatch=hatch, edgecolor="white")
    left.set(title="paid for the right page", xlabel="its rank", ylim=(0, 1.05), xticks=list(paid.index))
    right.set_title("paid for one place more")
    right.set_xticks(range(len(gained)), [f"{rank + 1} to {rank}" for rank in gained.index])
    figure.legend(loc="outside upper center", ncols=3)
    told = "; ".join(
        f"{name} " + ", ".join(f"{rank}: {value:.2f}" for rank, value in paid[name].items()) for name in paid
    )
    figure.alt = f"What is paid for the one right page at each rank. {told}"
    return figure


def group_advantages(rewards: Sequence[float], advantages: Sequence[float], labels: Sequence[str]) -> Figure:
    """One group of GRPO, a row a completion: its reward beside the group's mean and spread, and its advantage."""
    figure = Figure(figsize=(9, 0.34 * len(labels) + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    values = pd.Series(rewards, dtype=float)
    mean, spread = values.mean(), values.std()
    left.barh(range(len(values)), values, color="#bbbbbb")
    left.axvline(mean, color="black", label=f"mean {mean:.2f}")
    left.axvspan(mean - spread, mean + spread, color=GREY, alpha=0.2, label=f"± std {spread:.2f}")
    left.set_yticks(range(len(values)), map(_plain, labels), fontsize=8)
    left.invert_yaxis()
    left.set_title("reward", fontsize=10)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    up = [value > 0 for value in advantages]
    for pushed, colour, hatch in ((True, BLUE, ""), (False, ORANGE, "//")):
        rows = [k for k, is_up in enumerate(up) if is_up is pushed]
        right.barh(rows, [advantages[k] for k in rows], color=colour, hatch=hatch, edgecolor="white")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_title("advantage (above 0: becomes likelier)", fontsize=10)
    told = "; ".join(f"{r:.2f}, {a:+.2f}" for r, a in zip(values, advantages, strict=True))
    figure.alt = f"A group of {len(values)} completions, mean {mean:.2f}, std {spread:.2f}. Reward, advantage: {told}"
    return figure


def exploits(tried: Mapping[str, pd.DataFrame]) -> Figure:
    """`reward_lab.battery` of each set of rewards, a panel each: what a cheat is paid, and what honesty is."""
    first = next(iter(tried.values()))
    figure = Figure(figsize=(3.2 + 2.1 * len(tried), 0.3 * len(first) + 1.3), layout="constrained")
    grid = figure.subplots(1, len(tried), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, table) in zip(grid, tried.items(), strict=True):
        y, pays = range(len(table)), table["pays"].to_numpy(dtype=bool)
        axes.hlines(y, table["honest"], table["paid"], color="#bbbbbb", zorder=1)
        axes.scatter(table["honest"], y, marker="|", s=140, color="black", label="the honest answer")
        for which, colour, marker, label in ((~pays, BLUE, "o", "a cheat"), (pays, ORANGE, "X", "a cheat that pays")):
            rows = table["paid"].where(which)
            axes.scatter(rows, y, color=colour, marker=marker, s=60 if marker == "X" else 30, label=label, zorder=3)
        axes.set_title(f"{_plain(name)}: {pays.sum()} pay", fontsize=10)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    grid[0].set_xlim(left=min(0, *(table["paid"].min() for table in tried.values())) - 0.1)
    grid[0].set_yticks(range(len(first)), list(first.index))
    grid[0].invert_yaxis()
    figure.supxlabel("reward", fontsize=10)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3)
    told = "; ".join(
        f"{name}: {', '.join(f'{cheat} ({row.paid:.2f}, honest {row.honest:.2f})' for cheat, row in pay.iterrows())}"
        if len(pay := table[table["pays"]])
        else f"{name}: none"
        for name, table in tried.items()
    )
    figure.alt = f"{len(first)} cheats under each reward; those that pay: {told}"
    return figure


def reward_bars(summary: pd.DataFrame) -> Figure:
    """Rewards replayed on saved completions (`reward_lab.summary`): what each sees no difference in, and gets right."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (name, title) in zip(
        panels,
        [
            ("no_variance", "groups without variance"),
            ("best_right", "best paid is right"),
            ("agreement", f"agreement with {summary.index[0]}"),
        ],
        strict=True,
    ):
        bars = axes.bar(list(summary.index), summary[name].fillna(0), color=BLUE, hatch="//", edgecolor="white")
        axes.bar_label(bars, [f"{value:.2f}" for value in summary[name]], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(min(0, summary[name].min()), 1.15)
    told = [
        f"{name}: without variance {r.no_variance:.2f}, best is right {r.best_right:.2f}, agreement {r.agreement:.2f}"
        for name, r in summary.iterrows()
    ]
    figure.alt = f"Replayed rewards. {'; '.join(told)}"
    return figure


def before_after(
    images: Sequence[Image.Image],
    orders: Mapping[str, Sequence[int]],
    gold: Sequence[int],
    question: str,
    reasons: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """One row a system: the candidate pages in its order; gold pages are framed and starred.

    images: in candidate order; orders: system -> 0-based permutation of them; gold: 0-based places in them
    reasons: system -> what it said of the pages, in its order; stands below them
    """
    reasons = reasons or {}
    heights = [2.6 + 0.9 * (name in reasons) for name in orders]
    figure = Figure(figsize=(2.0 * len(images), sum(heights) + 0.4), layout="constrained")
    figure.suptitle(_plain(question), fontsize=11)
    grid = figure.subplots(len(orders), len(images), squeeze=False, height_ratios=heights)
    for row, (name, order) in zip(grid, orders.items(), strict=True):
        said = reasons.get(name, [""] * len(order))
        for rank, (axes, k, reason) in enumerate(zip(row, order, said, strict=True), 1):
            caption = f"{rank}. candidate {k + 1}" + "".join(f"\n{line}" for line in textwrap.wrap(reason, 30))
            _page(axes, images[k], caption, k in gold)
        row[0].set_ylabel(_plain(name), fontsize=11)
        row[0].axis("on")
        row[0].set(xticks=[], yticks=[])
    places = {name: [r for r, k in enumerate(order, 1) if k in gold] for name, order in orders.items()}
    ranks = "; ".join(f"{name} at rank {', '.join(map(str, ranks))}" for name, ranks in places.items())
    told = "".join(
        f". {name} says: " + " ".join(f"{rank}: {reason}" for rank, reason in enumerate(said, 1) if reason)
        for name, said in reasons.items()
    )
    figure.alt = f"Candidate pages for {question!r} in each system's order. Right pages: {ranks}{told}"
    return figure


def recall_bars(
    table: pd.DataFrame,
    intervals: pd.DataFrame | None = None,
    ceiling: float | None = None,
    questions: int | None = None,
) -> Figure:
    """Recall@k of each system (rows of `table`, columns R@k), with 95 % intervals of R@1 (columns low, high)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(table.columns)
    for c, (column, colour, hatch) in enumerate(
        zip(table.columns, (BLUE, ORANGE, GREEN), ("", "//", ".."), strict=False)
    ):
        places = [x + c * width for x in range(len(table))]
        errors = None if c or intervals is None else abs(intervals[["low", "high"]].sub(table[column], axis=0)).T
        bars = axes.bar(
            places, table[column], width * 0.94, yerr=errors, capsize=3, label=column, color=colour, hatch=hatch,
            edgecolor="white",
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=8)  # above the whisker
    if ceiling is not None:
        axes.axhline(ceiling, color=GREY, linestyle=":", label="ceiling of R@1")
    axes.set_xticks([x + width * (len(table.columns) - 1) / 2 for x in range(len(table))], map(_plain, table.index))
    axes.set(ylabel="micro recall", ylim=(0, 1.08), xlabel=f"n = {questions} questions" if questions else "")
    figure.legend(loc="outside upper center", ncols=4)
    means = "; ".join(
        f"{name} " + ", ".join(f"{c} {value:.3f}" for c, value in row.items()) for name, row in table.iterrows()
    )
    figure.alt = f"Micro recall by system: {means}"
    return figure


def frontier(table: pd.DataFrame, retriever: float, questions: int, cost: str = "seconds a query") -> Figure:
    """What quality costs: one point a way to rank (rows; columns `cost`, "R@1"), the retriever as a line.

    With columns "low" and "high", intervals; ways that no cheaper one reaches are joined: the frontier.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(retriever, color=GREY, linestyle=":", label="retriever")
    best = table.sort_values([cost, "R@1"], ascending=[True, False])
    best = best[best["R@1"] > best["R@1"].cummax().shift(fill_value=-1)]
    axes.plot(best[cost], best["R@1"], color=GREEN, linestyle="--", drawstyle="steps-post", label="frontier")
    axes.scatter(table[cost], table["R@1"], color=BLUE, zorder=3)
    if "low" in table:
        axes.errorbar(table[cost], table["R@1"], yerr=_whiskers(table, "R@1"), fmt="none", color=BLUE, capsize=3)
    for k, (name, row) in enumerate(table.sort_values(cost).iterrows()):
        # neighbours on other sides, and the dearest on the left, as its name might not fit on the right
        across, side = (-6, "right") if k % 2 or 0 < k == len(table) - 1 else (6, "left")
        axes.annotate(
            _plain(str(name)), (row[cost], row["R@1"]), (across, 8 if k % 2 else -14), textcoords="offset points",
            ha=side,
        )  # fmt: skip
    axes.set(xscale="log", xlabel=cost, ylabel="micro recall@1", ylim=(0, 1))
    intervals = ", 95 % intervals over documents" if "low" in table else ""
    axes.set_title(f"{questions} questions{intervals}", fontsize=10)
    axes.margins(x=0.35)
    axes.legend(loc="lower right")
    shown = "{:.3f} s" if cost.startswith("seconds") else "{:.0f} " + cost.split()[0]
    points = "; ".join(f"{name} {row['R@1']:.2f} in {shown.format(row[cost])}" for name, row in table.iterrows())
    figure.alt = f"Recall@1 against {cost}: {points}; the retriever {retriever:.2f}"
    return figure


def outcome_bars(counts: pd.DataFrame, title: str = "") -> Figure:
    """What became of the questions of each group (rows, all but "all"): shares of `analysis.count_outcomes`."""
    groups = counts.drop(index="all", errors="ignore")
    shares = groups.drop(columns="questions").div(groups["questions"], axis=0)
    figure = Figure(figsize=(9, 0.36 * len(groups) + 1.4), layout="constrained")
    axes = figure.subplots()
    left = pd.Series(0.0, index=shares.index)
    names = [_plain(f"{name} (n = {n})") for name, n in groups["questions"].items()]
    for column, (colour, hatch) in zip(shares, OUTCOMES, strict=True):
        if shares[column].any():
            axes.barh(names, shares[column], left=left, label=column, color=colour, hatch=hatch, edgecolor="white")
        left += shares[column]
    axes.invert_yaxis()
    axes.set(xlabel="share of the questions", xlim=(0, 1), title=_plain(title))
    figure.legend(loc="outside upper center", ncols=3)
    told = "; ".join(
        f"{name} " + ", ".join(f"{column} {int(n)}" for column, n in row.items() if n)
        for name, row in groups.drop(columns="questions").iterrows()
    )
    figure.alt = f"{title or 'Outcomes'} by group: {told}"
    return figure


def group_bars(tables: dict[str, pd.DataFrame], measure: str = "R@1") -> Figure:
    """`metrics.breakdown` of each system: a row a group, a mark a system, and what the best order would reach.

    The ceiling is the first system's. Groups' n stand at their names. Whiskers where the tables hold intervals.
    """
    first = next(iter(tables.values()))
    figure = Figure(figsize=(9, 0.5 * len(first) + 1.3), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(first))
    axes.scatter(first[f"{measure} candidates"], places, marker="|", s=400, color="black", label="best order")
    shifts = np.linspace(-0.25, 0.25, len(tables)) if len(tables) > 1 else [0.0]
    for (name, table), shift, colour, marker in zip(
        tables.items(), shifts, (GREY, ORANGE, BLUE, GREEN, PURPLE), "osD^v", strict=False
    ):
        axes.errorbar(
            table[measure], places + shift, xerr=_whiskers(table, measure) if f"{measure} low" in table else None,
            color=colour, fmt=marker, markersize=6, elinewidth=1, label=_plain(name), zorder=3,
        )  # fmt: skip
    axes.set_yticks(places, [_plain(f"{group} (n = {n:.0f})") for group, n in first["questions"].items()])
    axes.grid(axis="y", alpha=0.3)
    axes.set(xlabel=measure, xlim=(-0.03, 1.03), ylim=(len(first) - 0.5, -0.5))
    figure.legend(loc="outside upper center", ncols=5)
    told = "; ".join(
        f"{group}: "
        + ", ".join(f"{name} {table.loc[group, measure]:.2f}" for name, table in tables.items())
        + f", best order of the candidates {first.loc[group, f'{measure} candidates']:.2f}"
        for group in first.index
    )
    figure.alt = f"{measure} by {first.index.name}, {told}"
    return figure


def position_curve(bias: pd.DataFrame) -> Figure:
    """`audit.position_bias`: how often each place of the prompt is ranked first, and found when it is right."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = ((left, "first", "shown", "ranked first", BLUE), (right, "found", "gold", "found when right", GREEN))
    for axes, name, n, title, colour in parts:
        axes.errorbar(bias.index, bias[name], yerr=_whiskers(bias, name), color=colour, marker="o", capsize=3)
        axes.set(title=title, xlabel="place in the prompt", ylabel="share of the rankings", ylim=(0, 1.05))
        axes.set_xticks(bias.index, [f"{place}\nn = {count}" for place, count in bias[n].items()])
    left.plot(bias.index, bias["even"], color=GREY, linestyle=":", label="no liking for a place")
    left.legend()
    ends = "; ".join(
        f"place {place}: ranked first {row['first']:.2f}, found {row['found']:.2f}" for place, row in bias.iterrows()
    )
    figure.alt = f"Position bias, with 95 % intervals over documents. {ends}"
    return figure


def faithfulness(table: pd.DataFrame) -> Figure:
    """`robustness.faithfulness`: a panel a measure, a point a perturbation, with 95 % intervals over documents."""
    measures = list(dict.fromkeys(table["measure"]))
    names = list(dict.fromkeys(table["perturbation"]))
    rows = -(-len(measures) // 4)
    figure = Figure(figsize=(10, 0.3 * rows * (len(names) + 3)), layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False, sharey=True, sharex=True)
    for k, axes in enumerate(grid.flat):
        if k >= len(measures):
            axes.axis("off")
            continue
        part = table[table["measure"] == measures[k]].set_index("perturbation").reindex(names)
        axes.errorbar(part["mean"], range(len(names)), xerr=_whiskers(part, "mean"), fmt="o", color=BLUE, capsize=3)
        for y, (mean, n) in enumerate(zip(part["mean"], part["questions"], strict=True)):
            if pd.notna(mean):
                axes.annotate(f"{mean:.2f} (n = {n:.0f})", (0.03, y - 0.22), fontsize=7, color=GREY)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1.03), ylim=(len(names) - 0.5, -0.7))
        axes.set_title(measures[k], fontsize=10)
    told = "; ".join(f"{row.perturbation}, {row.measure}: {row.mean:.2f}" for row in table.itertuples())
    figure.alt = f"Faithfulness under perturbations, with 95 % intervals over documents. {told}"
    return figure


def _whiskers(table: pd.DataFrame, name: str) -> list[pd.Series]:
    """Distances from a mean to its interval's ends; none where there is no interval."""
    named = f"{name} low" in table
    low, high = (table[f"{name} {end}"] if named else table[end] for end in ("low", "high"))
    return [(table[name] - low).fillna(0).clip(lower=0), (high - table[name]).fillna(0).clip(lower=0)]


def parallel_axes(table: pd.DataFrame, settings: Sequence[str], figure_of_merit: str = "micro R@1") -> Figure:
    """Each row of a leaderboard as a line through its settings to its figure of merit; better lines are darker.

    settings: columns with numbers or names, an axis each; values stand in order of size (names: of the alphabet)
    """
    figure = Figure(figsize=(2.2 * (len(settings) + 1) + 1, 4), layout="constrained")
    axes = figure.subplots()
    merit = table[figure_of_merit].astype(float)
    scaled = (merit - merit.min()) / (merit.max() - merit.min() or 1)
    steps = {name: {v: k for k, v in enumerate(sorted(table[name].unique(), key=_sortable))} for name in settings}
    heights = pd.DataFrame({n: table[n].map(step) / max(1, len(step) - 1) for n, step in steps.items()}) * 0.9 + 0.05
    heights[figure_of_merit] = scaled * 0.9 + 0.05
    for (_, line), shade in sorted(zip(heights.iterrows(), scaled, strict=True), key=lambda pair: pair[1]):
        colour = BLUE if shade == 1 else GREY
        axes.plot(range(len(line)), line, color=colour, alpha=0.2 + 0.8 * shade, linewidth=1 + 2 * shade, marker="o")
    for x, step in enumerate(steps.values()):
        axes.axvline(x, color="#bbbbbb", linewidth=1, zorder=0)
        for value, k in step.items():
            axes.annotate(
                f"{value}", (x, k / max(1, len(step) - 1) * 0.9 + 0.05), (-6, 5), textcoords="offset points", ha="right"
            )
    axes.axvline(len(settings), color="#bbbbbb", linewidth=1, zorder=0)
    for value in (merit.min(), merit.max()):
        height = 0.05 + 0.9 * (value - merit.min()) / (merit.max() - merit.min() or 1)
        axes.annotate(f"{value:.3f}", (len(settings), height), (6, -3), textcoords="offset points")
    axes.set_xticks(range(len(settings) + 1), [*settings, figure_of_merit])
    axes.set(yticks=[], ylim=(0, 1.06), xlim=(-0.4, len(settings) + 0.4))
    axes.spines[:].set_visible(False)
    best = table.loc[merit.index[merit.argmax()]] if table.index.is_unique else table.iloc[int(merit.argmax())]
    told = ", ".join(f"{name} {best[name]}" for name in settings)
    figure.alt = (
        f"{len(table)} settings against {figure_of_merit}, {merit.min():.3f} to {merit.max():.3f}; best: {told}"
    )
    return figure


def seed_spread(values: Mapping[str, Sequence[float]], figure_of_merit: str = "micro R@1") -> Figure:
    """A figure of merit of each system, a point a seed, and the mean as a stroke: is a difference more than seeds?"""
    figure = Figure(figsize=(8, 0.5 * len(values) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, seeds in enumerate(values.values()):
        mean = sum(seeds) / len(seeds)
        axes.plot([mean, mean], [y - 0.3, y + 0.3], color=ORANGE, linewidth=3, label="mean" if y == 0 else None)
        axes.scatter(seeds, [y] * len(seeds), color=BLUE, zorder=3, label="a seed" if y == 0 else None)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set(xlabel=figure_of_merit, ylim=(len(values) - 0.4, -0.6))
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=2)
    told = "; ".join(f"{name} {min(v):.3f} to {max(v):.3f} ({len(v)})" for name, v in values.items())
    figure.alt = f"{figure_of_merit} by system, lowest and highest seed (number of seeds): {told}"
    return figure


def _sortable(value: object) -> tuple[bool, float, str]:
    return (True, 0.0, str(value)) if not isinstance(value, numbers.Real) else (False, float(value), "")


def _plain(text: str) -> str:
    """Text of others for a figure: dollar signs begin no formula, control characters are shown as escapes."""
    return visible(text).replace("$", r"\$")


def _page(axes: Axes, image: Image.Image, caption: str, gold: bool) -> None:
    axes.imshow(image)
    axes.set_title((f"{GOLD_MARK} gold\n" if gold else "") + _plain(caption), fontsize=8, y=-0.05, va="top")
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
