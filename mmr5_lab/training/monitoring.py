"""What a training run logs at each step, and what GRPO's completions were. `training/stopping.py` has what stops a run.

The log of a GRPO step has, besides trl's own metrics (each reward, groups without variance, lengths, entropy, and KL
where it has a weight):

    answers/well_formed   share of completions with the right structure     answers/valid   without any fault
    answers/first_right   share whose first id is a right page
    faults/<kind>         share with each fault of `prompting.answers.FAULTS`
    order/copied          share of the readable answers that are the input order 1, 2, …, n
    order/tau             their mean Kendall tau with the input order: 1 copies it, 0 is unrelated to it
    order/first_place     the mean first id; order/right_place: the mean place of the first right page

In a model that copies its input order, copied and tau are near 1 and so is first_place, wherever the right pages are.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import kendalltau
from tqdm.auto import tqdm
from transformers import TrainerCallback

from mmr5_lab.files import report_progress
from mmr5_lab.prompting.answers import FAULTS, ParsedRanking, parse_ranking, with_opening

Reward = Callable[..., Any]  # as in mmr5_lab.rewards
TRACKERS = ("trackio", "tensorboard", "wandb", "mlflow")
PROJECT = "mmr5-lab"  # what trackers file runs under


class ReportProgress(TrainerCallback):
    """Show a progress bar, and write into the run folder how many steps are done."""

    def __init__(self, folder: Path, what: str):
        self.folder, self.what = folder, what

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.what, disable=hidden)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if state.is_world_process_zero:
            report_progress(self.folder, self.what, state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {key: (logs or {}).get(key) for key in ("loss", "reward")}  # a reward is None where none applies
        self.bar.set_postfix({key: f"{value:.3f}" for key, value in values.items() if value is not None})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def for_trl(reward: Reward, tokenizer, opening: str, logs: bool = False) -> Reward:
    """Return the same reward under the same name, called with all that the model and its chat template wrote.

    opening: what the template writes at the end of every prompt (`answers.with_opening`), such as `<think>`
    logs: log the completions as well

    trl passes the message that a template's own parser makes of a completion, without reasoning in some cases, so the
    text comes from the tokens. If the reward returns None, every
    completion's reward is None.
    """

    def called(completions, **columns):
        decoded = tokenizer.batch_decode(columns["completion_ids"], skip_special_tokens=True)
        texts = [with_opening(text, opening) for text in decoded]
        if logs:
            log_completions(texts, columns, columns["log_metric"], columns["log_extra"])
        whole = [[{"role": "assistant", "content": text}] for text in texts]
        values = reward(whole, **columns)
        return [None] * len(whole) if values is None else values

    called.__name__ = getattr(reward, "__name__", type(reward).__name__)  # a name in trl's log
    return called


def log_completions(
    texts: Sequence[str], columns: Mapping[str, Any], log_metric: Callable[..., Any], log_extra: Callable[..., Any]
) -> None:
    """Log a step's figures by `log_metric`, and columns of the completions table by `log_extra`.

    trl passes both functions to every reward, and `columns` with the labels, one value a completion.
    """
    positive_ids, counts = columns["positive_ids"], columns["num_candidates"]
    parsed = [parse_ranking(text, int(n)) for text, n in zip(texts, counts, strict=True)]
    for name, value in _step_metrics(parsed, positive_ids).items():
        log_metric(name, value)
    extra = {
        **{name: list(columns[name]) for name in ("query_id", "candidates") if name in columns},
        "positive_ids": [list(ids) for ids in positive_ids],
        "num_candidates": [int(n) for n in counts],
        "text": list(texts),
        "think": [p.think for p in parsed],
        "answer": [None if p.answer is None else list(p.answer) for p in parsed],
        "order": [list(p.order) for p in parsed],
        "faults": [sorted(p.faults) for p in parsed],
        "tokens": [len(ids) for ids in columns["completion_ids"]],
    }
    for name, values in extra.items():
        log_extra(name, values)


def _step_metrics(parsed: Sequence[ParsedRanking], positive_ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the metrics of a step's log; those of `order` only where some answer can be read."""
    rows = [
        {
            "answers/well_formed": p.well_formed,
            "answers/valid": p.valid,
            "answers/first_right": bool(p.answer and p.answer[0] in right),
            **{f"faults/{kind}": kind in p.faults for kind in sorted(FAULTS)},
            "order/right_place": min(right),
        }
        for p, right in zip(parsed, positive_ids, strict=True)
    ]
    orders = [
        {
            "order/copied": p.order == tuple(range(len(p.order))),
            "order/tau": kendalltau(p.order, range(len(p.order))).statistic,
            "order/first_place": p.order[0] + 1,
        }
        for p in parsed
        if p.answer and len(p.order) > 1
    ]
    means = [pd.DataFrame(part).astype(float).mean().to_dict() for part in (rows, orders)]
    return {**means[0], **means[1]}


