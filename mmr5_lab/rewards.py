"""Completions and gold pages to rewards, as trl's `GRPOTrainer` calls them.

Two sets. `rank_reward`, `format_reward` and `ndcg_reward` are built on `parse_ranking` and leave nothing to
gain but a good ranking. `released_rank_reward` and `released_format_reward` return what the code of
i2vec/MM-R5 returns, number for number, faults included, so that its training can be repeated and studied.

The strict rank rewards credit any order that a person would read (`1. Image 3`, JSON, 0-based ids, a list without
tags); the strict format reward is 0 for every such form. The parser finds one order in a text, without knowing the
positives, so hedging with two lists, scores or list numbers cannot beat writing the better order alone. An answer
inside closed reasoning, or in reasoning that was cut off, does not count.

The paper (arXiv 2506.12364) adds a rank and a format reward without weights, as trl does by default. With the strict
pair the sum is at most 2, and only a well-formed permutation with the positives first reaches it.

Every function has the signature `reward(completions, positive_ids, num_candidates, **columns)`:

- completions: B texts, each a string or a list of messages (their texts are joined); where the chat template opens
  `<think>`, apply `answers.with_opening` first
- positive_ids: B lists of 1-based ids of the relevant candidates; num_candidates: B counts n
- further dataset columns and what trl adds are ignored

They return B floats, whatever a completion says. Raises ValueError for columns of different lengths and, in the strict
set, for no positives or a positive outside 1..n, naming the index; TypeError for a completion that is neither form.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from mmr5_lab.prompting.answers import ParsedRanking, parse_ranking
from mmr5_lab.prompting.prompts import content_text

_NO_THINK = re.compile(r"\A\s*+<think>\s*+</think>")  # before an answer at once
Completion: TypeAlias = str | Sequence[dict[str, Any]]
Ids: TypeAlias = Sequence[Sequence[int]]


def rank_reward(
    completions: Sequence[Completion], positive_ids: Ids, num_candidates: Sequence[int], **columns: Any
) -> list[float]:
    """Reward how early the positives stand: Σ_{g∈G, g∈π} 1/rank(g)³ ÷ Σ_{i=1..|G|} 1/i³, in [0, 1].

    G is the set of positives, π the answer, rank(g) the place of the first mention of g in π as written:
    repeats and ids out of range take up places, so padding never pays. Source: arXiv 2506.12364, rank reward.

        >>> rank_reward(["<think>…</think><answer>[3, 1, 4, 2, 5]</answer>"], [[3, 4]], [5])
        [0.9218106995884773]

    Positives at ranks 1 and 3: (1 + 1/27) ÷ (1 + 1/8).
    """
    return _gains(completions, positive_ids, num_candidates, lambda rank: 1.0 / rank**3)


def ndcg_reward(
    completions: Sequence[Completion], positive_ids: Ids, num_candidates: Sequence[int], **columns: Any
) -> list[float]:
    """Return the nDCG of the answer: Σ_{g∈G, g∈π} 1/log₂(1 + rank(g)) ÷ Σ_{i=1..|G|} 1/log₂(1 + i), in [0, 1].

    Binary gains, no cut-off, rank(g) as in `rank_reward`. Where the cubic reward looks at the first place almost
    alone, this one still pays for the step from rank 4 to 3. Source: Järvelin and Kekäläinen 2002,
    https://doi.org/10.1145/582415.582418, with the usual log₂(1 + rank) discount.

        >>> ndcg_reward(["<think>…</think><answer>[1, 2, 3]</answer>"], [[3]], [3])
        [0.5]

    One positive at rank 3: 1/log₂ 4 ÷ 1.
    """
    return _gains(completions, positive_ids, num_candidates, lambda rank: 1.0 / math.log2(1 + rank))


def format_reward(
    completions: Sequence[Completion], positive_ids: Ids, num_candidates: Sequence[int], **columns: Any
) -> list[float]:
    """Reward how near the text is to the asked form: valid · |{x∈π : 1≤x≤n}| ÷ max(n, |π|), in [0, 1].

    The set counts each id once. valid is 1 when the text is one think block with words in it, then one
    answer block that holds one bracketed list, and nothing else but white space; else 0
    (`ParsedRanking.well_formed`). Only a permutation of 1..n earns all of it, and a nearly right list nearly all, so
    that a beginner has something to climb; a permutation of 0..n-1 earns (n-1) ÷ n. Source: arXiv 2506.12364, format
    reward, with its two factors (length, range) replaced by one that neither repeats nor long answers can raise.

        >>> format_reward(["<think>…</think><answer>[3, 1, 2, 3, 3]</answer>"], [[3]], [5])
        [0.6]

    Three distinct ids of five.
    """
    rewards = []
    for parsed, _, n in _answers(completions, positive_ids, num_candidates):
        written = parsed.answer if parsed.well_formed else ()
        in_range = len({x for x in written or () if 1 <= x <= n}) - ("zero_based" in parsed.faults)
        rewards.append(in_range / max(n, len(written)) if written else 0.0)
    return rewards


def direct_format_reward(
    completions: Sequence[Completion], positive_ids: Ids, num_candidates: Sequence[int], **columns: Any
) -> list[float]:
    """Return `format_reward` of answers without reasoning: the think block must be empty or absent.

    >>> direct_format_reward(["<think></think><answer>[3, 1, 2]</answer>"], [[3]], [3])
    [1.0]
    """
    texts = _texts(completions, positive_ids, num_candidates)
    answers = [_NO_THINK.sub("", text, count=1) for text in texts]
    thought = [f"<think>…</think>{answer}" for answer in answers]  # what was written there counts as a second block
    return format_reward(thought, positive_ids, num_candidates)


def released_rank_reward(
    completions: Sequence[Completion], positive_ids: Ids, num_candidates: Sequence[int], **columns: Any
) -> list[float]:
    """The rank reward as released (i2vec/MM-R5, `qwen_module.py`, `rerank_reward`).

    The formula of `rank_reward` over another reading: the first `<answer>[…]</answer>` that stands on one line, inside
    think too, split at commas; an entry that is not an integer makes it 0, and so does a question without positives.

        >>> released_rank_reward(["so <answer>[3]</answer>"], [[3]], [5])
        [1.0]
    """
    texts = _texts(completions, positive_ids, num_candidates)
    return [_released_rank(text, list(positives)) for text, positives in zip(texts, positive_ids, strict=True)]


def released_format_reward(
    completions: Sequence[Completion], positive_ids: Ids, num_candidates: Sequence[int], **columns: Any
) -> list[float]:
    """The format reward as released (i2vec/MM-R5, `qwen_module.py`, `format_rerank_reward`).

    valid · (1 − | |π| − n | ÷ n) · (entries of π in 1..n) ÷ |π|, where π is the first list that directly
    follows a `</think>` after the first `<think>`. Its faults: `[3, 3, 3, 3, 3]` earns 1, more than 2n ids
    earn less than 0, a single id earns 0, and so does a list with a line break or a number like 03 in it (the
    released code evaluates the list as Python source, where those are errors or no tuple).

        >>> released_format_reward(["<think></think><answer>[3, 3, 3, 3, 3]</answer>"], [[3]], [5])
        [1.0]
    """
    texts = _texts(completions, positive_ids, num_candidates)
    return [_released_format(text, int(n)) for text, n in zip(texts, num_candidates, strict=True)]


def _gains(
    completions: Sequence[Completion], positive_ids: Ids, counts: Sequence[int], gain: Callable[[int], float]
) -> list[float]:
    """Sum of gain(rank) over the positives in each answer, over the sum for the first |G| ranks."""
    rewards = []
    for parsed, waiting, _ in _answers(completions, positive_ids, counts):
        ideal = math.fsum(gain(rank) for rank in range(1, len(waiting) + 1))
        earned = []
        for rank, x in enumerate(parsed.answer or (), start=1):
            if x in waiting:
                waiting.remove(x)  # a second mention earns nothing
                earned.append(gain(rank))
        rewards.append(math.fsum(earned) / ideal)
    return rewards


def _answers(
    completions: Sequence[Completion], positive_ids: Ids, counts: Sequence[int]
) -> Iterator[tuple[ParsedRanking, set[int], int]]:
    """What each completion says, its positives and number of candidates. Raises ValueError naming the index."""
    for index, text in enumerate(_texts(completions, positive_ids, counts)):
        ids, n = {int(g) for g in positive_ids[index]}, int(counts[index])
        if not ids:
            raise ValueError(f"positive_ids of index {index} is empty: leave out prompts without a positive")
        if outside := sorted(g for g in ids if not 1 <= g <= n):
            raise ValueError(f"positive_ids of index {index} holds {outside}, outside 1..{n} (ids are 1-based)")
        yield parse_ranking(text, n), ids, n


def _texts(completions: Sequence[Completion], positive_ids: Sequence[Any], num_candidates: Sequence[Any]) -> list[str]:
    lengths = len(completions), len(positive_ids), len(num_candidates)
    if len(set(lengths)) > 1:
        raise ValueError(
            f"columns differ in length: {lengths[0]} completions, {lengths[1]} positive_ids, "
            f"{lengths[2]} num_candidates; the first index without a partner is {min(lengths)}"
        )
    return completion_texts(completions)


def completion_texts(completions: Sequence[Completion]) -> list[str]:
    """Return the text of each completion; raises TypeError for one that is neither a string nor a list of messages."""
    texts = []
    for index, completion in enumerate(completions):
        try:
            parts = [completion] if isinstance(completion, str) else [message["content"] for message in completion]
            texts.append("".join(map(content_text, parts)))
        except (TypeError, KeyError, AttributeError) as error:
            raise TypeError(
                f"completion {index} is neither a string nor a list of messages with a content: {error!r}"
            ) from error
    return texts


def _released_rank(text: str, positives: list[int]) -> float:
    inner = _first_answer_on_a_line(text)
    if inner is None or not positives:
        return 0.0
    try:
        # int() as released: it takes "+3", "1_0" and digits of other scripts, and refuses over 4,300 digits.
        order = [int(entry) for entry in inner.split(",") if entry.strip()]
    except ValueError:
        return 0.0
    first = {x: rank for rank, x in reversed(list(enumerate(order, start=1)))}
    earned = sum(1.0 / first[g] ** 3 if g in first else 0.0 for g in positives)
    return earned / sum(1.0 / i**3 for i in range(1, len(positives) + 1))


def _first_answer_on_a_line(text: str) -> str | None:
    r"""What the pattern `<answer>\[(.*?)\]</answer>` captures (`.` is no newline), in linear time."""
    for line in text.split("\n"):
        inner, closed, _ = line.partition("<answer>[")[2].partition("]</answer>")
        if closed:
            return inner
    return None


# Digits and commas as released; the possessive quantifiers change nothing but the time.
_RELEASED_LIST = re.compile(r"</think>\s*+<answer>\[([0-9]++(?:,\s*+[0-9]++)*+)\]</answer>")
_PYTHON_INTEGER = re.compile(r"0++|[1-9][0-9]{0,4299}+")
_PYTHON_BLANKS = " \t\f"


def _released_format(text: str, n: int) -> float:
    opening = text.find("<think>")
    if opening < 0:
        return 0.0
    written = _RELEASED_LIST.search(text, opening + len("<think>"))
    if written is None or n == 0:
        return 0.0
    entries = [entry.lstrip(_PYTHON_BLANKS) for entry in written[1].split(",")]
    if len(entries) < 2 or not all(_PYTHON_INTEGER.fullmatch(entry) for entry in entries):
        return 0.0
    in_range = sum(1 <= int(entry) <= n for entry in entries if entry[0] != "0")
    return (n - abs(len(entries) - n)) / n * (in_range / len(entries))


# The pairs that GRPO can be trained with: a reward for the ranking and one for the form.
REWARD_SETS: dict[str, tuple[Callable[..., list[float]], Callable[..., list[float]]]] = {
    "strict": (rank_reward, format_reward),
    "ndcg": (ndcg_reward, format_reward),
    "released": (released_rank_reward, released_format_reward),
    "direct": (rank_reward, direct_format_reward),
}
