"""The two stages of training, on trl: SFT on reasoning traces, then GRPO with ranking and format rewards.

Both train LoRA adapters on the language model's linear layers; the vision tower stays frozen (arXiv
2506.12364). A stage writes into its folder:

    adapter/      the LoRA adapter            model/   the same merged into the weights, for the next stage
    log.csv       one row a logged step       checkpoints/   for going on after an interruption

Values of the miniature are the defaults of notebooks 02 and 03.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import datasets
import pandas as pd
import torch
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, SFTConfig, SFTTrainer

from mmr5_lab.models import load_model
from mmr5_lab.page_cache import PageCache
from mmr5_lab.rewards import REWARD_SETS
from mmr5_lab.runs import report_progress
from mmr5_lab.shared_prompt import SharedPromptGRPOTrainer

VISION = r".*(visual|vision_tower|vision_model|multi_modal_projector).*"  # names of vision parts: no LoRA there
Reward = Callable[..., Any]  # as in mmr5_lab.rewards


class ReportProgress(TrainerCallback):
    """Shows a bar, and tells the run folder how many steps are done."""

    def __init__(self, folder: Path, what: str):
        self.folder, self.what = folder, what

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.what)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        report_progress(self.folder, self.what, state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.bar.set_postfix({key: f"{logs[key]:.3f}" for key in ("loss", "reward") if key in (logs or {})})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class StopOnBadLoss(TrainerCallback):
    """Ends a run whose loss is no longer a number, before a checkpoint of it is written."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in ("loss", "grad_norm"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(float(value)):
                raise FloatingPointError(
                    f"step {state.global_step}: {key} is {value}; lower the learning rate (now {args.learning_rate:g})"
                    f" and start again from the last checkpoint in {args.output_dir}"
                )


def train_sft(
    model: str | Path,
    data: datasets.Dataset,
    folder: str | Path,
    *,
    learning_rate: float,
    epochs: float,
    batch_size: int,
    accumulation: int = 1,
    lora_rank: int,
    lora_alpha: int,
    lora_dropout: float = 0.0,
    loraplus_ratio: float | None = None,
    warmup_ratio: float = 0.05,
    max_length: int = 32_768,
    max_pixels: int | None = None,
    save_steps: int = 50,
    seed: int = 0,
) -> pd.DataFrame:
    """Fine-tune `model` on traces (`traces.sft_dataset`); the loss is on completions alone. Returns the log.

    learning_rate: peak, with linear warm-up over `warmup_ratio` of the steps and a cosine to 0
    loraplus_ratio: learning rate of LoRA's B over that of A (LoRA+, arXiv 2402.12354); None: the same
    batch_size: traces a device and step, times `accumulation`
    max_length: tokens; a longer trace is refused by the trainer, never cut in its images
    max_pixels: pixel budget of a page image; None leaves the processor's own

    Running again goes on from the last checkpoint. Raises FloatingPointError when the loss is no longer finite.
    """
    folder = Path(folder)
    loaded, processor = _load(model, max_pixels)
    arguments = SFTConfig(
        **_common(folder, learning_rate, batch_size, accumulation, warmup_ratio, save_steps, seed),
        num_train_epochs=epochs,
        max_length=max_length,
    )
    trainer = SFTTrainer(
        loaded,
        args=arguments,
        train_dataset=data,
        processing_class=processor,
        peft_config=lora(lora_rank, lora_alpha, lora_dropout),
        callbacks=[StopOnBadLoss(), ReportProgress(folder, "SFT step")],
    )
    if loraplus_ratio is not None:
        trainer.optimizer = create_loraplus_optimizer(
            cast(PeftModel, trainer.model), torch.optim.AdamW, lr=learning_rate, loraplus_lr_ratio=loraplus_ratio
        )
    return _run(trainer, processor, folder)


