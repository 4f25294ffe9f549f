"""The strict rewards leave nothing to gain but a good ranking; the released ones are the released code's."""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmr5_lab.prompting.prompts import completion_text
from mmr5_lab.rewards import (
    direct_format_reward,
    format_reward,
    ndcg_reward,
    rank_reward,
    released_format_reward,
    released_rank_reward,
)

VECTORS = json.loads((Path(__file__).parent / "data" / "reward_vectors.json").read_text(encoding="utf-8"))["cases"]
STRICT = [rank_reward, format_reward, ndcg_reward]
RELEASED = [released_rank_reward, released_format_reward]
T = "<think>Image 3 matters.</think>"


def one(reward, text, positives=(3,), n=5):
    return reward([text], [list(positives)], [n])[0]


def answer(ids):
    return f"{T}<answer>{list(ids)}</answer>"


@pytest.mark.parametrize("case", VECTORS, ids=[c["case"] for c in VECTORS])
def test_released_rewards_are_the_released_numbers(case):
    columns = [case["completion"]], [case["positive_ids"]], [case["num_candidates"]]
    assert released_rank_reward(*columns) == pytest.approx([case["released_rank"]], abs=1e-12)
    assert released_format_reward(*columns) == pytest.approx([case["released_format"]], abs=1e-12)


# What the vectors do not show but the released code does; its list is evaluated as Python source.
@pytest.mark.parametrize(
    ("text", "rank", "format_"),
    [
        (T + "<answer>[3,\t1]</answer>", 1, 0.4),  # a tab is a blank to Python
        (T + "<answer>[3,\u00a01]</answer>", 1, 0),  # a no-break space is not
        (T + "<answer>[3, 01]</answer>", 1, 0),  # 01 is no Python number
        (T + "<answer>[3, 00]</answer>", 1, 0.2),  # 00 is
        (T + "<answer>[3, 0]</answer>", 1, 0.2),  # 2 of 5 places, half of them in range
        (T + "<answer>[+3, 1]</answer>", 1, 0),
        (T + "<answer>[3,, 1]</answer>", 1, 0),
        (T + "<answer>[]</answer>", 0, 0),
        (T + "<answer>[ 3, 1]</answer>", 1, 0),
        ("</think>" + T + "<answer>[3, 1]</answer>", 1, 0.4),
        ("<think>a</think> b</think><answer>[3, 1]</answer>", 1, 0.4),
        ("</think><answer>[3, 1]</answer>", 1, 0),
        ("<answer>[\n]</answer><answer>[3]</answer>", 1, 0),  # the first on one line
        (T + f"<answer>[3, {'1' * 4301}]</answer>", 0, 0),  # more digits than Python converts
    ],
)
def test_released_rewards_where_the_vectors_are_silent(text, rank, format_):
    assert one(released_rank_reward, text) == pytest.approx(rank)
    assert one(released_format_reward, text) == pytest.approx(format_)


# ids written, positives, n: rank, format, nDCG
LOG2 = math.log2
LISTS = {
    "positive first": ([3, 1, 2, 4, 5], [3], 5, 1, 1, 1),
    "positive second": ([1, 3, 2, 4, 5], [3], 5, 1 / 8, 1, 1 / LOG2(3)),
    "both first, either order": ([4, 3, 1, 2, 5], [3, 4], 5, 1, 1, 1),
    "second positive at rank 3": (
        [3, 1, 4, 2, 5],
        [3, 4],
        5,
        (1 + 1 / 27) / (1 + 1 / 8),
        1,
        (1 + 1 / 2) / (1 + 1 / LOG2(3)),
    ),
    "second positive at rank 4": ([3, 1, 2, 4, 5], [3, 4], 5, (1 + 1 / 64) / (9 / 8), 1, None),
    "repeats: three wasted places": ([3, 3, 3, 3, 3], [3], 5, 1, 1 / 5, 1),
    "twelve ids: five of twelve": ([3, 1, 2, 4, 5, 1, 2, 4, 5, 1, 2, 4], [3], 5, 1, 5 / 12, 1),
    "only the positive": ([3], [3], 5, 1, 1 / 5, 1),
    "ids out of range take places": ([9, 8, 3], [3], 5, 1 / 27, 1 / 5, 1 / 2),
    "repeats take places": ([1, 1, 3], [3], 5, 1 / 27, 2 / 5, 1 / 2),
    "positive repeated later": ([3, 1, 3, 4, 5], [3, 4], 5, (1 + 1 / 64) / (9 / 8), 4 / 5, None),
    "positive not written": ([1, 2, 4, 5], [3], 5, 0, 4 / 5, 0),
    "nothing written": ([], [3], 5, 0, 0, 0),
    "all are positive": ([2, 1], [1, 2], 2, 1, 1, 1),
    "one candidate": ([1], [1], 1, 1, 1, 1),
}


