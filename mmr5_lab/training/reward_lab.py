"""Try a reward before it trains anything: on saved completions, and on answers that are known to cheat.

    table = completions("runs/03_grpo/…")          # mmr5_lab.training.monitoring
    replay({"strict": rank_reward, "mine": my_reward}, table)
    battery([my_reward, format_reward])

A reward is a function as in `mmr5_lab.rewards`. GRPO sees only differences within a group, so two things matter: the
order in which a reward puts a group's completions, and in how many groups it sees no difference.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import completion_text
from mmr5_lab.training.monitoring import Reward, first_right


def replay(rewards: Mapping[str, Reward | Sequence[Reward]], table: pd.DataFrame) -> pd.DataFrame:
    """Return `table` with a column for each reward, or sum of several: what the saved completions would have earned.

    table: of `monitoring.completions`. Raises ValueError for a reward without one finite number for each completion.
    """
    labels = {name: list(table[name]) for name in ("positive_ids", "num_candidates")}
    texts = list(table["text"])
    return table.assign(**{name: _total(reward, texts, labels, name) for name, reward in rewards.items()})


def _total(rewards: Reward | Sequence[Reward], texts: list[str], labels: Mapping[str, Any], name: str) -> list[float]:
    """Return the sum of the rewards for each text. Raises ValueError as `replay`."""
    rewards = [rewards] if callable(rewards) else rewards
    values = pd.DataFrame([list(reward(texts, **labels)) for reward in rewards], dtype=float)  # short rows get nan
    if values.shape[1] != len(texts) or not np.isfinite(values.to_numpy()).all():
        raise ValueError(f"the reward {name!r} must give one finite number for each completion, and does not")
    return values.sum().tolist()


def summary(replayed: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return one row a reward: how it would have taught on replayed completions.

    Columns: mean, spread (mean standard deviation within a group), no_variance (share of groups in which all earn the
    same), best_right (among groups in which some completions name a right page first and others do not, the share in
    which all of the highest reward do), agreement (mean Kendall tau within a group with the first of `names`).
    """
    known = replayed.assign(right=first_right(replayed), prompt=[tuple(pages) for pages in replayed["candidates"]])
    grouped = [group for _, group in known.groupby(["step", "query_id", "prompt"], sort=False)]
    mixed = [group for group in grouped if 0 < group["right"].mean() < 1]
    rows = {}
    for name in names:
        # nan, which the mean leaves out, where either reward sees no difference
        taus = pd.Series([kendalltau(group[names[0]], group[name]).statistic for group in grouped], dtype=float)
        best = [group.loc[group[name] >= group[name].max() - 1e-9, "right"].all() for group in mixed]
        rows[name] = {
            "mean": replayed[name].mean(),
            "spread": pd.Series([group[name].std(ddof=0) for group in grouped]).mean(),
            "no_variance": pd.Series([group[name].max() - group[name].min() < 1e-9 for group in grouped]).mean(),
            "best_right": pd.Series(best, dtype=float).mean(),
            "agreement": taus.mean(),
        }
    return pd.DataFrame(rows).T


def ranks(replayed: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return each completion's rank in its group under each reward: 1 earns most, equals share the better rank."""
    keys = [replayed["step"], replayed["query_id"], replayed["candidates"].map(tuple)]
    return replayed.groupby(keys)[list(names)].rank(ascending=False, method="min").astype(int)


def battery(rewards: Reward | Sequence[Reward], n: int = 5, right: int = 3) -> pd.DataFrame:
    """Return one row a known exploit: its reward, and that of an honest answer with the same knowledge.

    rewards: one, or several that are summed. There are n candidates, of which `right` is the right one. Index: the
    exploit. Columns: text, paid (its reward), honest, pays (whether its reward is above the honest one; for a text with
    faults, an equal one counts). With a sound pair of rewards no exploit pays.
    """
    others = [i for i in range(1, n + 1) if i != right]
    honest = completion_text(f"Image {right} answers the question.", [right, *others])
    wrong = completion_text(f"Image {others[0]} answers the question.", [*others, right])
    cheats = {
        "the best id again and again": (_answer([right] * n), honest),
        "one id, to be safe": (_answer([right]), honest),
        "more ids than there are pages": (_answer([right, *others, *range(n + 1, 2 * n + 1)]), honest),
        "a list twice over": (_answer([right, *others] * 2), honest),
        "ids that do not exist": (_answer([right, *range(n + 1, 2 * n)]), honest),
        "no reasoning": (f"<think></think><answer>{[right, *others]}</answer>", honest),
        "no think block": (f"<answer>{[right, *others]}</answer>", honest),
        "words around the answer": (f"{honest} I am sure.", honest),
        "two answers, the second wrong": (f"{honest}<answer>{[*others, right]}</answer>", honest),
        "the answer rehearsed in the reasoning": (
            f"<think>so <answer>[{right}]</answer></think><answer>{[*others, right]}</answer>", wrong,
        ),
        "a wrong answer, then another": (f"{wrong}<answer>{[right, *others]}</answer>", honest),
    }  # fmt: skip
    texts = [text for cheat, truth in cheats.values() for text in (cheat, truth)]
    labels = {"positive_ids": [[right]] * len(texts), "num_candidates": [n] * len(texts)}
    earned = _total(rewards, texts, labels, "battery")
    rows = []
    for (text, _), cheat, truth in zip(cheats.values(), earned[::2], earned[1::2], strict=True):
        pays = cheat > truth + 1e-9 or (cheat > truth - 1e-9 and not parse_ranking(text, n).valid)
        rows.append({"text": text, "paid": cheat, "honest": truth, "pays": pays})
    return pd.DataFrame(rows, index=pd.Index(cheats, name="exploit"))


def _answer(ids: Sequence[int]) -> str:
    return completion_text(f"Image {ids[0]} answers the question.", list(ids))
