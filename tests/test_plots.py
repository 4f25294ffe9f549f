"""Figures carry a description with the figures' own numbers, and notebooks get it beside the picture."""

import pandas as pd
import pytest
from PIL import Image

from mmr5_lab import plots

PAGES = [Image.new("RGB", (14, 17), shade) for shade in ("white", "red", "blue")]
GRPO = pd.DataFrame({
    "step": [1, 2, 3, 4], "rewards/rank_reward/mean": [0.2, 0.4, 0.6, 0.8],
    "rewards/format_reward/mean": [1.0] * 4, "frac_reward_zero_std": [0.5] * 4, "completions/mean_length": [80.0] * 4,
})  # fmt: skip
TABLE = pd.DataFrame({"R@1": [0.5, 0.75], "R@3": [0.8, 0.9]}, index=["BM25", "SFT"])


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (lambda: plots.page_sheet(PAGES, ["a", "b", "c"]), "3 page images: a, b, c"),
        (lambda: plots.trace_figure(PAGES, [2], "Image 2: it", "Why?"), "'Why?', right: image 2. Image 2: it"),
        (lambda: plots.loss_curve(pd.DataFrame({"step": [1, 2], "loss": [1.5, 0.25]})), "1.50 at first, 0.25 at last"),
        (lambda: plots.reward_curves(GRPO), "rank_reward 0.20, 0.80; format_reward 1.00, 1.00"),
        (
            lambda: plots.before_after(PAGES, {"BM25": [0, 1, 2], "SFT": [2, 0, 1]}, [2], "Why?"),
            "BM25 at rank 3; SFT at rank 1",
        ),
        (lambda: plots.recall_bars(TABLE, ceiling=0.9), "BM25 R@1 0.500, R@3 0.800; SFT R@1 0.750"),
        (
            lambda: plots.frontier(pd.DataFrame({"seconds a query": [0.1], "R@1": [0.5]}, index=["score"]), 0.25, 40),
            "score 0.50 in 0.100 s; the retriever 0.25",
        ),
    ],
)  # fmt: skip
def test_every_figure_says_what_it_shows(figure, said):
    drawn = figure()
    assert said in drawn.alt
    data, metadata = drawn._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert metadata["image/png"]["alt"] == drawn.alt


def test_a_figure_that_a_notebook_shows_comes_with_its_description():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    data, metadata = shell.display_formatter.format(plots.page_sheet(PAGES, ["a", "b", "c"]))
    assert metadata["image/png"]["alt"] == "3 page images: a, b, c"
    assert set(data) == {"image/png", "text/plain"}
