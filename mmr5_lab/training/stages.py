"""The two stages of training, on trl: SFT on reasoning traces, then GRPO with rewards for the ranking and its form.

Both train LoRA adapters on the linear layers of the language model; the vision tower stays frozen (arXiv 2506.12364).
A stage writes into its folder:

    adapter/      the LoRA adapter            model/   the same merged into the weights, for the next stage
    checkpoints/  the last checkpoint, to resume from; of GRPO, all completions as well
    log.csv       one row a logged step; it is written last, so a stage that has it is finished
    settings.json what the stage was begun with, and a fingerprint of its data

The miniature's values are the defaults of notebooks 02 and 03; for several GPUs see `experiments.launch`.
"""

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from mmr5_lab.files import check_settings
from mmr5_lab.models.loading import best_dtype, load_model
from mmr5_lab.models.vision_cache import PageCache
from mmr5_lab.prompting.answers import with_opening
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.rewards import REWARD_SETS
from mmr5_lab.traces.construction import PromptReader
from mmr5_lab.training.adapters import check_logits
from mmr5_lab.training.checkpoints import finished_log, train_to_the_end
from mmr5_lab.training.inputs import check_prompts, check_traces, data_fingerprint
from mmr5_lab.training.monitoring import ReportProgress, Reward, for_trl, tracker_options
from mmr5_lab.training.shared_prefix import SUPPORTED, SharedPrefixGRPOTrainer, cannot_share
from mmr5_lab.training.stopping import KeepBest, StopWhenBroken

VISION = r".*(visual|vision_tower|vision_model|multi_modal_projector).*"  # names of vision parts: no LoRA there
SETTINGS = "settings.json"
AS_IN_TRL = (  # arguments of `train_grpo` that trl's GRPOConfig has under the same names
    "max_steps", "temperature", "beta", "epsilon", "epsilon_high", "importance_sampling_level", "loss_type",
    "scale_rewards", "mask_truncated_completions",
)  # fmt: skip
NOT_LEARNT = ("data", "folder", "save_steps", "workers", "tracker", "share_prefix")  # these may change on resuming

logger = logging.getLogger(__name__)


