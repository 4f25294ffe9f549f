"""Training on trl with a tiny random model: what is trained, what is kept, how a killed run goes on."""

import gc
import logging
import multiprocessing
import os
import shutil
import signal
import weakref
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from helpers.architectures import save
from helpers.material import SFT, Material
from safetensors.torch import load_file
from transformers import Trainer

from mmr5_lab.files import read_object
from mmr5_lab.models import loading
from mmr5_lab.rewards import completion_texts, format_reward, rank_reward
from mmr5_lab.training import checkpoints, stopping
from mmr5_lab.training import stages as training
from mmr5_lab.training.checkpoints import finished_log
from mmr5_lab.training.monitoring import completions
from mmr5_lab.training.stages import train_grpo, train_sft
from mmr5_lab.training.stopping import StopWhenBroken

GRPO = {
    "learning_rate": 1e-3, "batch_size": 4, "generations": 2, "iterations": 2, "max_steps": 6, "save_steps": 1,
    "lora_rank": 4, "max_completion": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def grpo(material, tmp_path_factory):
    """A folder in which GRPO has finished."""
    folder = tmp_path_factory.mktemp("grpo")
    train_grpo(material.model, material.prompts, folder, tracker="tensorboard", **GRPO)
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_sft_trains_lora_on_the_language_model_and_leaves_the_vision_tower(material, sft):
    log = finished_log(sft)
    assert log["step"].tolist() == list(range(1, len(log) + 1))
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]
    adapter = load_file(sft / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert not [name for name in adapter if "visual" in name]
    modules = {name.split(".")[-3] for name in adapter}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    before, after = load_file(material.model / "model.safetensors"), weights(sft)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(any(module in name for module in modules) and "visual" not in name for name in changed)


def test_a_finished_stage_gives_its_log_and_trains_nothing(material, sft, grpo, monkeypatch):
    monkeypatch.setattr(training, "load_model", None)
    log = train_sft(material.model, material.traces, sft, **{**SFT, "save_steps": 9})
    pd.testing.assert_frame_equal(log, finished_log(sft))
    log = train_grpo(material.model, material.prompts, grpo, **GRPO)
    pd.testing.assert_frame_equal(log, finished_log(grpo))


def test_a_folder_is_not_trained_in_with_other_settings_or_data(material, sft, grpo, tmp_path):
    """Finished or interrupted: what is there was learnt with the first settings."""
    for name, value in {"epochs": 2, "learning_rate": 0.5, "lora_rank": 8}.items():
        with pytest.raises(ValueError, match=rf"{sft} was made with other settings \({name} .*, now {value}\)"):
            train_sft(material.model, material.traces, sft, **{**SFT, name: value})
    with pytest.raises(ValueError, match=rf"{sft} was made with other settings \(data '\w+', now '\w+'\): choose"):
        train_sft(material.model, material.traces.select([0, 1]), sft, **SFT)
    with pytest.raises(ValueError, match=r"was made with other settings \(rewards"):
        train_grpo(material.model, material.prompts, grpo, **GRPO, rewards="released")
    broken = {**SFT, "learning_rate": 1e20}
    with pytest.raises(FloatingPointError):
        train_sft(material.model, material.traces, tmp_path, **broken)
    with pytest.raises(ValueError, match="other settings"):
        train_sft(material.model, material.traces, tmp_path, **SFT)


def no_reward(completions, **columns):
    """Applies to none of the completions, as trl lets a reward say."""
    return


def half_reward(completions, **columns):
    return [1.0 if i % 2 else None for i in range(len(completions))]


def test_a_reward_that_does_not_apply_is_missing_in_the_log(material, tmp_path):
    rewards = [no_reward, half_reward]
    log = train_grpo(
        material.model, material.prompts, tmp_path, **{**GRPO, "max_steps": 2, "iterations": 1}, rewards=rewards
    )
    pd.testing.assert_frame_equal(log, finished_log(tmp_path))
    assert log["rewards/no_reward/mean"].isna().all()
    assert log["rewards/half_reward/mean"].tolist() == [1.0, 1.0]
    assert {"no_reward", "half_reward"} <= set(completions(tmp_path).columns)


def test_a_run_goes_on_where_no_reward_applies_at_all(material, tmp_path):
    log = train_grpo(
        material.model, material.prompts, tmp_path, **{**GRPO, "max_steps": 2, "iterations": 1}, rewards=no_reward
    )
    assert log["reward"].isna().all()
    assert log["step"].tolist() == [1, 2]


def thinking(model, folder):
    """The same model with a chat template that opens the reasoning itself."""
    shutil.copytree(model, folder)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    assert text.endswith("<|im_start|>assistant\n{% endif %}")
    template.write_text(
        text.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    )
    return folder


def test_what_the_chat_template_opened_is_before_the_completion(material, tmp_path):
    texts = []

    def reads(completions, **columns):
        texts.extend(completion_texts(completions))
        return format_reward(completions, **columns)

    model = thinking(material.model, tmp_path / "model")
    log = train_grpo(
        model, material.prompts, tmp_path / "run", **{**GRPO, "max_steps": 1, "iterations": 1}, rewards=reads
    )
    assert len(texts) == 4
    assert all(text.startswith("<think>\n") for text in texts)
    kept = completions(tmp_path / "run")
    assert kept["text"].tolist() == texts
    assert kept["think"].notna().all(), "the reasoning is read"
    assert log["faults/no_think"].tolist() == [0.0]


def stopped_before_training(monkeypatch) -> dict:
    """A trainer as a stage makes it, under "trainer"."""
    made = {}

    def keep(trainer, processor, folder, base):
        made["trainer"] = trainer

    monkeypatch.setattr(training, "train_to_the_end", keep)
    return made


def test_lora_plus_gives_b_a_higher_rate(material, tmp_path, monkeypatch):
    made = stopped_before_training(monkeypatch)
    settings = {**SFT, "loraplus_ratio": 16.0, "weight_decay": 0.1, "adam_beta2": 0.95}
    train_sft(material.model, material.traces, tmp_path, **settings)
    made["trainer"].create_optimizer()  # as transformers calls it, under DeepSpeed after setting it to None
    names = {id(parameter): name for name, parameter in made["trainer"].model.named_parameters()}
    rates: dict[str, set] = {}
    for group in made["trainer"].optimizer.param_groups:
        for parameter in group["params"]:
            kept = (group["lr"], group["weight_decay"], group["betas"])
            rates.setdefault(names[id(parameter)].split(".")[-3], set()).add(kept)
    assert rates == {"lora_A": {(1e-2, 0.1, (0.9, 0.95))}, "lora_B": {(0.16, 0.1, (0.9, 0.95))}}


def test_settings_of_grpo_reach_trl(material, tmp_path, monkeypatch):
    made = stopped_before_training(monkeypatch)
    settings = {"epsilon_high": 0.28, "importance_sampling_level": "sequence", "mask_truncated_completions": True,
                "sample_top_k": 50, "accumulation": 2}  # fmt: skip
    train_grpo(material.model, material.prompts, tmp_path, **GRPO, **settings, schedule="linear", workers=2)
    arguments = made["trainer"].args
    assert {name: getattr(arguments, name) for name in ("epsilon_high", "importance_sampling_level", "top_k")} == {
        "epsilon_high": 0.28, "importance_sampling_level": "sequence", "top_k": 50
    }  # fmt: skip
    assert arguments.mask_truncated_completions
    assert arguments.lr_scheduler_type == "linear"
    assert (arguments.dataloader_num_workers, arguments.gradient_accumulation_steps) == (2, 2)


def test_a_stage_s_model_is_freed_when_the_stage_ends(material, tmp_path, monkeypatch):
    alive = []

    def keep(trainer, *given):
        alive.append(weakref.ref(trainer.model.get_base_model()))

    monkeypatch.setattr(training, "train_to_the_end", keep)
    gc.disable()
    try:
        train_sft(material.model, material.traces, tmp_path / "sft", **SFT)
        train_grpo(material.model, material.prompts, tmp_path / "grpo", **GRPO)
    finally:
        gc.enable()
    assert [model() for model in alive] == [None, None]


def test_shared_prefixes_come_before_flash_attention(material, tmp_path, monkeypatch):
    """A kernel that takes no mask of its own would switch sharing off."""
    monkeypatch.setattr(loading, "best_attention", lambda device, dtype: "eager")  # as if it were installed
    made = stopped_before_training(monkeypatch)
    for share, kernel in ((True, "sdpa"), (False, "eager")):
        train_grpo(material.model, material.prompts, tmp_path / kernel, **GRPO, share_prefix=share)
        assert made["trainer"].model.config.get_text_config()._attn_implementation == kernel


def test_fsdp_leaves_outputs_and_sums_of_gradients_in_full_precision():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype is torch.bfloat16, "accelerate's own"
    training.keep_full_precision(
        SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    )
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (
        torch.bfloat16, torch.float32, torch.float32
    )  # fmt: skip


def test_four_bits_need_a_gpu(material, tmp_path):
    with pytest.raises(ValueError, match="4-bit weights need a GPU"):
        train_sft(material.model, material.traces, tmp_path, **SFT, four_bit=True)


def test_worker_processes_train_the_same(material, sft, tmp_path):
    log = train_sft(material.model, material.traces, tmp_path, **SFT, workers=1)
    pd.testing.assert_frame_equal(log[["step", "loss"]], finished_log(sft)[["step", "loss"]])


def rising_then_falling(completions, trainer_state, **columns):
    """.1, .2, .3, .4, .5 in the first five steps, then .1; a little more for every second completion."""
    step = trainer_state.global_step
    mean = 0.1 * step + 0.1 if step < 5 else 0.1
    return [mean + 0.01 * (-1) ** i for i in range(len(completions))]


def test_a_run_that_gets_worse_stops_and_keeps_its_best(material, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "WINDOW", 2)
    settings = {**GRPO, "max_steps": 9, "iterations": 1, "rewards": rising_then_falling, "beta": 0.04}
    log = train_grpo(material.model, material.prompts, tmp_path, **settings, stop_margin=0.1)
    # means of two steps: .15, .25, .35, .45, .3, the last of which is .15 below the best
    assert log["reward"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.1])
    best = read_object(tmp_path / "best" / "best.json")[0]
    assert best == {"step": 5, "reward": pytest.approx(0.45), "stopped": 6}
    kept, last = (
        load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "adapter", tmp_path / "checkpoints" / "checkpoint-6")
    )
    assert all(torch.equal(kept[name], value) for name, value in
               load_file(tmp_path / "best" / "adapter_model.safetensors").items())  # fmt: skip
    assert any(not torch.equal(kept[name], value) for name, value in last.items())
    (tmp_path / "log.csv").unlink()  # killed before the end: it has stopped, and does not go on
    assert len(train_grpo(material.model, material.prompts, tmp_path, **settings, stop_margin=0.1)) == 6


