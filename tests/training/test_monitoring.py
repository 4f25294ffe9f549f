"""What a run's log says of completions, seen on completions whose faults are known; when a run must stop."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest

from mmr5_lab.evaluation.robustness import position_bias
from mmr5_lab.training.monitoring import completions, first_right, groups, log_completions, rankings, tracker_options
from mmr5_lab.training.stopping import WINDOW, CollapseError, StopWhenBroken

TEXTS = [
    "<think>a</think><answer>[1, 2, 3]</answer>",  # the input order
    "<think>a</think><answer>[3, 2, 1]</answer>",  # its reverse
    "<think>a</think><answer>[2, 2, 2]</answer>",  # duplicate, missing
    "nothing",  # no answer, no think, extra text
]
RIGHT = [[1], [3], [1], [2]]


def logged():
    """What `log_completions` hands to trl: figures and columns."""
    figures, columns = {}, {}
    of_trl = {
        "positive_ids": RIGHT, "num_candidates": [3] * 4, "query_id": ["a", "a", "b", "b"],
        "candidates": [[5, 6, 7]] * 4, "completion_ids": [[0] * 9] * 4,
    }  # fmt: skip
    log_completions(TEXTS, of_trl, figures.__setitem__, columns.__setitem__)
    return figures, columns


def test_a_step_s_figures_tell_faults_and_likeness_to_the_input_order():
    figures, _ = logged()
    assert figures["answers/valid"] == 0.5
    assert figures["answers/well_formed"] == 0.75
    assert figures["answers/first_right"] == 0.5
    assert {name: value for name, value in figures.items() if name.startswith("faults/") and value} == {
        "faults/duplicate": 0.25, "faults/missing": 0.25, "faults/no_answer": 0.25, "faults/no_think": 0.25,
        "faults/extra_text": 0.25,
    }  # fmt: skip
    assert figures["order/copied"] == pytest.approx(1 / 3)
    # taus of (0, 1, 2), (2, 1, 0) and (1, 0, 2), the repaired [2, 2, 2], with the input order: 1, -1 and 1/3
    assert figures["order/tau"] == pytest.approx((1 - 1 + 1 / 3) / 3)
    assert figures["order/first_place"] == pytest.approx((1 + 3 + 2) / 3)
    assert figures["order/right_place"] == pytest.approx((1 + 3 + 1 + 2) / 4)


def table() -> pd.DataFrame:
    _, columns = logged()
    return pd.DataFrame({"step": 1, "text": TEXTS, **columns, "advantage": [1.0, -1.0, 0.0, 0.0]})


def test_completions_are_kept_with_their_parts_and_once(tmp_path):
    kept = table()
    trl = kept.assign(completion=kept["text"], prompt="p")
    folder = tmp_path / "checkpoints" / "completions"
    folder.mkdir(parents=True)
    for step in (1, 2):  # trl writes a batch again when a second step learns from it
        trl.assign(step=step).to_parquet(folder / f"completions_{step:05d}.parquet")
    read = completions(tmp_path)
    assert read["step"].tolist() == [1, 1, 1, 1]
    assert read["text"].tolist() == TEXTS
    assert [None if a is None else list(a) for a in read["answer"]] == [[1, 2, 3], [3, 2, 1], [2, 2, 2], None]
    assert list(read["faults"].iloc[2]) == ["duplicate", "missing"]
    with pytest.raises(FileNotFoundError, match="holds no completions"):
        completions(tmp_path / "elsewhere")


def test_groups_say_who_was_right_and_what_taught_nothing():
    assert first_right(table()).tolist() == [True, True, False, False]
    rows = groups(table())
    assert rows[["query_id", "size", "passed", "equal"]].to_numpy().tolist() == [
        ["a", 2, 1.0, False],
        ["b", 2, 0.0, True],
    ]


def test_rankings_that_copy_show_as_a_liking_for_the_first_place():
    """They name place 1 whatever is asked, and find only what stands there."""
    corpus = SimpleNamespace(by_id={"a": {"doc_name": "d", "gold_pages": [6]}})
    copied = pd.concat([table().iloc[[0]]] * 3).assign(candidates=[[5, 6, 7], [6, 7, 5], [7, 5, 6]])
    found = position_bias(rankings(pd.concat([copied, table().iloc[[3]]])), corpus)
    assert found["first"].tolist() == [1, 0, 0], "what cannot be read does not count"
    assert found["found"].tolist() == [1, 0, 0]
    assert found["gold"].tolist() == [1, 1, 1]


def state(**figures):
    """A trainer's state after as many logged steps as the figures have values."""
    rows = [dict(zip(figures, row, strict=True)) for row in zip(*figures.values(), strict=True)]
    return SimpleNamespace(global_step=len(rows), log_history=rows)


ARGUMENTS = SimpleNamespace(learning_rate=0.5, output_dir="runs/x", beta=0.04)


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_loss_that_is_no_number_stops_the_run(key):
    with pytest.raises(FloatingPointError, match=f"step 1: {key} is nan; lower the learning rate"):
        StopWhenBroken().on_log(ARGUMENTS, state(loss=[1.0]), None, logs={key: math.nan})


def test_answers_that_lose_their_form_stop_the_run():
    shares = [0.9] * WINDOW + [0.0] * WINDOW
    stop = StopWhenBroken()
    stop.on_log(ARGUMENTS, state(**{"answers/well_formed": shares[: WINDOW + 7]}), None, logs={})
    with pytest.raises(CollapseError, match=r"step 18: 0.18 of the last 10 steps' answers are well-formed, after 0.90"):
        stop.on_log(ARGUMENTS, state(**{"answers/well_formed": shares[: WINDOW + 8]}), None, logs={})


def test_a_base_model_that_has_never_had_the_form_goes_on():
    StopWhenBroken().on_log(ARGUMENTS, state(**{"answers/well_formed": [0.02] * 5 + [0.0] * 50}), None, logs={})


def test_trackers_are_off_by_default_and_everything_about_them_is_said(tmp_path):
    off = tracker_options("", tmp_path)
    assert off["report_to"] == "none"
    assert {name for name in off if name.startswith("trackio")} == {
        "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    }  # fmt: skip
    assert not any(off[name] for name in off if name.startswith("trackio")), "nothing leaves this machine"
    assert tracker_options("tensorboard", tmp_path)["report_to"] == "tensorboard"
    with pytest.raises(ValueError, match="there is no tracker 'excel': choose one of trackio, tensorboard, wandb, mlf"):
        tracker_options("excel", tmp_path)


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed: pip install wandb"):
        tracker_options("wandb", tmp_path)
