"""Training on trl with a tiny random model: what is trained, what is logged, how a stopped run goes on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mmr5_lab import training
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.models import load_model
from mmr5_lab.retrieve import retrieve
from mmr5_lab.rewards import format_reward, rank_reward
from mmr5_lab.teachers import EvidenceTeacher
from mmr5_lab.traces import make_traces, rl_dataset, sft_dataset, training_candidates
from mmr5_lab.training import StopOnBadLoss, completions, train_grpo, train_sft

SFT = {"learning_rate": 1e-2, "batch_size": 2, "lora_rank": 4, "lora_alpha": 8, "save_steps": 2}
GRPO = {
    "learning_rate": 1e-3, "batch_size": 4, "generations": 2, "lora_rank": 4, "lora_alpha": 8, "save_steps": 2,
    "max_completion": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tiny_model, tmp_path_factory):
    """A tiny model's folder, SFT traces and RL prompts."""
    folder = tmp_path_factory.mktemp("material")
    corpus = make_corpus(folder / "corpus", seed=4, splits={"sft": (2, 5)})
    candidates = training_candidates(corpus, retrieve(corpus, top_k=5))
    traces = make_traces(corpus, candidates, EvidenceTeacher(corpus), folder / "traces.jsonl")
    return tiny_model, sft_dataset(traces), rl_dataset(corpus, candidates)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def sft(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    log = train_sft(material[0], material[1], folder, epochs=1, **SFT)
    return folder, log


def test_sft_trains_lora_on_the_language_model_and_leaves_the_vision_tower(material, sft):
    folder, log = sft
    assert log["step"].tolist() == list(range(1, len(log) + 1))
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert not [name for name in adapter if "visual" in name]
    modules = {name.split(".")[-3] for name in adapter}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    before, after = weights(material[0]), weights(folder / "model")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(any(module in name for module in modules) and "visual" not in name for name in changed)


def test_the_merged_model_is_the_base_with_the_adapter(material, sft):
    folder, _ = sft
    tokens = torch.arange(40)[None]
    logits = [
        load_model(*arguments)[0](input_ids=tokens).logits
        for arguments in ((material[0], folder / "adapter"), (folder / "model",))
    ]
    assert torch.allclose(*logits, atol=1e-5)
    assert not torch.allclose(load_model(material[0])[0](input_ids=tokens).logits, logits[0], atol=1e-3)


def test_a_stopped_sft_run_ends_as_an_uninterrupted_one(material, sft, tmp_path, monkeypatch):
    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StopOnBadLoss, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            train_sft(material[0], material[1], tmp_path, epochs=1, **SFT)
    half = tmp_path / "checkpoints" / "checkpoint-4"  # as if killed while a later checkpoint was written
    half.mkdir()
    log = train_sft(material[0], material[1], tmp_path, epochs=1, **SFT)
    assert log["loss"].tolist() == pytest.approx(sft[1]["loss"].tolist(), abs=1e-4)
    whole = weights(sft[0] / "model")
    for name, value in weights(tmp_path / "model").items():
        assert torch.allclose(value, whole[name], atol=1e-5), name


def test_lora_plus_gives_b_a_higher_rate(material, tmp_path, monkeypatch):
    rates = {}

    def run(trainer, processor, folder):
        trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                rates.setdefault(names[id(parameter)].split(".")[-3], set()).add(group["lr"])

    monkeypatch.setattr(training, "_run", run)
    train_sft(material[0], material[1], tmp_path, epochs=1, loraplus_ratio=16.0, **SFT)
    assert rates == {"lora_A": {1e-2}, "lora_B": {0.16}}


def test_grpo_keeps_every_completion_with_its_rewards(material, tmp_path):
    log = train_grpo(material[0], material[2], tmp_path, max_steps=2, **GRPO)
    assert log["step"].tolist() == [1, 2]
    assert {"rewards/rank_reward/mean", "rewards/format_reward/mean", "frac_reward_zero_std"} <= set(log.columns)
    kept = completions(tmp_path)
    assert kept.groupby("step").size().to_dict() == {1: 4, 2: 4}
    assert list((tmp_path / "model").glob("model*.safetensors"))
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in kept["completion"]]
    labels = {"positive_ids": [[1]] * len(texts), "num_candidates": [5] * len(texts)}
    assert kept["format_reward"].tolist() == format_reward(texts, **labels)
    assert kept["rank_reward"].tolist() == rank_reward(texts, **labels)


def test_a_step_that_does_not_fill_groups_and_unknown_rewards_are_refused(material, tmp_path):
    with pytest.raises(ValueError, match="6 × 1 completions a step are not a multiple of the group size 4"):
        train_grpo(material[0], material[2], tmp_path, **{**GRPO, "batch_size": 6, "generations": 4})
    with pytest.raises(ValueError, match="there are no rewards 'generous'; there are strict, ndcg, released"):
        train_grpo(material[0], material[2], tmp_path, rewards="generous", **GRPO)
    with pytest.raises(FileNotFoundError, match="holds no completions"):
        completions(tmp_path)


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_loss_that_is_no_number_stops_the_run(material, key):
    state = type("State", (), {"global_step": 7})
    args = type("Args", (), {"learning_rate": 0.5, "output_dir": "runs/x"})
    with pytest.raises(FloatingPointError, match=f"step 7: {key} is nan; lower the learning rate"):
        StopOnBadLoss().on_log(args, state, None, logs=json.loads(f'{{"{key}": NaN}}'))