def test_grpo_keeps_every_completion_with_its_parts_and_rewards(grpo):
    log, kept = finished_log(grpo), completions(grpo)
    assert log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert {"rewards/rank_reward/mean", "rewards/format_reward/mean", "frac_reward_zero_std"} <= set(log.columns)
    assert {"entropy", "completions/mean_length", "faults/no_answer", "answers/well_formed"} <= set(log.columns)
    assert kept.groupby("step").size().to_dict() == {1: 4, 3: 4, 5: 4}, "two optimisation steps a batch of completions"
    labels = {
        "positive_ids": [list(ids) for ids in kept["positive_ids"]],
        "num_candidates": list(kept["num_candidates"]),
    }
    texts = list(kept["text"])
    assert kept["format_reward"].tolist() == pytest.approx(format_reward(texts, **labels), abs=1e-6)
    assert kept["rank_reward"].tolist() == pytest.approx(rank_reward(texts, **labels), abs=1e-6)
    assert kept["tokens"].max() == 12
    prompts = [tuple(pages) for pages in kept["candidates"]]
    assert prompts[0::2] == prompts[1::2], "a group is one prompt in one order"
    no_answer = kept["faults"].map(lambda faults: "no_answer" in faults).groupby(kept["step"]).mean()
    assert log.set_index("step").loc[[1, 3, 5], "faults/no_answer"].tolist() == pytest.approx(no_answer.tolist())