@contextmanager
def freed() -> Iterator[None]:
    """Free a stage's model when the stage ends, or the next one would stand beside it in the GPU's memory."""
    try:
        yield
    finally:
        gc.collect()  # trainer, model and page cache refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@freed()
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
    weight_decay: float = 0.0,
    adam_beta2: float = 0.999,
    max_length: int = 32_768,
    max_pixels: int = 0,
    four_bit: bool = False,
    workers: int = 0,
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
    four_bit: hold the base in 4 bits while training (QLoRA, arXiv 2305.14314); needs a GPU and bitsandbytes
    workers: processes that read and scale pages for the next pass; 0: none
    tracker: where the log goes as well, one of `monitoring.TRACKERS`; "": nowhere

    Running again resumes from the last checkpoint; a finished stage returns its log at once.

    Raises ValueError where the folder was begun with other settings or data, for data without the columns of
    `sft_dataset`, and for traces longer than `max_length`; FloatingPointError when the loss is no longer finite.
    """
    folder, settings = Path(folder), locals()  # all arguments
    if (log := log_if_finished(folder, settings)) is not None:
        return log
    arguments = SFTConfig(
        **common_arguments(settings),
        save_steps=save_steps,
        lr_scheduler_type="cosine",
        weight_decay=weight_decay,
        adam_beta2=adam_beta2,
        max_length=max_length,
    )
    loaded, processor = load_for_training(model, max_pixels, four_bit)
    check_traces(data, processor, max_length)
    trainer = LoraPlusTrainer(
        loaded,
        args=arguments,
        train_dataset=data,
        processing_class=processor,
        peft_config=lora(lora_rank, lora_alpha, lora_dropout),
        callbacks=[StopWhenBroken(), ReportProgress(folder, "SFT step")],
        loraplus_ratio=loraplus_ratio,
    )
    keep_full_precision(trainer)
    return train_to_the_end(trainer, processor, folder, model)


@freed()
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
    sample_top_k: int = 0,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    importance_sampling_level: str = "token",
    top_entropy: float = 1.0,
    loss_type: str = "dapo",
    scale_rewards: str = "group",
    rewards: str | Reward | Sequence[Reward] = "strict",
    reward_weights: Sequence[float] | None = None,
    max_completion: int = 2048,
    mask_truncated_completions: bool = False,
    keep_best: bool = False,
    stop_margin: float = 0.0,
    lora_rank: int,
    lora_alpha: int | None = None,
    lora_dropout: float = 0.0,
    warmup: float = 0.0,
    schedule: str = "cosine",
    max_pixels: int = 0,
    four_bit: bool = False,
    share_prefix: bool = True,
    workers: int = 0,
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
    temperature, sample_top_k: of sampling, from the likeliest tokens alone; 0: from all
    beta: weight of the KL divergence to the starting model; 0 keeps no reference model, and logs no KL
    epsilon: how far a token's probability ratio may go from 1 before it is clipped, which matters only where
        `iterations` is above 1; `epsilon_high`: upwards (DAPO, arXiv 2503.14476); None: as far as downwards
    importance_sampling_level: "token", or "sequence" for one ratio a completion (GSPO, arXiv 2507.18071)
    top_entropy: share of the tokens, the most uncertain ones, that the loss is of (arXiv 2506.01939). Of the others the
        model is sure, and moving them is mostly noise
    loss_type: as in trl; "grpo" divides by each completion's length and so favours long wrong answers
    rewards: a name of `REWARD_SETS`, or one or more functions of the signature in `mmr5_lab.rewards`, summed with
        `reward_weights` (1 each). A function may return None for a completion, or for all, that it does not apply to
    max_completion: tokens; `mask_truncated_completions` leaves those that reach it out of the loss
    keep_best: end with the checkpoint of the best mean reward over `monitoring.WINDOW` steps, not with the last
    stop_margin: stop when that mean is this far below its best, and keep the best; 0: never
    lora_alpha: None: twice the rank
    schedule: of the learning rate after the warm-up, as in transformers
    share_prefix: encode a prompt once for its group, where the model can (`training.shared_prefix`)
    save_steps: rounded up to whole batches of completions, so that a resumed run need not sample again

    The other arguments are those of `train_sft`, as is running again. `training.monitoring` says what is logged and
    reads the completions, which are all kept. Before the first step the model must give the logits that the stage
    before it ended with (`check_logits`).

    Raises ValueError where the folder was begun with other settings or data, for an unknown name of rewards, for data
    without the columns of `rl_dataset` or without a positive, and where a step's completions do not fill whole groups
    or the prompts no step; FloatingPointError when the loss is no longer finite, CollapseError when the answers lose
    their form.
    """
    functions = _reward_functions(rewards)
    folder, settings = Path(folder), locals()  # all arguments
    if (log := log_if_finished(folder, settings)) is not None:
        return log
    check_prompts(data, batch_size, accumulation, generations)
    arguments = GRPOConfig(
        **common_arguments(settings),
        save_steps=-(-save_steps // iterations) * iterations,
        lr_scheduler_type=schedule,
        **{name: settings[name] for name in AS_IN_TRL},
        num_generations=generations,
        num_iterations=iterations,
        top_k=sample_top_k,
        top_entropy_quantile=top_entropy,
        reward_weights=list(reward_weights) if reward_weights else None,
        max_completion_length=max_completion,
        log_completions=True,
        num_completions_to_print=0,
        log_multimodal=False,
    )
    loaded, processor = load_for_training(model, max_pixels, four_bit, share_prefix)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter, is_trainable=True)
    trainer = _grpo_trainer_class(loaded, share_prefix)(
        loaded,
        reward_funcs=_reward_funcs(functions, processor),
        args=arguments,
        train_dataset=data,
        processing_class=processor,
        peft_config=None if adapter else lora(lora_rank, lora_alpha or 2 * lora_rank, lora_dropout),
        callbacks=[NewOrders(data), StopWhenBroken(), ReportProgress(folder, "GRPO step")],
    )
    if keep_best or stop_margin:
        trainer.add_callback(KeepBest(folder, stop_margin))
    keep_full_precision(trainer)
    if not four_bit:  # 4-bit weights give other logits
        check_logits(trainer.model, processor, adapter or model)
    return train_to_the_end(trainer, processor, folder, model)


class LoraPlusTrainer(SFTTrainer):
    """trl's SFTTrainer with LoRA+ as its optimizer where `loraplus_ratio` is not 1."""

    def __init__(self, *args: Any, loraplus_ratio: float, **options: Any):
        self.loraplus_ratio = loraplus_ratio
        super().__init__(*args, **options)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Return the optimizer. It is made here since transformers drops one that was made before under DeepSpeed."""
        if self.loraplus_ratio == 1 or self.optimizer is not None:
            return super().create_optimizer(model)
        arguments = cast(SFTConfig, self.args)
        self.optimizer = create_loraplus_optimizer(
            cast(PeftModel, self.model if model is None else model),
            torch.optim.AdamW,
            lr=arguments.learning_rate,
            loraplus_lr_ratio=self.loraplus_ratio,
            loraplus_weight_decay=arguments.weight_decay,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
        )
        return self.optimizer


class NewOrders(TrainerCallback):
    """Tell the prompts (`rl_dataset`) which epoch it is, so that their pages come in another order."""

    def __init__(self, data: datasets.Dataset):
        self.reader = data.format["format_kwargs"].get("transform")

    def on_epoch_begin(self, args, state, control, **kwargs):
        if isinstance(self.reader, PromptReader):
            self.reader.epoch = int(state.epoch + 1e-6)  # a resumed run's epoch may be .9999… of a whole number


def _reward_functions(rewards: str | Reward | Sequence[Reward]) -> list[Reward]:
    """Return the functions of `train_grpo`'s `rewards`. Raises ValueError for an unknown name and for none."""
    named = REWARD_SETS.get(rewards, ()) if isinstance(rewards, str) else rewards
    functions = [named] if callable(named) else list(named)
    if not functions or not all(map(callable, functions)):
        raise ValueError(f"rewards is {rewards!r}: give a name of {', '.join(REWARD_SETS)}, a function, or several")
    return functions


