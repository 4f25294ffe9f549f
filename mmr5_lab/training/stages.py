"""The two stages of training, on trl: SFT on reasoning traces, then GRPO with rewards for the ranking and its form.

Both train LoRA adapters on the linear layers of the language model; the vision tower stays frozen (arXiv 2506.12364).
A stage writes into its folder:

    adapter/      the LoRA adapter            model/   the same merged into the weights, for the next stage
    checkpoints/  the last checkpoint, to resume from; of GRPO, all completions as well
    log.csv       one row a logged step; it is written last, so a stage that has it is finished
    settings.json what the stage was begun with, and a fingerprint of its data

The miniature's values are the defaults of notebooks 02 and 03. On several GPUs accelerate trains into the run folder of
a notebook, and the notebook, run afterwards, finds the training done (docs/full_size.md):

    accelerate launch --config_file notebooks/accelerate/ddp.yaml -m mmr5_lab.experiments.launch 02_sft \
        --profile notebooks/profiles/paper.yaml --runs runs/paper
"""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from mmr5_lab.files import check_settings, replacing
from mmr5_lab.models.loading import best_dtype, load_model
from mmr5_lab.models.vision_cache import PageCache
from mmr5_lab.prompting.answers import with_opening
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.rewards import REWARD_SETS
from mmr5_lab.traces.construction import PromptReader
from mmr5_lab.training.adapters import check_logits, merge
from mmr5_lab.training.inputs import check_prompts, check_traces, data_fingerprint
from mmr5_lab.training.monitoring import (
    ReportProgress,
    Reward,
    StopWhenBroken,
    for_trl,
    logging_completions,
    tracker_options,
)
from mmr5_lab.training.shared_prefix import SharedPrefixGRPOTrainer, cannot_share

VISION = r".*(visual|vision_tower|vision_model|multi_modal_projector).*"  # names of vision parts: no LoRA there
LOG = "log.csv"
SETTINGS = "settings.json"
NOT_LEARNT = ("data", "folder", "save_steps", "tracker", "vllm", "share_prefix")  # may change while a stage is made

logger = logging.getLogger(__name__)


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
    loraplus_ratio: float = 1.0,
    warmup: float = 0.05,
    max_length: int = 32_768,
    max_pixels: int = 0,
    save_steps: int = 50,
    tracker: str = "",
    seed: int = 0,
) -> pd.DataFrame:
    """Fine-tune `model` on traces (`sft_dataset`), with the loss on completions alone, and return the log.

    learning_rate: peak, with linear warm-up over the share `warmup` of the steps and a cosine to 0
    loraplus_ratio: learning rate of LoRA's B over that of A (LoRA+, arXiv 2402.12354)
    batch_size: traces a device and pass; `accumulation`: passes a step, shared among the devices
    max_length: tokens of prompt and completion together
    max_pixels: pixel budget of a page image; 0: the processor's own
    tracker: where the log goes as well, one of `monitoring.TRACKERS`; "": nowhere

    Running again resumes from the last checkpoint; a finished stage returns its log at once.

    Raises ValueError where the folder was begun with other settings or data, for data without the columns of
    `sft_dataset`, and for traces longer than `max_length`; FloatingPointError when the loss is no longer finite.
    """
    folder, settings = Path(folder), locals()  # all arguments
    if (log := _finished(folder, settings)) is not None:
        return log
    arguments = SFTConfig(
        **_common(folder, learning_rate, batch_size, accumulation, warmup, save_steps, tracker, seed),
        num_train_epochs=epochs,
        max_length=max_length,
    )
    loaded, processor = _load(model, max_pixels)
    check_traces(data, processor, max_length)
    trainer = SFTTrainer(
        loaded,
        args=arguments,
        train_dataset=data,
        processing_class=processor,
        peft_config=lora(lora_rank, lora_alpha, lora_dropout),
        callbacks=[StopWhenBroken(), ReportProgress(folder, "SFT step")],
    )
    if loraplus_ratio != 1:
        trainer.optimizer = create_loraplus_optimizer(
            cast(PeftModel, trainer.model), torch.optim.AdamW, lr=learning_rate, loraplus_lr_ratio=loraplus_ratio
        )
    return _run(trainer, processor, folder, model)


