"""Rewards tried on answers that are known: the order they give, where they see no difference, the cheats they pay."""

import pandas as pd
import pytest

from mmr5_lab.rewards import REWARD_SETS
from mmr5_lab.training.reward_lab import battery, ranks, replay, summary


def answer(*ids: int) -> str:
    return f"<think>t</think><answer>{list(ids)}</answer>"


# Two groups of three completions; the right page is 3, then 1.
TABLE = pd.DataFrame({
    "step": 1, "query_id": ["a"] * 3 + ["b"] * 3, "candidates": [[1, 2, 3]] * 6, "num_candidates": 3,
    "positive_ids": [[3]] * 3 + [[1]] * 3,
    "text": [answer(3, 1, 2), answer(1, 3, 2), answer(1, 2, 3)] + [answer(1, 2, 3)] * 3,
    "answer": [[3, 1, 2], [1, 3, 2], [1, 2, 3]] + [[1, 2, 3]] * 3,
})  # fmt: skip


def first_place(completions, positive_ids, num_candidates, **columns):
    return [float(str(ids[0]) == text.split("[")[1][0]) for text, ids in zip(completions, positive_ids, strict=True)]


def test_a_replay_shows_the_order_within_groups_and_where_nothing_differs():
    replayed = replay({**REWARD_SETS, "first": first_place}, TABLE)
    assert replayed["strict"].tolist() == pytest.approx([2, 1 + 1 / 8, 1 + 1 / 27, 2, 2, 2])
    assert replayed["first"].tolist() == [1, 0, 0, 1, 1, 1]
    table = summary(replayed, ["strict", "first"])
    assert table["no_variance"].tolist() == [0.5, 0.5]
    assert table["best_right"].tolist() == [1, 1]
    # of the pairs (1, 2), (1, 3), (2, 3) the second reward orders two as the first does, and ties the third
    assert table.loc["first", "agreement"] == pytest.approx(2 / (3 * 2) ** 0.5)
    assert ranks(replayed, ["strict", "first"]).to_numpy().tolist() == [[1, 1], [2, 2], [3, 2], [1, 1], [1, 1], [1, 1]]


def test_a_reward_that_gives_no_number_is_named():
    with pytest.raises(ValueError, match="the reward 'broken' must give one finite number for each"):
        replay({"broken": lambda completions, **labels: [float("nan")] * len(completions)}, TABLE)
    with pytest.raises(ValueError, match="the reward 'short' must give one finite number for each"):
        replay({"short": lambda completions, **labels: [1.0]}, TABLE)


@pytest.mark.parametrize("name", ["strict", "ndcg"])
def test_no_exploit_pays_with_the_strict_rewards(name):
    for n in (2, 5, 10):
        for right in (1, n):
            assert not battery(REWARD_SETS[name], n, right)["pays"].any()


def test_the_released_rewards_pay_for_what_is_known_of_them():
    table = battery(REWARD_SETS["released"])
    assert set(table.index[table["pays"]]) == {
        "the best id again and again",
        "no reasoning",
        "words around the answer",
        "two answers, the second wrong",
        "the answer rehearsed in the reasoning",
    }
    assert table.loc["the answer rehearsed in the reasoning", "paid"] == 2


def test_an_honest_answer_is_paid_in_full_and_a_cheat_less():
    table = battery(REWARD_SETS["strict"])
    assert table.loc["the best id again and again", "paid"] == pytest.approx(1.2)  # rank 1, one distinct id of five
    assert table.loc["more ids than there are pages", ["paid", "honest"]].tolist() == [1.5, 2.0]