def _reward_funcs(functions: list[Reward], processor) -> list[Any]:
    """Return reward functions as trl calls them; the first one also logs the completions."""
    prompt = processor.apply_chat_template(build_messages("q", 1), tokenize=False, add_generation_prompt=True)
    opening = with_opening("", prompt)
    return [for_trl(f, processor.tokenizer, opening, logs=i == 0) for i, f in enumerate(functions)]


def _grpo_trainer_class(loaded, share_prefix: bool) -> type[GRPOTrainer]:
    reason = cannot_share(loaded)
    if share_prefix and reason:
        logger.warning("%s: a prompt is encoded anew for each of its completions", reason)
    return SharedPrefixGRPOTrainer if share_prefix and not reason else GRPOTrainer


def log_if_finished(folder: Path, settings: Mapping[str, Any]) -> pd.DataFrame | None:
    """Return the log of a finished stage, or None. Raises ValueError where it was begun with other arguments."""
    kept = {name: value for name, value in settings.items() if name not in NOT_LEARNT}
    if "functions" in kept:
        kept["rewards"] = [getattr(function, "__name__", type(function).__name__) for function in kept.pop("functions")]
    kept["data"] = data_fingerprint(settings["data"])
    with PartialState().main_process_first():
        check_settings(folder / SETTINGS, kept)
    return finished_log(folder)


def load_for_training(model: str | Path, max_pixels: int, four_bit: bool, share_prefix: bool = False):
    """Load the model onto this process's device, or onto the CPU where FSDP will spread its weights over all."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed stage 3 cannot merge the adapter afterwards: use stage 2, or FSDP2 where the weights do not fit"
        )
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    device = "cpu" if sharded else str(PartialState().device)
    # Sharing prefixes saves more than flash attention, which takes no mask of its own.
    sharing = share_prefix and AutoConfig.from_pretrained(model).model_type in SUPPORTED
    loaded, processor = load_model(
        model,
        device=device,
        dtype=best_dtype(str(PartialState().device)),
        attention="sdpa" if sharing else None,
        max_pixels=max_pixels or None,
        four_bit=four_bit,
    )
    # The vision tower is frozen, so a page is encoded once, not once an epoch and completion. Where the weights are
    # sharded every process must take part in each encoding, so none may skip it.
    if PageCache.supports(loaded) and not sharded:
        PageCache(loaded)
    return loaded.train(), processor


def keep_full_precision(trainer) -> None:
    """Let FSDP2 compute in bf16, but leave outputs and sums of gradients in float32.

    accelerate's default rounds log-probabilities to bf16, which halves a KL divergence of .002.
    """
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


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


def common_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of both stages' trainers. Raises ValueError where devices cannot share the passes evenly."""
    device, processes = PartialState().device.type, PartialState().num_processes
    folder, accumulation = Path(settings["folder"]), settings["accumulation"]
    if accumulation % processes:
        raise ValueError(
            f"{accumulation} passes a step (ACCUMULATION) cannot be shared evenly among {processes} devices"
        )
    return {
        **tracker_options(settings["tracker"], folder),
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": settings["learning_rate"],
        "warmup_steps": settings["warmup"],  # below 1: a share of all steps
        "num_train_epochs": settings["epochs"],
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": accumulation // processes,
        "save_total_limit": 1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # `StopWhenBroken` must see a loss that is not finite
        "disable_tqdm": True,  # ReportProgress shows the bar
        "seed": settings["seed"],
        "data_seed": settings["seed"],
        "use_cpu": device == "cpu",
        "bf16": device == "cuda",
        "activation_checkpointing": device == "cuda",
        "dataloader_num_workers": settings["workers"],
        "dataloader_pin_memory": device == "cuda",
        "ddp_find_unused_parameters": False,  # every pass uses all that LoRA trains
    }