def train_grpo(
    model: str | Path,
    data: datasets.Dataset,
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
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
    top_entropy: float = 1.0,
    loss_type: str = "dapo",
    scale_rewards: str = "group",
    rewards: str | Reward | Sequence[Reward] = "strict",
    reward_weights: Sequence[float] | None = None,
    max_completion: int = 2048,
    lora_rank: int,
    lora_alpha: int | None = None,
    lora_dropout: float = 0.0,
    warmup: float = 0.0,
    max_pixels: int = 0,
    share_prefix: bool = True,
    vllm: str = "",
    save_steps: int = 5,
    tracker: str = "",
    seed: int = 0,
) -> pd.DataFrame:
    """Train `model` with GRPO (arXiv 2402.03300) on prompts (`rl_dataset`), and return the log.

    adapter: an adapter of `model` to continue (then `lora_*` are its own); None: a new one
    batch_size: completions a device and pass; times `accumulation` (passes a step, shared among the devices):
        completions a step. `generations` of them (G, a group) answer the same prompt
    max_steps: optimisation steps; -1: as many as `epochs` passes over the prompts take
    iterations: optimisation steps a batch of completions (mu)
    beta: weight of the KL divergence to the starting model; 0 keeps no reference model, and logs no KL
    top_entropy: share of the tokens, the most uncertain ones, that the loss is of (arXiv 2506.01939). Of the others the
        model is sure, and moving them is mostly noise
    loss_type: as in trl; "grpo" divides by each completion's length and so favours long wrong answers
    rewards: a name of `REWARD_SETS`, or one or more functions of the signature in `mmr5_lab.rewards`, summed with
        `reward_weights` (1 each). A function may return None for a completion, or for all, that it does not apply to
    max_completion: tokens
    lora_alpha: None: twice the rank
    share_prefix: encode a prompt once for its group, where the model can (`training.shared_prefix`)
    vllm: "colocate" or "server": sample with vLLM, as trl runs it (docs/full_size.md); "": with transformers
    save_steps: rounded up to whole batches of completions, so that a resumed run need not sample again

    The other arguments are those of `train_sft`. `mmr5_lab.training.monitoring` says what is logged; it reads the
    completions, which are all kept. Before the first step the model must give the logits that the stage before it
    ended with (`check_logits`). Running again resumes from the last checkpoint; a finished stage returns its log at
    once.

    Raises ValueError where the folder was begun with other settings or data, for an unknown name of rewards, for data
    without the columns of `rl_dataset` or without a positive, and where a step's completions do not fill whole groups
    or the prompts no step; FloatingPointError when the loss is no longer finite, CollapseError when the answers lose
    their form.
    """
    functions = reward_functions(rewards)
    folder, settings = Path(folder), locals()  # all arguments
    if (log := _finished(folder, settings)) is not None:
        return log
    save_steps = -(-save_steps // iterations) * iterations
    common = _common(folder, learning_rate, batch_size, accumulation, warmup, save_steps, tracker, seed)
    passes = common["gradient_accumulation_steps"]
    if (batch_size * passes) % generations:
        raise ValueError(
            f"{batch_size} × {passes} completions a step (on each device) are not a multiple of the group size"
            f" {generations}: a group stays on one device"
        )
    check_prompts(data, batch_size * accumulation, generations)
    arguments = GRPOConfig(
        **common,
        num_train_epochs=epochs,
        max_steps=max_steps,
        num_generations=generations,
        num_iterations=iterations,
        temperature=temperature,
        beta=beta,
        epsilon=epsilon,
        top_entropy_quantile=top_entropy,
        loss_type=loss_type,
        scale_rewards=scale_rewards,
        reward_weights=list(reward_weights) if reward_weights else None,
        max_completion_length=max_completion,
        use_vllm=bool(vllm),
        vllm_mode=vllm or "colocate",
        log_completions=True,
        num_completions_to_print=0,
        log_multimodal=False,
    )
    loaded, processor = _load(model, max_pixels)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter, is_trainable=True)
    prompt = processor.apply_chat_template(build_messages("q", 1), tokenize=False, add_generation_prompt=True)
    first, *others = functions
    reason = cannot_share(loaded) if share_prefix else None
    if reason:
        logger.warning("%s: a prompt is encoded anew for each of its completions", reason)
    trainer_class = SharedPrefixGRPOTrainer if share_prefix and not reason else GRPOTrainer
    trainer = trainer_class(
        loaded,
        reward_funcs=[
            for_trl(function, processor.tokenizer, with_opening("", prompt))
            for function in (logging_completions(first), *others)
        ],
        args=arguments,
        train_dataset=data,
        processing_class=processor,
        peft_config=None if adapter else lora(lora_rank, lora_alpha or 2 * lora_rank, lora_dropout),
        callbacks=[NewOrders(data), StopWhenBroken(), ReportProgress(folder, "GRPO step")],
    )
    check_logits(trainer.model, processor, adapter or model)
    return _run(trainer, processor, folder, model)


class NewOrders(TrainerCallback):
    """Tell the prompts (`rl_dataset`) which epoch it is, so that their pages come in another order."""

    def __init__(self, data: datasets.Dataset):
        self.reader = data.format["format_kwargs"].get("transform")

    def on_epoch_begin(self, args, state, control, **kwargs):
        if isinstance(self.reader, PromptReader):
            self.reader.epoch = int(state.epoch + 1e-6)  # a resumed run's epoch may be .9999… of a whole number


