"""The exercises at the end of notebooks 01 to 08: `check("03.1", answer)` says what is wrong with an answer.

A check computes the correct answer with the project's own functions, and the results of common mistakes, so that its
message can name the mistake. It never shows the solution and never raises because of an answer, so a notebook with
open exercises runs to its end. `make students` removes the cells tagged `solution`; the stubs with `...` remain.

    check("03.1", ...)      # … 03.1: not answered yet
    check("03.1", 0.5)      # ✗ 03.1: 0.5 is too low. …
"""

import math
import numbers
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import yaml

from mmr5_lab.evaluation.metrics import candidate_ceiling, evaluate, per_question
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.rewards import REWARD_SETS, rank_reward

PERMUTATION = "an order holds each candidate once"


@dataclass(frozen=True)
class Verdict:
    """The result of a check. right: None if there is no answer yet."""

    exercise: str
    right: bool | None
    message: str

    def __repr__(self) -> str:
        mark = {True: "✓", False: "✗", None: "…"}[self.right]
        return f"{mark} {self.exercise}: {self.message}"


def check(exercise: str, answer: Any, **data: Any) -> Verdict:
    """Judge an answer; a notebook's cell shows the verdict.

    data: the subject of the exercise, such as a run and its corpus, under the names in the exercise's function below

    Raises ValueError for an exercise that does not exist.
    """
    if exercise not in EXERCISES:
        raise ValueError(f"there is no exercise {exercise!r}; there are {', '.join(EXERCISES)}")
    if _open(answer):
        return Verdict(exercise, None, "not answered yet: replace ... with your answer")
    try:
        wrong = EXERCISES[exercise](answer, **data)
    except _NotAnAnswerError as error:
        wrong = str(error)
    return Verdict(exercise, not wrong, wrong or "right")


class _NotAnAnswerError(ValueError):
    """An answer of the wrong kind; the message says which kind the exercise needs."""


def _answer_of_a_trace(answer: Any, pages: Sequence[int], gold: Sequence[int]) -> str:
    from mmr5_lab.traces.construction import answer_ids, labelled  # loads torch

    shown = labelled(pd.Series({"gold_pages": list(gold)}), list(pages))
    right, n = answer_ids(shown), len(pages)
    ids = _whole_numbers(answer)
    if ids == right:
        return ""
    if set(ids) <= set(pages) and max(ids) > n:
        return f"these are page numbers; an answer holds image ids, the places in the prompt, 1 to {n}"
    if 0 in ids:
        return "an answer counts from 1: 'Image 1' is the first page of the prompt"
    if sorted(ids) != list(range(1, n + 1)):
        return f"{PERMUTATION}: all of 1 to {n}, including the pages that are not gold"
    positives = set(shown.positive_ids)
    if set(ids[: len(positives)]) != positives:
        return f"image {next(i for i in ids if i not in positives)} is not right, and stands before one that is"
    if ids[: len(positives)] != right[: len(positives)]:
        return "the gold pages come first, but among themselves they stand as in the prompt, not as in the label"
    return "the gold pages come first; the others follow in the order of the prompt"


def _leak(answer: Any, trace: Mapping[str, Any]) -> str:
    from mmr5_lab.traces.quality import FAULTS, faults_of

    if not isinstance(answer, str):
        raise _NotAnAnswerError(f"a {type(answer).__name__}: the answer is the whole text of a trace")
    last = {**trace["messages"][-1], "content": answer}
    faults = faults_of({**trace, "messages": [*trace["messages"][:-1], last]})
    if faults == ["label_leaked"]:
        return ""
    if answer == trace["messages"][-1]["content"]:
        return "this is the trace as it was"
    if not faults:
        return "the checks let it pass: they look for words that name the label, as a careless teacher might"
    other = "; ".join(f"{fault}: {FAULTS[fault]}" for fault in faults if fault != "label_leaked")
    return f"the checks reject it, but (also) for something else: {other}"


def _lost_questions(answer: Any, run: Mapping[str, Sequence[int]], corpus: Any, n: int) -> str:
    rows = per_question({q: list(pages)[:n] for q, pages in run.items()}, corpus, [1])
    found, all_found = rows["gold_in_candidates"], rows["gold_in_candidates"] == rows["gold"]
    slips = {
        f"these are the questions that are kept with {n} candidates": (found > 0).sum(),
        "that is how often the first page is wrong; a gold page further down is enough": (rows["R@1"] == 0).sum(),
        "one gold page among the candidates is enough; not all are needed": (~all_found).sum(),
    }
    return _number(answer, (found == 0).sum(), slips, f"Count the questions with no gold page among their first {n}")