def completions(folder: str | Path) -> pd.DataFrame:
    """Return all completions of a GRPO run, one row each, in the order of sampling.

    Columns: step, query_id, candidates (0-based pages in the prompt's order), positive_ids (1-based), num_candidates,
    text (with what the chat template opened) and its parts (think, answer: ids as written or None, order: 0-based
    permutation, faults), tokens, each reward under its name, advantage; prompt and completion as trl has them
    (messages). Rows of one step, query_id and candidates are a group. Raises FileNotFoundError where there are none.
    """
    files = sorted(Path(folder).glob("checkpoints/completions/*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no completions of a GRPO run")
    tables: list[pd.DataFrame] = []
    for file in files:  # trl writes a batch again at each further step that learns from it (`iterations`)
        table = pd.read_parquet(file)
        same = ["query_id", "text", "advantage"]
        if not (tables and table[same].equals(tables[-1][same])):
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def first_right(table: pd.DataFrame) -> pd.Series:
    """Return whether each completion (of `completions`) names a right page first."""
    rows = zip(table["answer"], table["positive_ids"], strict=True)
    named = [answer is not None and len(answer) > 0 and answer[0] in set(right) for answer, right in rows]
    return pd.Series(named, index=table.index)


def groups(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a group of completions (of `completions`).

    Columns: step, query_id, size, passed (share that names a right page first), equal (all earned the same reward, so
    that the group taught nothing).
    """
    known = table.assign(passed=first_right(table), prompt=table["candidates"].map(tuple))
    grouped = known.groupby(["step", "query_id", "prompt"], sort=False)
    rows = grouped.agg(
        size=("text", "size"),
        passed=("passed", "mean"),
        equal=("advantage", lambda advantages: bool((advantages.abs() < 1e-6).all())),
    )
    return rows.reset_index().drop(columns="prompt")


def rankings(table: pd.DataFrame) -> pd.DataFrame:
    """Return the readable completions (of `completions`) as rankings for `evaluation.robustness.position_bias`.

    Columns: question_id, candidates (0-based pages as shown), pages (as ranked), turn.
    """
    readable = table[table["answer"].notna()]
    candidates = [list(map(int, pages)) for pages in readable["candidates"]]
    ranked = [[pages[k] for k in order] for pages, order in zip(candidates, readable["order"], strict=True)]
    ids = list(readable["query_id"])
    return pd.DataFrame({"question_id": ids, "candidates": candidates, "pages": ranked, "turn": 1})


def check_tracker(tracker: str) -> None:
    """Raise ValueError for a tracker that is not one of `TRACKERS` or not installed."""
    if tracker not in TRACKERS:
        raise ValueError(f"there is no tracker {tracker!r}: choose one of {', '.join(TRACKERS)}")
    if importlib.util.find_spec(tracker) is None:
        raise ValueError(f"{tracker} is not installed: pip install {tracker}")


def tracker_options(tracker: str, folder: Path) -> dict[str, Any]:
    """Return the arguments of a trainer that reports to `tracker`, one of `TRACKERS`, or to none ("").

    Nothing leaves the machine by default. Trackio stays local: no Space, no bucket. TensorBoard's files go to
    `<folder>/tensorboard`; where wandb and mlflow send theirs is up to their own settings (`wandb offline`,
    MLFLOW_TRACKING_URI). Raises ValueError as `check_tracker`.
    """
    if tracker:
        check_tracker(tracker)
    if tracker == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    return {
        "report_to": tracker or "none",
        "run_name": "/".join(folder.parts[-2:]),
        "project": PROJECT,
        "trackio_space_id": None,
        "trackio_bucket_id": None,
        "trackio_static_space_id": False,
        "push_to_hub": False,
    }