@pytest.mark.parametrize("case", LISTS)
def test_strict_rewards_of_lists(case):
    ids, positives, n, rank, format_, ndcg = LISTS[case]
    assert one(rank_reward, answer(ids), positives, n) == pytest.approx(rank, abs=1e-12)
    assert one(format_reward, answer(ids), positives, n) == pytest.approx(format_, abs=1e-12)
    if ndcg is not None:
        assert one(ndcg_reward, answer(ids), positives, n) == pytest.approx(ndcg, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "rank", "format_"),
    [
        (T + " \n<answer>[3,\n1, 2, 4, 5]</answer>\n", 1, 1),  # white space is free
        ("<answer>[3, 1, 2, 4, 5]</answer>", 1, 0),  # no think
        ("<think> </think><answer>[3, 1, 2, 4, 5]</answer>", 1, 0),  # blank think
        (T + "<answer>[3, 1, 2, 4, 5]</answer> done", 1, 0),
        (T + "<answer>[image 3, 1, 2, 4, 5]</answer>", 1, 0),
        (T + "<answer>3, 1, 2, 4, 5</answer>", 1, 0),
        (T + "<answer>[3, 1, 2, 4, 5]", 1, 0),  # cut
        # A rank is earned in any form that a person would read, the format reward in the asked one alone.
        (T + "<answer>1. Image 3\n2. Image 1\n3. Image 2\n4. Image 4\n5. Image 5</answer>", 1, 0),
        (T + '<answer>{"1": 3, "2": 1, "3": 2, "4": 4, "5": 5}</answer>', 1, 0),
        (T + "<answer>[２, ３, 1, 4, 5]</answer>", 1 / 8, 0),
        (T + "<Answer>[3, 1, 2, 4, 5]</Answer>", 1, 0),
        (T + "[3, 1, 2, 4, 5]", 1, 0),
        (T + "\\boxed{[3, 1, 2, 4, 5]}", 1, 0),
        ("Image 3 matters.</think><answer>[3, 1, 2, 4, 5]</answer>", 1, 0),
        ("<think>Image 3 matters.<answer>[3, 1, 2, 4, 5]</answer>", 1, 0),
        ("<think>Perhaps <answer>[3, 1, 2, 4, 5]</answer>, but", 0, 0),  # cut off while rehearsing
        (T + "<answer>[2, 0, 1, 3, 4]</answer>", 1, 4 / 5),  # from 0: of the ids as written, 0 is out of range
        (T, 0, 0),
        ("", 0, 0),
        # Only the last answer outside think counts.
        ("<think><answer>[3, 1, 2, 4, 5]</answer></think><answer>[1, 2, 4, 5, 3]</answer>", 1 / 125, 1),
        (T + "<answer>[3, 1, 2, 4, 5]</answer><answer>[1, 2, 4, 5, 3]</answer>", 1 / 125, 0),
        ("<think><answer>[3, 1, 2, 4, 5]</answer></think>", 0, 0),
    ],
)
def test_strict_rewards_of_structure(text, rank, format_):
    assert one(rank_reward, text) == pytest.approx(rank)
    assert one(format_reward, text) == pytest.approx(format_)


@pytest.mark.parametrize("reward", [*STRICT, *RELEASED])
def test_completions_may_be_messages(reward):
    text = answer([3, 1, 2, 4, 5])
    forms = [
        text,
        [{"role": "assistant", "content": text}],
        [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
        [
            {
                "role": "assistant",
                "content": [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}],
            }
        ],
    ]
    rewards = reward(forms, [[3]] * 4, [5] * 4, prompts=["?"] * 4, trainer_state=None)
    assert rewards == [1.0] * 4
    assert all(type(r) is float for r in rewards)


@pytest.mark.parametrize("reward", [*STRICT, *RELEASED])
def test_messages_without_text_earn_nothing(reward):
    forms = [[{"role": "assistant", "content": None}], [{"role": "assistant", "content": []}], []]
    assert reward(forms, [[3]] * 3, [5] * 3) == [0.0] * 3


@pytest.mark.parametrize("reward", [*STRICT, *RELEASED])
def test_faulty_columns_are_named(reward):
    with pytest.raises(ValueError, match=r"2 completions, 1 positive_ids, 2 num_candidates.* is 1"):
        reward(["", ""], [[1]], [2, 2])
    with pytest.raises(TypeError, match="completion 1 is neither"):
        reward(["", 3], [[1], [1]], [2, 2])
    assert reward([], [], []) == []


@pytest.mark.parametrize("reward", STRICT)
@pytest.mark.parametrize(
    ("positives", "n", "message"),
    [
        ([], 2, "positive_ids of index 1 is empty"),
        ([0, 2], 2, r"positive_ids of index 1 holds \[0\], outside 1..2"),
        ([3], 2, r"positive_ids of index 1 holds \[3\]"),
        ([1], 0, r"positive_ids of index 1 holds \[1\], outside 1..0"),
    ],
)
def test_faulty_gold_is_named(reward, positives, n, message):
    with pytest.raises(ValueError, match=message):
        reward(["", ""], [[1], positives], [2, n])


PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "[", "]", ",", " ", "\n", "0", "1", "2", "3", "9", "-", "x"),
    *("Image ", "rank ", "1. ", "2. ", "{", "}", '"', ":", ">", "< answer>", "３"),
]
TEXTS = st.one_of(
    st.text(),
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.lists(st.integers(-1, 7), max_size=14).map(answer),
)


@st.composite
def tasks(draw):
    n = draw(st.integers(1, 6))
    positives = draw(st.sets(st.integers(1, n), min_size=1))
    return sorted(positives), n


@settings(deadline=None)
@given(text=TEXTS, task=tasks())
def test_no_text_earns_more_than_the_honest_best(text, task):
    positives, n = task
    honest = completion_text("Image 1 fits.", [*positives, *(i for i in range(1, n + 1) if i not in positives)])
    parts = {reward: one(reward, text, positives, n) for reward in STRICT}
    assert all(0 <= r <= 1 for r in parts.values())
    for first in (rank_reward, ndcg_reward):
        best = one(first, honest, positives, n) + one(format_reward, honest, positives, n)
        assert best == pytest.approx(2)
        assert parts[first] + parts[format_reward] <= best + 1e-12


@settings(deadline=None)
@given(ids=st.lists(st.integers(1, 6), min_size=1, max_size=10), task=tasks(), data=st.data())
def test_a_repeat_never_gains(ids, task, data):
    """Write any id again, anywhere after its first mention: no reward rises."""
    source = data.draw(st.integers(0, len(ids) - 1))
    place = data.draw(st.integers(source + 1, len(ids)))
    longer = [*ids[:place], ids[source], *ids[place:]]
    for reward in STRICT:
        assert one(reward, answer(longer), *task) <= one(reward, answer(ids), *task) + 1e-12


@settings(deadline=None)
@given(ids=st.lists(st.integers(1, 6), max_size=10), task=tasks(), data=st.data())
def test_padding_with_unknown_ids_never_gains(ids, task, data):
    place = data.draw(st.integers(0, len(ids)))
    longer = [*ids[:place], data.draw(st.integers(7, 99)), *ids[place:]]
    for reward in STRICT:
        assert one(reward, answer(longer), *task) <= one(reward, answer(ids), *task) + 1e-12


@settings(deadline=None)
@given(task=tasks(), data=st.data())
def test_full_format_means_a_permutation(task, data):
    positives, n = task
    ids = data.draw(st.lists(st.integers(0, n + 1), max_size=n + 2))
    full = one(format_reward, answer(ids), positives, n) == 1
    assert full == (sorted(ids) == list(range(1, n + 1)))


@settings(deadline=None)
@given(task=tasks(), data=st.data())
def test_moving_a_positive_up_never_costs(task, data):
    positives, n = task
    ids = data.draw(st.permutations(range(1, n + 1)))
    place = data.draw(st.integers(0, n - 1))
    assume(place > 0 and ids[place] in positives)
    better = [*ids[: place - 1], ids[place], ids[place - 1], *ids[place + 1 :]]
    for reward in (rank_reward, ndcg_reward):
        assert one(reward, answer(better), *task) >= one(reward, answer(ids), *task) - 1e-12


@settings(deadline=None)
@given(text=st.one_of(TEXTS, st.text(alphabet="<answer>[]/think 0123,\n\t", max_size=60)), task=tasks())
def test_released_rewards_never_raise(text, task):
    for reward in RELEASED:
        assert math.isfinite(one(reward, text, *task))


@pytest.mark.parametrize("reward", [*STRICT, *RELEASED])
@pytest.mark.parametrize(
    "unit",
    ["<answer>[", "]</answer>", "<answer>[\n", "<think>", "</think>", "</think> <answer>[1,", "1,", "9", " "],
)
@pytest.mark.parametrize("opening", ["", "<think>a</think><answer>["])
def test_adversarial_texts_are_quick(reward, opening, unit):
    # 50,000 repeats in quadratic time would take minutes; in linear time, some hundredths of a second.
    start = time.perf_counter()
    assert math.isfinite(one(reward, opening + unit * 50_000))
    assert time.perf_counter() - start < 3


def test_a_direct_answer_earns_its_form_without_reasoning_and_loses_it_with():
    """An empty block or none; 2 of 3 ids; words in the block; words after the answer."""
    texts = [
        "<think></think><answer>[3, 1, 2]</answer>",
        "<answer>[3, 1, 2]</answer>",
        "<think>\n</think><answer>[3, 3, 2]</answer>",
        "<think>Image 3.</think><answer>[3, 1, 2]</answer>",
        "<think></think><answer>[3, 1, 2]</answer> so",
    ]
    assert direct_format_reward(texts, [[3]] * 5, [3] * 5) == [1, 1, pytest.approx(2 / 3), 0, 0]
    assert rank_reward(texts, [[3]] * 5, [3] * 5) == [1, 1, 1, 1, 1]