def _lora_size(answer: Any, inputs: int, outputs: int, rank: int) -> str:
    slips = {
        "that is the size of the layer itself, which does not change": inputs * outputs,
        "that is one of the two matrices; add the other": (rank * inputs, rank * outputs),
        "add the sizes of the two matrices; do not multiply them": rank * inputs * rank * outputs,
        "that is rank times the layer; A is rank × inputs and B outputs × rank": rank * inputs * outputs,
    }
    return _number(answer, rank * (inputs + outputs), slips, "Write down the shapes of A and B; B A has the shape of W")


def _completion_loss(answer: Any, prompt: Sequence[float], completion: Sequence[float]) -> str:
    nats = [-math.log(p) for p in completion]
    everything = nats + [-math.log(p) for p in prompt]
    slips = {
        "that is the sum; the loss is the mean over the completion's tokens": sum(nats),
        "that is the mean over all tokens; the prompt's carry no loss": sum(everything) / len(everything),
        "that is in bits: the loss uses the natural logarithm": sum(nats) / len(nats) / math.log(2),
        "that is minus the logarithm of the mean; take the mean of the logarithms": -math.log(np.mean(completion)),
        "the loss is minus the mean logarithm": -sum(nats) / len(nats),
    }
    return _number(answer, sum(nats) / len(nats), slips, "Take the mean of -ln p over the completion's tokens")


def _rank_reward(answer: Any, written: Sequence[int], positives: Sequence[int]) -> str:
    text = f"<think>t</think><answer>{list(written)}</answer>"
    [right] = rank_reward([text], [list(positives)], [len(written)])
    ranks = [written.index(g) + 1 for g in positives]
    best = range(1, len(positives) + 1)
    slips = {
        "that is the sum of 1/rank³ alone; divide by what the best order earns": sum(r**-3 for r in ranks),
        "divide the sum by the best order's sum, not by the number of gold pages": sum(r**-3 for r in ranks)
        / len(ranks),
        "that takes 1/rank; the gain is 1/rank³": sum(1 / r for r in ranks) / sum(1 / r for r in best),
        "that takes 1/rank²; the gain is 1/rank³": sum(r**-2 for r in ranks) / sum(r**-2 for r in best),
        "that takes the ids for ranks: the rank of a page is where the answer names it": sum(g**-3 for g in positives)
        / sum(r**-3 for r in best),
    }
    return _number(answer, right, slips, "At which rank does the answer name each gold page?")