def test_without_shared_prefixes_grpo_trains_the_same(grpo, material, tmp_path, caplog):
    log = train_grpo(material.model, material.prompts, tmp_path, share_prefix=False, **{**GRPO, "max_steps": 2})
    columns = ["loss", "reward", "entropy", "answers/first_right"]
    pd.testing.assert_frame_equal(log[columns], finished_log(grpo)[columns].head(2), atol=1e-4)
    assert not caplog.records


def test_a_model_that_cannot_share_prefixes_says_so_and_trains(material, tmp_path, caplog):
    settings = {**GRPO, "max_steps": 1, "iterations": 1}
    with caplog.at_level(logging.WARNING):
        log = train_grpo(save("internvl", tmp_path / "model"), material.prompts, tmp_path / "run", **settings)
    assert len(log) == 1
    [message] = [record.message for record in caplog.records if record.name == training.__name__]
    assert message.startswith(
        "the model type internvl is not one of qwen2_vl, qwen2_5_vl, qwen3_vl: a prompt is encoded anew"
    )


def test_a_tracker_gets_what_the_log_has(grpo):
    [events] = (grpo / "tensorboard").glob("events.*")
    assert all(name.encode() in events.read_bytes() for name in ("answers/well_formed", "order/right_place", "entropy"))


def test_a_rate_that_breaks_the_model_ends_the_run(material, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d: (loss|grad_norm) is (nan|inf); lower the learning rate"):
        train_sft(material.model, material.traces, tmp_path, **{**SFT, "learning_rate": 1e20})
    assert finished_log(tmp_path) is None


# Killed with SIGKILL at each of these points in turn, then left alone.


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(number: int):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == number:
            kill()

    StopWhenBroken.on_step_begin = on_step_begin


def between_checkpoints():
    at_step(3)


def while_a_checkpoint_is_written():
    Trainer._save_optimizer_and_scheduler = kill


def while_it_merges():
    checkpoints.merge = kill


def before_it_is_marked_as_done():
    checkpoints.replacing = kill


def killed(stage, material: Material, folder, when) -> None:
    """In a process of its own."""
    when()
    train(stage, material, folder)


def train(stage, material: Material, folder) -> None:
    if stage == "sft":
        train_sft(material.model, material.traces, folder, **SFT)
    else:
        train_grpo(material.model, material.prompts, folder, **GRPO)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_that_was_killed_anywhere_ends_as_one_that_was_not(stage, material, tmp_path, request):
    whole = request.getfixturevalue(stage)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmr5_lab.experiments.launch"])
    for when in (between_checkpoints, while_a_checkpoint_is_written, while_it_merges, before_it_is_marked_as_done):
        process = context.Process(target=killed, args=(stage, material, tmp_path, when))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, when.__name__
        assert finished_log(tmp_path) is None
    train(stage, material, tmp_path)
    timing = ["step_time", "train_runtime"]
    expected, found = (finished_log(f).drop(columns=timing, errors="ignore") for f in (whole, tmp_path))
    pd.testing.assert_frame_equal(found, expected)
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, weights(whole)[name]), name
    if stage == "grpo":
        columns = ["step", "text", "candidates", "advantage"]
        pd.testing.assert_frame_equal(completions(tmp_path)[columns], completions(whole)[columns])