def reward_functions(rewards: str | Reward | Sequence[Reward]) -> list[Reward]:
    """Return the functions of `train_grpo`'s `rewards`. Raises ValueError for an unknown name and for none."""
    if isinstance(rewards, str):
        if rewards not in REWARD_SETS:
            raise ValueError(f"there are no rewards {rewards!r}: choose one of {', '.join(REWARD_SETS)}")
        rewards = REWARD_SETS[rewards]
    functions = [rewards] if callable(rewards) else list(rewards)
    if not functions or not all(map(callable, functions)):
        raise ValueError(f"rewards is {rewards!r}: give a name of {', '.join(REWARD_SETS)}, a function, or several")
    return functions


def _finished(folder: Path, settings: Mapping[str, Any]) -> pd.DataFrame | None:
    """Return the log of the stage that is finished in `folder`, or None where there is still something to train.

    settings: all arguments of the stage. Raises ValueError where the folder was begun with others, or other data.
    """
    kept = {name: value for name, value in settings.items() if name not in NOT_LEARNT}
    if "functions" in kept:
        kept["rewards"] = [getattr(function, "__name__", repr(function)) for function in kept.pop("functions")]
    kept["data"] = data_fingerprint(settings["data"])
    with PartialState().main_process_first():
        check_settings(folder / SETTINGS, kept)
    return finished_log(folder)


def finished_log(folder: str | Path) -> pd.DataFrame | None:
    """Return the log of the stage that is finished in `folder`, or None."""
    path = Path(folder) / LOG
    return pd.read_csv(path) if path.is_file() else None


def _load(model: str | Path, max_pixels: int):
    """Load the model onto this process's device, or onto the CPU where FSDP will spread its weights over all."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed stage 3 cannot merge the adapter afterwards: use stage 2, or FSDP2 where the weights do not fit"
        )
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    device = "cpu" if sharded else str(PartialState().device)
    loaded, processor = load_model(model, device=device, dtype=_dtype(), max_pixels=max_pixels or None)
    # The vision tower is frozen, so a page is encoded once, not once an epoch and completion. Where the weights are
    # sharded every process must take part in each encoding, so none may skip it.
    if PageCache.supports(loaded) and not sharded:
        PageCache(loaded)
    return loaded.train(), processor


def _dtype() -> torch.dtype:
    return best_dtype(str(PartialState().device))


def lora(rank: int, alpha: int, dropout: float) -> LoraConfig:
    """Return the adapter's configuration: all linear layers of the language model, none of the vision tower."""
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
    warmup: float,
    save_steps: int,
    tracker: str,
    seed: int,
) -> dict[str, Any]:
    """Return the arguments of both stages' trainers. Raises ValueError where devices cannot share the passes evenly."""
    gpu, processes = PartialState().device.type == "cuda", PartialState().num_processes
    if accumulation % processes:
        raise ValueError(
            f"{accumulation} passes a step (ACCUMULATION) cannot be shared evenly among {processes} devices"
        )
    return {
        **tracker_options(tracker, folder),
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation // processes,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup,  # below 1, transformers takes it as a share of all steps
        "save_steps": save_steps,
        "save_total_limit": 1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # `StopWhenBroken` must see a loss that is not finite
        "disable_tqdm": True,  # ReportProgress shows the bar
        "seed": seed,
        "data_seed": seed,
        "bf16": gpu,
        "activation_checkpointing": gpu,
        "dataloader_pin_memory": gpu,
        "ddp_find_unused_parameters": False,  # every pass uses all that LoRA trains
    }


def _run(trainer, processor, folder: Path, base: str | Path) -> pd.DataFrame:
    """Train to the end, from the last checkpoint on, then write the adapter, the merged model and the log."""
    trainer.remove_callback(PrinterCallback)
    output, wait_for_everyone = Path(trainer.args.output_dir), trainer.accelerator.wait_for_everyone
    last = _last_checkpoint(output)
    if last is None or not _is_final(last):  # resumed after its last step, transformers would take another one
        trainer.train(resume_from_checkpoint=last and str(last))
        wait_for_everyone()  # the final checkpoint is written
        last = _last_checkpoint(output)
    assert last is not None  # the last step always writes one
    rows = [row for row in _state(last).log_history if "loss" in row]
    rows = [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]
    log = pd.DataFrame(rows).drop(columns="num_tokens", errors="ignore")  # trl counts them anew after an interruption
    if trainer.is_world_process_zero():
        (folder / "adapter").mkdir(exist_ok=True)
        for file in last.glob("adapter_*"):
            shutil.copy(file, folder / "adapter")
        merge(base, folder, processor, _dtype())
        with replacing(folder / LOG) as new:
            log.to_csv(new, index=False)
    wait_for_everyone()
    return log


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint: `trainer_state.json` is written last. Others are written again."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            _state(checkpoint)
        except (OSError, ValueError):
            continue
        return checkpoint
    return None


def _state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _is_final(checkpoint: Path) -> bool:
    state = _state(checkpoint)
    return state.global_step >= state.max_steps