def train_grpo(
    model: str | Path,
    data: datasets.Dataset,
    folder: str | Path,
    *,
    learning_rate: float,
    batch_size: int,
    accumulation: int = 1,
    generations: int = 4,
    epochs: float = 1.0,
    max_steps: int = -1,
    iterations: int = 1,
    temperature: float = 1.0,
    beta: float = 0.0,
    epsilon: float = 0.2,
    loss_type: str = "dapo",
    scale_rewards: str = "group",
    rewards: str | Sequence[Reward] = "strict",
    reward_weights: Sequence[float] | None = None,
    max_completion: int = 2048,
    lora_rank: int,
    lora_alpha: int,
    lora_dropout: float = 0.0,
    warmup_ratio: float = 0.0,
    max_pixels: int | None = None,
    save_steps: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """GRPO (arXiv 2402.03300) from `model`, the merged SFT model, on prompts (`traces.rl_dataset`). Returns the log.

    batch_size: completions a device and pass, times `accumulation`: completions a step; `generations` of them
        (G, the group) answer the same prompt
    iterations: optimisation steps a batch of completions (mu)
    beta: weight of the KL divergence to the starting model; 0 keeps no reference model
    loss_type: as in trl; "grpo" divides by each completion's length and so favours long wrong answers
    rewards: a name of `mmr5_lab.rewards.REWARD_SETS` or functions of that module's signature, summed with
        `reward_weights` (1 each)
    max_completion: tokens

    The completions of every step are kept in `checkpoints/completions/*.parquet`. Running again goes on from the
    last checkpoint. Raises ValueError where a step's completions do not fill whole groups and for an unknown set of
    rewards, FloatingPointError when the loss is no longer finite.
    """
    folder = Path(folder)
    if isinstance(rewards, str):
        if rewards not in REWARD_SETS:
            raise ValueError(f"there are no rewards {rewards!r}; there are {', '.join(REWARD_SETS)}")
        rewards = REWARD_SETS[rewards]
    if (batch_size * accumulation) % generations:
        raise ValueError(
            f"{batch_size} × {accumulation} completions a step are not a multiple of the group size {generations}"
        )
    loaded, processor = _load(model, max_pixels)
    arguments = GRPOConfig(
        **_common(folder, learning_rate, batch_size, accumulation, warmup_ratio, save_steps, seed),
        num_train_epochs=epochs,
        max_steps=max_steps,
        num_generations=generations,
        num_iterations=iterations,
        temperature=temperature,
        beta=beta,
        epsilon=epsilon,
        loss_type=loss_type,
        scale_rewards=scale_rewards,
        reward_weights=list(reward_weights) if reward_weights else None,
        max_completion_length=max_completion,
        log_completions=True,
        num_completions_to_print=0,
        log_multimodal=False,
    )
    trainer = SharedPromptGRPOTrainer(
        loaded,
        reward_funcs=list(rewards),
        args=arguments,
        train_dataset=data,
        processing_class=processor,
        peft_config=lora(lora_rank, lora_alpha, lora_dropout),
        callbacks=[StopOnBadLoss(), ReportProgress(folder, "GRPO step")],
    )
    return _run(trainer, processor, folder)


def completions(folder: str | Path) -> pd.DataFrame:
    """All completions of a GRPO run, one row each: step, completion, rewards by name, advantage."""
    files = sorted(Path(folder).glob("checkpoints/completions/*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no completions of a GRPO run")
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def _load(model: str | Path, max_pixels: int | None):
    loaded, processor = load_model(model, max_pixels=max_pixels)
    if PageCache.supports(loaded):
        PageCache(loaded)  # the vision tower is frozen: a page is encoded once, not once an epoch and completion
    return loaded.train(), processor


def lora(rank: int, alpha: int, dropout: float) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=VISION,
        task_type="CAUSAL_LM",
    )


def _common(
    folder: Path,
    learning_rate: float,
    batch_size: int,
    accumulation: int,
    warmup_ratio: float,
    save_steps: int,
    seed: int,
) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup_ratio,  # below 1, transformers takes it as a share of all steps
        "save_steps": save_steps,
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,  # ReportProgress shows the bar
        "seed": seed,
        "data_seed": seed,
        "bf16": gpu,
        "gradient_checkpointing": gpu,
        "dataloader_pin_memory": gpu,
    }


def _run(trainer, processor, folder: Path) -> pd.DataFrame:
    trainer.remove_callback(PrinterCallback)
    with completions_only():
        trainer.train(resume_from_checkpoint=_last_checkpoint(Path(trainer.args.output_dir)))
    trainer.save_model(str(folder / "adapter"))
    log = pd.DataFrame([row for row in trainer.state.log_history if "loss" in row])
    log.to_csv(folder / "log.csv", index=False)
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    merged.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return log


def completions_only():
    """Within it trl computes the output layer for tokens that have a label only, which it does by itself with Triton.

    Elsewhere it computes it for the prompt too, most of the tokens here, and throws that away. Same losses.
    """
    return patch("trl.trainer.utils._use_triton", return_value=True)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: `trainer_state.json` comes last."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            return str(checkpoint)
    return None
