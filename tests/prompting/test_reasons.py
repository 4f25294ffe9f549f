"""Reasoning comes apart by image, whatever markup stands around the images' names."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_lab.prompting.reasons import reasoning_by_image, reasons_in_order


@pytest.mark.parametrize(
    ("think", "parts"),
    [
        ("Image 1: a b.\nImage 2: c.", {1: "a b.", 2: "c."}),
        (
            "First. Image 2 shows it, unlike Image 1. Image 3 does not.",
            {2: "Image 2 shows it, unlike Image 1.", 3: "Image 3 does not."},
        ),
        ("Image 1: a.\nImage 9: z.\nImage 1: b.", {1: "a.\nb."}),
        ("Image 2 is like Image 1: both fail.", {2: "Image 2 is like", 1: "both fail."}),
        ("The other images do not.", {}),
        ("", {}),
        ("**Image 1**: a **chart**.\n**Image 2:** no.", {1: "a chart.", 2: "no."}),
        ("1. **Image 1:** a\n2. **Image 2:** b", {1: "a", 2: "b"}),
        ("### Image 1\nA chart.\n\n### Image 2:\nA table.", {1: "A chart.", 2: "A table."}),
        ("### Image 1\nA chart.\n\n### Conclusion\nIt has it.", {1: "A chart."}),
        ("**Image 1**\nA chart.\n**Summary**\nIt has it.", {1: "A chart."}),
        ("[Image 1]: a\n[Image 2]: b", {1: "a", 2: "b"}),
        ("image 1 shows a. image 2 shows b.", {1: "image 1 shows a.", 2: "image 2 shows b."}),
        ("IMAGE 1 – a\nImage #2 - b", {1: "a", 2: "b"}),
        ("- **Image 1 (page 3):** a\n- **Image 2** (relevant): b", {1: "(page 3) a", 2: "(relevant) b"}),
        ("**Image 1 shows** the year.", {1: "Image 1 shows the year."}),
        ("| Image 1 | a chart |\n| Image 2 | a table |", {1: "a chart", 2: "a table"}),
        ("Image 1: 2 * 3, *so* a*b\n* one\n* two", {1: "2 * 3, so a*b\n- one\n- two"}),
        ("图1：有表格。图2：没有。", {1: "有表格。", 2: "没有。"}),
        ("Images 1 and 2 are charts.", {}),
    ],
)
def test_reasoning_comes_apart_by_image(think, parts):
    assert reasoning_by_image(think, 3) == parts


FORMS = [
    "Image {}: ",
    "**Image {}**: ",
    "**Image {}:** ",
    "### Image {}\n",
    "[Image {}]: ",
    "image {}: ",
    "- Image {} - ",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a chart", "it has *no* table", "**nothing**"]), max_size=12), st.sampled_from(FORMS))
def test_one_reason_an_image_and_no_asterisks(reasons, form):
    think = "\n".join(form.format(i) + reason for i, reason in enumerate(reasons, 1))
    plain = [reason.replace("*", "") for reason in reasons]
    assert reasons_in_order(think, range(len(reasons))) == plain


@given(st.text(alphabet="Image 12:.\n", max_size=200), st.integers(1, 5))
def test_any_reasoning_comes_apart(think, n):
    parts = reasoning_by_image(think, n)
    assert set(parts) <= set(range(1, n + 1))
    assert all(line in think for text in parts.values() for line in text.split("\n"))


def test_reasons_follow_an_order_and_the_images_that_were_shown():
    think = "Image 1: a chart. Image 2: a table."
    assert reasons_in_order(think, [1, 0]) == ["a table.", "a chart."]
    assert reasons_in_order(think, [2, 0, 1], shown=[2, 1]) == ["a chart.", "", "a table."]
    assert reasons_in_order(None, [0]) == [""]
    assert reasons_in_order(math.nan, [0]) == [""], "as pandas keeps a missing text"


@pytest.mark.parametrize("unit", ["*", "#", "[[(", "1. ", "Image 1 (", "Image 1**", " Image 1: a", "**a**\n"])
def test_time_is_linear(unit):
    def seconds(size):
        start = time.process_time()
        reasoning_by_image(unit * (size // len(unit)), 3)
        return time.process_time() - start

    assert seconds(1_000_000) < 30 * min(seconds(100_000), seconds(100_000)) + 0.1