def advantages(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """(r - mean) ÷ (std + 1e-4) within a group, std with G - 1: as trl's `GRPOTrainer` (`scale_rewards="group"`)."""
    values = np.asarray(rewards, dtype=float)
    return (values - values.mean()) / (values.std(ddof=1) + 1e-4)


def _advantages(answer: Any, rewards: Sequence[float]) -> str:
    given, values = _numbers(answer, len(rewards)), np.asarray(rewards, dtype=float)
    centred = values - values.mean()
    if np.allclose(given, advantages(values), atol=0.006):
        return ""
    if abs(given.sum()) > 0.02 * len(given):
        return f"the advantages of a group add up to 0, these to {given.sum():.2f}: subtract the group's own mean"
    if np.allclose(given, centred, atol=0.006):
        return "you subtracted the mean; now divide by the standard deviation"
    if np.allclose(given, centred / values.std(), atol=0.006):
        return "the standard deviation here divides by G - 1 before the root, as torch's does; yours divides by G"
    if np.allclose(given, centred / values.var(ddof=1), atol=0.006):
        return "that divides by the variance; take its square root"
    if np.allclose(given, -advantages(values), atol=0.006):
        return "the signs are turned round: a higher reward has a higher advantage"
    far = int(np.abs(given - advantages(values)).argmax())
    return f"the advantage of completion {far + 1} is furthest off. Take the mean, the differences, then their spread"


def _group_size(answer: Any, pass_rate: float, share: float) -> str:
    [size] = _whole_numbers([answer])

    def silent(g: int) -> float:
        return pass_rate**g + (1 - pass_rate) ** g

    if size < 2:
        return "a group of one is its own mean: its advantage is always 0"
    if silent(size) >= share:
        return f"with G = {size}, {silent(size):.2f} of the groups still teach nothing: too small"
    if size > 2 and silent(size - 1) < share:
        return f"G = {size} is enough ({silent(size):.2f}), but a smaller group does too"
    return ""


def _repair(answer: Any, text: str, n: int) -> str:
    right, written = list(parse_ranking(text, n).order), parse_ranking(text, n).answer or ()
    given = _whole_numbers(answer)
    if given == right:
        return ""
    if given == [k + 1 for k in right]:
        return "the right order, but `order` counts from 0: image 1 is candidate 0"
    if len(set(given)) < len(given):
        return f"{PERMUTATION}: if an id is written twice, the first counts"
    if set(given) - set(range(n)):
        return f"{PERMUTATION}: leave out ids of images that do not exist; the candidates are 0 to {n - 1}"
    if len(given) < n:
        return f"{PERMUTATION}: {n - len(given)} of the {n} are missing: add them"
    kept = [i - 1 for i in dict.fromkeys(written) if 1 <= i <= n]
    if given[: len(kept)] != kept:
        return "the written ids come first, in the order in which they were written"
    return "the written ids are right; the missing ones follow in the candidates' own order"


def _visual_tokens(answer: Any, height: int, width: int) -> str:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    high, wide = smart_resize(height, width, factor=28)
    slips = {
        "these are the patches; 2 × 2 of them make a token": high * wide / 14**2,
        "that rounds up; each side goes to the nearest multiple of 28": math.ceil(height / 28) * math.ceil(width / 28),
        "that rounds down; each side goes to the nearest multiple of 28": (height // 28) * (width // 28),
        "these are pixels": high * wide,
        "there is no part of a token: each side is rounded to whole tokens before they are multiplied": height
        * width
        / 28**2,
    }
    return _number(
        answer, high * wide / 28**2, slips, "How many tokens of 28 × 28 pixels is each side, rounded?", 0.001
    )


def _consensus(answer: Any, orders: Sequence[Sequence[int]]) -> str:
    from mmr5_lab.reranking.strategies import fused  # loads torch

    right, points = fused(orders)
    given = _whole_numbers(answer)
    if given == right:
        return ""
    if sorted(given) != sorted(right):
        return f"{PERMUTATION}: 0 to {len(right) - 1}"
    if given == right[::-1]:
        return "that is turned round: the candidate with the most points comes first"
    firsts = [order[0] for order in orders]
    if given[0] == max(firsts, key=firsts.count):
        return (
            f"candidate {given[0]} is first most often, but every place gives points: where does it stand in"
            " the other orders?"
        )
    low = next(k for k in range(1, len(given)) if points[given[k]] > points[given[k - 1]])
    return f"candidate {given[low]} has more points than {given[low - 1]}: add up n - rank over the orders"


def _micro_macro(answer: Any, domains: Sequence[str], recalls: Sequence[float]) -> str:
    names = [f"q{k}" for k in range(len(domains))]
    table = pd.DataFrame({"question_id": names, "doc_name": "d", "domain": domains, "gold_pages": [[0]] * len(names)})
    corpus = SimpleNamespace(questions=table, documents=pd.DataFrame({"doc_name": ["d"], "num_pages": [2]}))
    run = {name: [0, 1] if recall else [1, 0] for name, recall in zip(names, recalls, strict=True)}
    micro, macro = evaluate(run, corpus, [1]).loc[["micro", "macro"], "R@1"]
    given = _numbers(answer, 2)
    good = np.isclose(given, [micro, macro], atol=0.006)
    if good.all():
        return ""
    if np.allclose(given, [macro, micro], atol=0.006):
        return "the two are exchanged: micro counts each question once, macro counts each domain once"
    if np.isclose(given[1], micro, atol=0.006):
        return "macro is not the mean over questions: first take the mean of each domain, then the mean of these"
    which = "macro" if good[0] else "micro" if good[1] else "neither number is right: micro"
    return f"{which}: a mean over {'domains, of means over their questions' if good[0] else 'all questions'}"


def _shuffled_recall(answer: Any, run: Mapping[str, Sequence[int]], corpus: Any) -> str:
    rows = per_question(run, corpus, [1])
    one_of = 1 / rows["candidates"]
    slips = {
        "that is this run's own recall, in its own order": rows["R@1"].mean(),
        "that would need every gold page to be among the candidates": one_of.mean(),
        "that is the chance that a gold page is first; recall also divides by the number of gold pages": (
            rows["gold_in_candidates"] * one_of
        ).mean(),
        "that is the best order of the candidates, not a random one": candidate_ceiling(run, corpus, [1]).loc[
            "micro", "R@1"
        ],
    }
    right = (rows["gold_in_candidates"] * one_of / rows["gold"]).mean()
    return _number(answer, right, slips, "For one question: the chance of a candidate to be first × its recall")


def _holm(answer: Any, p_values: Sequence[float]) -> str:
    from mmr5_lab.evaluation.significance import holm

    given, p, m = _numbers(answer, len(p_values)), np.asarray(p_values), len(p_values)
    order = np.argsort(p)
    stepped = np.empty(m)
    stepped[order] = p[order] * np.arange(m, 0, -1)
    if np.allclose(given, holm(p_values), atol=1e-6):
        return ""
    if np.allclose(given, p * m, atol=1e-6) or np.allclose(given, np.minimum(1, p * m), atol=1e-6):
        return "that is Bonferroni's correction; Holm's multiplies only the smallest by the number of tests"
    if np.allclose(given, stepped, atol=1e-6):
        return "the factors are right, but a larger p may not end up below a smaller one"
    if np.allclose(given, p, atol=1e-6):
        return "these are the p-values as they were"
    far = int(np.abs(given - holm(p_values)).argmax())
    return f"the p-value of test {far + 1} is wrong. Sort them: the smallest times {m}, the next times {m - 1}, …"


def _ceiling(answer: Any, run: Mapping[str, Sequence[int]], corpus: Any) -> str:
    rows = per_question(run, corpus, [1])
    slips = {
        "that is what the system has now; assume that it makes no mistake": rows["R@1"].mean(),
        "a question with two gold pages cannot have both of them in first place": (
            rows["gold_in_candidates"] > 0
        ).mean(),
        "no reranker finds a page that it was not given": rows["R@1 all pages"].mean(),
    }
    right = candidate_ceiling(run, corpus, [1]).loc["micro", "R@1"]
    return _number(answer, right, slips, "What is the recall of the best order of each question's candidates?")


def _tau(answer: Any, one: Sequence[int], other: Sequence[int]) -> str:
    from mmr5_lab.reranking.strategies import stability  # loads torch

    right = stability([one, other])
    assert right is not None
    slips = {
        "that is the share of pairs that agree; tau subtracts those that disagree": (right + 1) / 2,
        "that is the share of pairs that disagree": (1 - right) / 2,
        "that is the share of equal places; tau compares pairs of candidates": np.mean(np.equal(one, other)),
        "the sign is turned round": -right,
    }
    return _number(answer, right, slips, "Of all pairs of candidates: (in the same order - in the other) ÷ all")


def _loophole(answer: Any) -> str:
    if not isinstance(answer, str):
        raise _NotAnAnswerError(f"a {type(answer).__name__}: the answer is a completion, as a string")
    labels: dict[str, Any] = {"positive_ids": [[3]], "num_candidates": [5]}
    earned = {name: sum(reward([answer], **labels)[0] for reward in pair) for name, pair in REWARD_SETS.items()}
    parsed = parse_ranking(answer, 5)
    if parsed.valid and parsed.order[0] == 2:
        return "that is an honest answer: right and without a fault. Find one that does not deserve its reward"
    if earned["released"] < 2 - 1e-9:
        rank, form = (reward([answer], **labels)[0] for reward in REWARD_SETS["released"])
        return f"the released rewards give {rank:.2f} for the rank and {form:.2f} for the form, not 1 and 1"
    if earned["strict"] > 2 - 1e-9:
        return "it earns the full strict rewards as well"
    return ""


def _second_place(answer: Any) -> str:
    cases = {
        "a gold page in first place": ("<think>t</think><answer>[3, 1, 2]</answer>", 1.0),
        "a gold page in second place": ("<think>t</think><answer>[1, 3, 2]</answer>", 0.5),
        "a gold page in third place": ("<think>t</think><answer>[1, 2, 3]</answer>", 0.0),
        "a text without an answer": ("<think>Image 3 fits.</think>", 0.0),
        "an answer without reasoning, which is not valid": ("<answer>[3, 1, 2]</answer>", 0.0),
        "the gold id twice, which is not valid": ("<think>t</think><answer>[3, 3, 1]</answer>", 0.0),
    }
    if not callable(answer):
        raise _NotAnAnswerError(f"a {type(answer).__name__}: the answer is a function, without ()")
    texts = [text for text, _ in cases.values()]
    try:
        earned = list(answer(texts, positive_ids=[[3]] * len(texts), num_candidates=[3] * len(texts)))
    except Exception as error:  # a student's function may raise anything
        return f"your function raised {type(error).__name__}: {error}"
    if len(earned) != len(texts):
        return f"your function returns {len(earned)} numbers for {len(texts)} completions"
    for (name, (_, due)), value in zip(cases.items(), earned, strict=True):
        if not _is_number(value) or abs(value - due) > 1e-9:
            return f"it gives {value!r} for {name}"
    return ""


def _same_lesson(answer: Any, rewards: Mapping[str, Callable[[float], float]]) -> str:
    group = np.array([0.0, 1 / 27, 1 / 8, 1.0])
    before = advantages(group)
    after = {name: advantages([change(r) for r in group]) for name, change in rewards.items()}
    same = {name for name, values in after.items() if np.allclose(values, before, atol=1e-2)}
    if not isinstance(answer, set | list | tuple) or any(name not in list(rewards) for name in answer):
        raise _NotAnAnswerError(f"the answer is a set of some of {', '.join(rewards)}")
    if extra := sorted(set(answer) - same):
        now = ", ".join(f"{value:.2f}" for value in after[extra[0]])
        was = ", ".join(f"{value:.2f}" for value in before)
        return f"{extra[0]}: rewards 0, 1/27, 1/8 and 1 had the advantages {was}; now they have {now}"
    if lacking := len(same - set(answer)):
        return f"{lacking} more leave{'s' * (lacking == 1)} all advantages as they were"
    return ""


def _grid_size(answer: Any, grid: Mapping[str, Any]) -> str:
    sizes = [len(next(iter(axis.values()))) for axis in grid["axes"]]
    alone = [len(values) for axis in grid["axes"] for values in axis.values()]
    points = len(_points(grid))
    left_out = math.prod(sizes) - points
    slips = {
        "`without` leaves some of these out": math.prod(sizes),
        "names within one axis go together, value by value": (math.prod(alone), math.prod(alone) - left_out),
        "every value of one axis goes with every value of the others: multiply": sum(sizes),
    }
    return _number(answer, points, slips, "Multiply the sizes of the axes, then subtract what `without` names")


def _new_runs(answer: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    old, new = _points(before), _points(after)
    fresh = sum(len({point[name] for point in new} - {point[name] for point in old}) for name in new[0])
    slips = {
        "that is the whole grid; runs that exist are found again by their hash": len(new),
        "that is the number of runs that exist already": len(old),
        "that is the number of new values; each of them goes with every value of the other axis": fresh,
    }
    return _number(answer, len([p for p in new if p not in old]), slips, "Which combinations are new?")


def _points(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    from mmr5_lab.experiments.grids import read_grid

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grid.yaml"
        path.write_text(yaml.safe_dump(dict(grid)))
        return [point.labels for point in read_grid(path).points]


EXERCISES: dict[str, Callable[..., str]] = {
    "01.1": _answer_of_a_trace, "01.2": _lost_questions, "01.3": _leak,
    "02.1": _lora_size, "02.2": _completion_loss,
    "03.1": _rank_reward, "03.2": _advantages, "03.3": _group_size,
    "04.1": _repair, "04.2": _visual_tokens, "04.3": _consensus,
    "05.1": _micro_macro, "05.2": _shuffled_recall, "05.3": _holm,
    "06.1": _ceiling, "06.2": _tau,
    "07.1": _loophole, "07.2": _second_place, "07.3": _same_lesson,
    "08.1": _grid_size, "08.2": _new_runs,
}  # fmt: skip


def _open(answer: Any) -> bool:
    return answer is ... or (isinstance(answer, list | tuple | set) and any(part is ... for part in answer))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _number(answer: Any, right: float, slips: Mapping[str, Any], hint: str, tolerance: float = 0.006) -> str:
    """Return "" for an answer within the tolerance, else the mistake behind it, or whether it is too high or low."""
    if not _is_number(answer):
        raise _NotAnAnswerError(f"{answer!r}: the answer is a number")
    if abs(answer - right) <= tolerance:
        return ""
    for message, value in slips.items():
        if np.any(np.abs(np.asarray(value) - answer) <= tolerance):
            return message
    return f"{answer:g} is too {'low' if answer < right else 'high'}. {hint}"


def _numbers(answer: Any, count: int) -> np.ndarray:
    listed = list(answer) if isinstance(answer, list | tuple | np.ndarray | pd.Series) else [answer]
    if len(listed) != count or not all(map(_is_number, listed)):
        raise _NotAnAnswerError(f"{answer!r}: the answer is a list of {count} numbers")
    return np.array(listed, dtype=float)


def _whole_numbers(answer: Any) -> list[int]:
    listed: list[Any] = list(answer) if isinstance(answer, list | tuple | np.ndarray | pd.Series) else []
    if not listed or not all(isinstance(k, numbers.Integral) and not isinstance(k, bool) for k in listed):
        raise _NotAnAnswerError(f"{answer!r}: the answer takes whole numbers")
    return [int(k) for k in listed]
