"""Figures carry a description with the figures' own numbers, and notebooks get it beside the picture."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from mmr5_lab.views import plots

PAGES = [Image.new("RGB", (14, 17), shade) for shade in ("white", "red", "blue")]
GRPO = pd.DataFrame({
    "step": [1, 2, 3, 4], "rewards/rank_reward/mean": [0.2, 0.4, 0.6, 0.8],
    "rewards/format_reward/mean": [1.0] * 4, "frac_reward_zero_std": [0.5] * 4, "completions/mean_length": [80.0] * 4,
})  # fmt: skip
BOARD = pd.DataFrame({"RANK": [8, 16, 32], "teacher": ["a", "a", "b"], "micro R@1": [0.5, 0.9, 0.8]})
ANSWERS = pd.DataFrame({
    "step": [1, 2], "answers/valid": [0.5, 1.0], "faults/missing": [0.5, 0.0], "order/tau": [0.0, 0.1],
    "entropy": [1, 2],
})  # fmt: skip
REPLAYED = pd.DataFrame(
    {"no_variance": [0.25, 0.5], "best_right": [1.0, 0.9], "agreement": [1.0, 0.8]}, index=["strict", "mine"]
)
TABLE = pd.DataFrame({"R@1": [0.5, 0.75], "R@3": [0.8, 0.9]}, index=["BM25", "SFT"])
COST = pd.DataFrame(
    {"seconds a query": [0.5, 2.0], "R@1": [0.5, 0.75], "low": [0.4, 0.7], "high": [0.6, 0.8]}, ["one", "three"]
)
OUTCOMES = pd.DataFrame(
    [[3, 0, 0, 0, 0, 1, 4], [0, 0, 2, 0, 0, 0, 2], [3, 0, 2, 0, 0, 1, 6]], ["Laws", "News", "all"],
    ["hit", "ambiguous gold", "candidate miss", "truncation", "fault", "inversion", "questions"],
)  # fmt: skip
BIAS = pd.DataFrame(
    [[0.6, 0.5, 0.7, 0.5, 9, 0.8, 0.7, 0.9, 5], [0.4, 0.3, 0.5, 0.5, 9, float("nan"), float("nan"), float("nan"), 0]],
    [1, 2], ["first", "first low", "first high", "even", "shown", "found", "found low", "found high", "gold"],
)  # fmt: skip
PERTURBATIONS = pd.DataFrame({
    "perturbation": ["blank", "swap"], "measure": ["called relevant"] * 2, "mean": [0.1, 0.9], "low": [0.0, 0.8],
    "high": [0.2, 1.0], "questions": [9, 9],
})  # fmt: skip
PAID = pd.DataFrame({"rank_reward": [1, 0.125, 0.037], "ndcg_reward": [1, 0.631, 0.5]}, [1, 2, 3])
CHEATS = pd.DataFrame(
    {"paid": [2.0, 1.0], "honest": [2.0, 2.0], "pays": [True, False]}, ["the best id again", "one id, to be safe"]
)
GROUPS = pd.DataFrame(
    {"R@1": [0.5, 0.6], "R@1 candidates": [0.9, 0.9], "R@1 all pages": [1.0, 1.0], "questions": [4, 4]},
    pd.Index(["Table", "all"], name="type"),
)


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (lambda: plots.page_sheet(PAGES, ["a", "b", "c"]), "3 page images: a, b, c"),
        (lambda: plots.trace_figure(PAGES, [2], "Image 2: it", "Why?"), "at rank 2. as in the prompt says: 2: it"),
        (lambda: plots.loss_curve(pd.DataFrame({"step": [1, 2], "loss": [1.5, 0.25]})), "1.50 at first, 0.25 at last"),
        (lambda: plots.reward_curves(GRPO), "rank reward 0.20, 0.80; format reward 1.00, 1.00"),
        (lambda: plots.answer_curves(ANSWERS), "valid 0.50, 1.00; missing 0.50, 0.00; Kendall tau 0.00, 0.10"),
        (
            lambda: plots.reward_bars(REPLAYED),
            "without variance 0.25, best-rewarded answer is right 1.00, agreement with strict 1.00; mine groups",
        ),
        (
            lambda: plots.reward_by_rank(PAID),
            "rank_reward 1: 1.00, 2: 0.12, 3: 0.04; ndcg_reward 1: 1.00, 2: 0.63, 3: 0.50",
        ),
        (
            lambda: plots.group_advantages([2, 1, 1, 2], [0.87, -0.87, -0.87, 0.87], ["a", "b", "c", "d"]),
            "4 completions, mean 1.50, std 0.58. Reward, advantage: 2.00, +0.87; 1.00, -0.87; 1.00, -0.87; 2.00, +0.87",
        ),
        (
            lambda: plots.exploits({"released": CHEATS, "strict": CHEATS.assign(pays=False)}),
            "those that pay: released: the best id again (2.00, honest 2.00); strict: none",
        ),
        (
            lambda: plots.before_after(PAGES, {"BM25": [0, 1, 2], "SFT": [2, 0, 1]}, [2], "Why?"),
            "BM25 at rank 3; SFT at rank 1",
        ),
        (
            lambda: plots.before_after(PAGES, {"SFT": [2, 0, 1]}, [2], "Why?", {"SFT": ["it answers", "", "no"]}),
            "SFT at rank 1. SFT says: 1: it answers 3: no",
        ),
        (lambda: plots.recall_bars(TABLE, ceiling=0.9), "BM25 R@1 0.500, R@3 0.800; SFT R@1 0.750"),
        (
            lambda: plots.parallel_axes(BOARD, ["RANK", "teacher"]),
            "3 settings against micro R@1, 0.500 to 0.900; best: RANK 16, teacher a",
        ),
        (
            lambda: plots.seed_spread({"BM25": [0.5], "SFT": [0.7, 0.75]}),
            "BM25 0.500 to 0.500 (1); SFT 0.700 to 0.750 (2)",
        ),
        (
            lambda: plots.frontier(pd.DataFrame({"seconds a query": [0.1], "R@1": [0.5]}, index=["score"]), 0.25, 40),
            "score 0.50 in 0.100 s; the retriever 0.25",
        ),
        (lambda: plots.frontier(COST, 0.25, 40), "a query: one 0.50 in 0.500 s; three 0.75 in 2.000 s"),
        (lambda: plots.outcome_bars(OUTCOMES, "SFT"), "SFT by group: Laws hit 3, inversion 1; News candidate miss 2"),
        (lambda: plots.position_curve(BIAS), "place 1: ranked first 0.60, found 0.80; place 2: ranked first 0.40"),
        (lambda: plots.faithfulness(PERTURBATIONS), "blank, called relevant: 0.10; swap, called relevant: 0.90"),
        (
            lambda: plots.group_bars({"BM25": GROUPS, "SFT": GROUPS + 0.25}, "R@1"),
            "R@1 by type, Table BM25 0.50, SFT 0.75, best order of the candidates 0.90",
        ),
    ],
)  # fmt: skip
def test_every_figure_says_what_it_shows(figure, said):
    drawn = figure()
    assert said in drawn.alt
    data, metadata = drawn._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert metadata["image/png"]["alt"] == drawn.alt


def test_the_token_that_is_enlarged_is_the_one_with_the_most_ink():
    """A page of 4 × 6 patches, so of 2 × 3 tokens, that holds one dark stroke: in the last token of the first row."""
    page = Image.new("RGB", (84, 56), "white")
    page.paste("black", (60, 4, 80, 10))
    drawn = plots.visual_tokens(page, 4, 6, 2)
    assert "4 × 6 patches; each 2 × 2 of them are one visual token, 6 in all" in drawn.alt
    assert "Token 3, enlarged, holds the part in row 1, column 3" in drawn.alt
    enlarged = np.asarray(drawn.axes[1].images[0].get_array())
    assert enlarged.shape == (28, 28)
    assert enlarged[4:10, 4:24].max() == 0
    assert enlarged[10:].min() == 255


def test_a_group_of_equals_and_a_page_of_many_tokens_are_drawn():
    assert "std 0.00" in plots.group_advantages([1, 1], [0, 0], ["no answer", "$_{"]).alt
    plots.group_advantages([1, 1], [0, 0], ["no answer", "$_{"])._repr_mimebundle_()
    assert len(plots.visual_tokens(Image.new("RGB", (850, 1100)), 78, 60, 2).axes[0].texts) == 0  # no room for numbers


# Machado, Oliveira and Fernandes 2009, table 1, severity 1: what is seen of linear RGB
SEEN = {
    "by most": np.eye(3),
    "without red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "without green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "without blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of a colour (D65), where 2 is a difference that one just sees."""
    rgb = np.array(to_rgb(colour))
    linear = np.clip(np.array(seen) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    x, y, z = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x / 0.9505, y, z / 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize(
    "colours",
    [
        (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PURPLE, plots.GREY),
        tuple(colour for colour, _ in plots.OUTCOMES),
    ],
    ids=["series", "outcomes"],
)
def test_colours_are_told_apart_by_the_colour_blind(colours, seen):
    nearest = min(np.linalg.norm(lab(a, seen) - lab(b, seen)) for a, b in itertools.combinations(colours, 2))
    assert nearest > 12


def test_series_are_told_apart_without_colour():
    """By hatch, dash or marker, so that a print in grey says the same."""
    bars = plots.recall_bars(TABLE.assign(**{"R@5": 1.0})).axes[0].containers
    assert len({bar[0].get_hatch() for bar in bars if hasattr(bar, "patches")}) == 3
    assert len({hatch for _, hatch in plots.OUTCOMES}) == len(plots.OUTCOMES)
    lines = plots.answer_curves(ANSWERS).axes[0].get_legend().get_lines()
    assert len({line.get_linestyle() for line in plots.reward_curves(GRPO).axes[0].get_legend().get_lines()}) == 2
    assert len({line.get_linestyle() for line in lines}) == len(lines)
    groups = plots.group_bars(dict.fromkeys("abcde", GROUPS)).axes[0].get_lines()
    assert len({line.get_marker() for line in groups} - {"|", "None"}) == 5


def test_a_figure_that_a_notebook_shows_comes_with_its_description():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    data, metadata = shell.display_formatter.format(plots.page_sheet(PAGES, ["a", "b", "c"]))
    assert metadata["image/png"]["alt"] == "3 page images: a, b, c"
    assert set(data) == {"image/png", "text/plain"}


def test_texts_of_others_are_neither_formulas_nor_controls():
    """A question with two dollar signs would be a formula, and one that matplotlib cannot read an error."""
    question, name = "From $5_{ to $^6, \x1b[1m how much?", "Costs in $ and $_{"
    figures = [
        plots.before_after(PAGES, {name: [0, 1, 2]}, [2], question),
        plots.trace_figure(PAGES, [2], f"Image 2: {question}", question),
        plots.page_sheet(PAGES, [name] * 3),
        plots.group_bars({"BM25": GROUPS.rename(index={"Table": name})}),
        plots.outcome_bars(OUTCOMES.rename(index={"Laws": name}), question),
        plots.frontier(COST.rename(index={"one": name}), 0.25, 40),
        plots.recall_bars(TABLE.rename(index={"SFT": name})),
    ]
    for figure in figures:
        figure._repr_mimebundle_()
    assert figures[0]._suptitle.get_text() == r"From \$5_{ to \$^6, \x1b[1m how much?"
