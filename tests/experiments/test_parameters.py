"""What may stand in place of a notebook's parameters is checked before any work starts."""

import pytest

from mmr5_lab.experiments.parameters import (
    CHOICES,
    LEAST,
    POSITIVE,
    NotebookError,
    checked_parameters,
    default_parameters,
    read_profile,
)
from mmr5_lab.experiments.runs import CHAIN, RUN_OF_SYSTEM, parents, project_root

NOTEBOOKS = project_root() / "notebooks"
DATA, SFT, GRPO, INFERENCE, EVALUATION, _ = (NOTEBOOKS / f"{name}.ipynb" for name in CHAIN)


def test_defaults_are_read_from_the_parameters_cell():
    defaults = default_parameters(DATA)
    assert defaults["NUM_CANDIDATES"] == 5
    assert defaults["SPLITS"] == ["sft", "rl", "eval"]
    assert defaults["RUN"] == ""


def test_a_notebook_names_the_runs_it_takes_by_its_parameters():
    assert parents(DATA) == {}
    assert parents(GRPO) == {"01_data_construction": "DATA_RUN", "02_sft": "SFT_RUN"}


@pytest.mark.parametrize(
    ("notebook", "values", "message"),
    [
        (SFT, {"LERNING_RATE": 1.0}, "has no parameter LERNING_RATE"),
        (SFT, {"BATCH_SIZE": "8"}, "02_sft.ipynb: BATCH_SIZE = '8' is a str, expected int"),
        (SFT, {"BATCH_SIZE": 8.0}, "is a float, expected int"),
        (SFT, {"LEARNING_RATE": "1e-3"}, r"write 1.0e-3"),
        (SFT, {"LEARNING_RATE": True}, "is a bool, expected float"),
        (SFT, {"LEARNING_RATE": None}, "is a NoneType, expected float"),
        (SFT, {"LEARNING_RATE": -1e-3}, "LEARNING_RATE = -0.001 must be above 0"),
        (SFT, {"LEARNING_RATE": float("nan")}, "LEARNING_RATE = nan is not a finite number"),
        (SFT, {"EPOCHS": float("inf")}, "is not a finite number"),
        (SFT, {"EPOCHS": 0}, "EPOCHS = 0 must be above 0"),
        (SFT, {"WARMUP": 1.5}, "is a share: it must be at most 1"),
        (SFT, {"LORA_RANK": 0}, "must be at least 1"),
        (SFT, {"TRACKER": "excel"}, "is not one of '', trackio, tensorboard, wandb, mlflow"),
        (GRPO, {"REWARDS": "stirct"}, "REWARDS = 'stirct' is not one of strict, ndcg, released"),
        (GRPO, {"GENERATIONS": 1}, "must be at least 2"),
        (GRPO, {"MAX_STEPS": -2}, "must be at least -1"),
        (GRPO, {"BETA": -0.04}, "must be at least 0"),
        (DATA, {"REFINED": "false"}, "is a str, expected bool"),
        (DATA, {"REFINED": 1}, "is a int, expected bool"),
        (DATA, {"EXPORT": ["swift", "csv"]}, r"EXPORT = \['swift', 'csv'\] is not one of swift, swift-reranker"),
        (DATA, {"SPLITS": ["sft", 3]}, "is a int, expected str"),
        (INFERENCE, {"SYSTEMS": "base"}, r"is a str, expected list \(write a list, as YAML \[base\]; papermill .* -y"),
        (INFERENCE, {"SYSTEMS": "[base, SFT]"}, r"as YAML \[base, SFT\]"),
        (INFERENCE, {"SYSTEMS": ["base", "sft"]}, "is not one of base, SFT, SFT \\+ RL, RL only"),
        (INFERENCE, {"MODE": "Reason"}, "is not one of reason, direct, score, pointwise"),
        (EVALUATION, {"SAMPLES": True}, "SAMPLES = True is a bool, expected int"),
        (EVALUATION, {"SAMPLES": 0}, "must be at least 1"),
    ],
)
def test_names_types_choices_and_ranges_are_checked(notebook, values, message):
    with pytest.raises(NotebookError, match=message):
        checked_parameters(notebook, values)


