"""Try a reward before it trains anything: replay saved completions, and answers that are known to cheat.

    table = completions("runs/03_grpo/…")          # mmr5_lab.training.monitoring
    replay({"strict": rank_reward, "mine": my_reward}, table)
    battery([my_reward, format_reward])

A reward is a function as in `mmr5_lab.rewards`. GRPO looks at differences within a group alone, so what counts of a
reward is the order in which it puts a group's completions, and in how many groups it sees no difference.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from scipy.stats import kendalltau

from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import completion_text
from mmr5_lab.training.monitoring import first_right

Reward = Callable[..., Sequence[float]]
GROUP = ["step", "query_id"]


def replay(rewards: Mapping[str, Reward | Sequence[Reward]], table: pd.DataFrame) -> pd.DataFrame:
    """What each reward (or sum of several) would have paid for saved completions: `table` with a column for each.

    table: as of `training_log.completions`. Raises ValueError for a reward that does not give one finite number for
    each completion, naming it.
    """
    labels = {name: list(table[name]) for name in ("positive_ids", "num_candidates")}
    paid = {}
    for name, reward in rewards.items():
        parts = [reward] if callable(reward) else list(reward)
        paid[name] = total(parts, list(table["text"]), labels, name)
    return table.assign(**paid)


def total(rewards: Sequence[Reward], texts: list[str], labels: Mapping[str, Any], name: str) -> list[float]:
    """The sum of some rewards for each text. Raises ValueError as `replay`."""
    values = [list(reward(texts, **labels)) for reward in rewards]
    sums = [sum(parts) for parts in zip(*values, strict=True)] if {len(v) for v in values} == {len(texts)} else []
    bad = next((i for i, value in enumerate(sums) if not abs(value) < float("inf")), None)
    if len(sums) != len(texts) or bad is not None:
        what = f"{sums[bad]} for {texts[bad][-60:]!r}" if bad is not None else "another count of numbers"
        raise ValueError(f"the reward {name!r} gives {what}: it must give one finite number for each completion")
    return sums


def summary(replayed: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """How rewards would have taught on replayed completions, a row each.

    Columns: mean, spread (mean standard deviation within a group), no_variance (share of groups in which all earn the
    same), best_right (of the groups in which some completions name a right page first and others do not: share in which
    all that are paid most do), agreement (mean Kendall tau within a group with the order of the first of `names`).
    """
    known = replayed.assign(right=first_right(replayed), prompt=[tuple(pages) for pages in replayed["candidates"]])
    grouped = [group for _, group in known.groupby([*GROUP, "prompt"], sort=False)]
    mixed = [group for group in grouped if 0 < group["right"].mean() < 1]
    rows = {}
    for name in names:
        taus = pd.Series([_tau(group[names[0]], group[name]) for group in grouped], dtype=float)
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
    """Each completion's rank in its group under each reward: 1 is paid best, equals share the better rank."""
    keys = [replayed["step"], replayed["query_id"], replayed["candidates"].map(tuple)]
    return pd.DataFrame({
        name: replayed.groupby(keys)[name].rank(ascending=False, method="min").astype(int) for name in names
    })  # fmt: skip


def battery(rewards: Reward | Sequence[Reward], n: int = 5, right: int = 3) -> pd.DataFrame:
    """Known exploits, a row each: what they are paid, and what an honest answer with the same knowledge is.

    rewards: one, or several that are summed; n candidates, of which `right` is the right one. Index: the exploit.
    Columns: text, paid, honest, pays (it is paid more than the honest answer; for a text with faults, as much will do).
    No exploit pays with a sound pair of rewards.
    """
    parts = [rewards] if callable(rewards) else list(rewards)
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
    paid = total(parts, texts, labels, "battery")
    rows = []
    for k, (text, _) in enumerate(cheats.values()):
        gain = paid[2 * k] - paid[2 * k + 1]
        pays = gain > 1e-9 or (gain > -1e-9 and not parse_ranking(text, n).valid)
        rows.append({"text": text, "paid": paid[2 * k], "honest": paid[2 * k + 1], "pays": pays})
    return pd.DataFrame(rows, index=pd.Index(cheats, name="exploit"))


def _answer(ids: Sequence[int]) -> str:
    return completion_text(f"Image {ids[0]} answers the question.", list(ids))


def _tau(first: pd.Series, second: pd.Series) -> float:
    """Kendall's tau-b; nan where either sees no difference."""
    if first.nunique() < 2 or second.nunique() < 2:
        return float("nan")
    return float(kendalltau(first, second).statistic)