def test_whole_numbers_are_floats_where_the_default_is_one():
    checked = checked_parameters(SFT, {"EPOCHS": 2})["EPOCHS"]
    assert (checked, type(checked)) == (2.0, float)
    assert checked_parameters(GRPO, {"MAX_STEPS": -1})["MAX_STEPS"] == -1
    assert checked_parameters(INFERENCE, {"SYSTEMS": []})["SYSTEMS"] == []


def test_choices_are_what_the_rooms_take():
    from mmr5_lab.reranking.ranking import MODES
    from mmr5_lab.reranking.whole_runs import CHANNELS
    from mmr5_lab.retrieval.retrieve import METHODS
    from mmr5_lab.rewards import REWARD_SETS
    from mmr5_lab.traces.formats import FORMATS
    from mmr5_lab.training.adapters import SFT_ADAPTER
    from mmr5_lab.training.monitoring import TRACKERS
    from mmr5_lab.training.prompt_selection import SELECTIONS

    taken = {
        "METHOD": METHODS, "RETRIEVER": ("", *METHODS), "EXPORT": FORMATS, "TRACKER": ("", *TRACKERS),
        "SFT_ADAPTER": SFT_ADAPTER, "SCHEDULE": ("cosine", "linear", "constant", "constant_with_warmup"),
        "IMPORTANCE_SAMPLING_LEVEL": ("token", "sequence"),
        "SELECTION": SELECTIONS, "REWARDS": REWARD_SETS, "MODE": MODES, "CHANNEL": CHANNELS,
        "SYSTEMS": ("base", *RUN_OF_SYSTEM), "LABELS": ("gold", "samples"),
    }  # fmt: skip
    assert {name: sorted(choices) for name, choices in CHOICES.items()} == {k: sorted(v) for k, v in taken.items()}


def test_every_number_of_the_shipped_notebooks_has_a_range():
    defaults = {k: v for path in NOTEBOOKS.glob("*.ipynb") for k, v in default_parameters(path).items()}
    numbers = {name for name, value in defaults.items() if type(value) in (int, float)}
    assert numbers <= {*LEAST, *POSITIVE}


@pytest.mark.parametrize("profile", sorted((NOTEBOOKS / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_profiles_name_notebooks_of_the_chain_and_their_parameters(profile):
    parameters = read_profile(profile)
    assert list(parameters) == [name for name in CHAIN if name in parameters]
    for notebook, values in parameters.items():
        checked_parameters(NOTEBOOKS / f"{notebook}.ipynb", values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"02_sft: {SEED: 1}\n02_sft: {SEED: 2}\n", "02_sft stands twice"),
        (b"02_sft:\n  SEED: 1\n  SEED: 2\n", r"(?s)SEED stands twice.*line 3"),
        (b"02_sft: [SEED]\n", "must map notebook names to parameters"),
        ("02_sft: {MODEL: é}".encode("utf-16"), "is not in UTF-8: save it as UTF-8"),
        (b"02_sft: {", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said(tmp_path, content, message):
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(NotebookError, match=message):
        read_profile(tmp_path / "p.yaml")


def test_a_byte_order_mark_and_yaml_merges_are_read(tmp_path):
    (tmp_path / "p.yaml").write_bytes(b"\xef\xbb\xbf02_sft: &a {SEED: 1}\n03_grpo: {<<: *a, BETA: 0.0}\n")
    assert read_profile(tmp_path / "p.yaml") == {"02_sft": {"SEED": 1}, "03_grpo": {"SEED": 1, "BETA": 0.0}}
    with pytest.raises(NotebookError, match="there is no profile"):
        read_profile(tmp_path / "absent.yaml")
