"""From checkpoints to a finished stage: resume from the last, keep the best, write adapter, merged model and log."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from transformers import PrinterCallback, TrainerCallback, TrainerState

from mmr5_lab.files import read_object, replacing
from mmr5_lab.models.loading import best_dtype
from mmr5_lab.models.threads import SpareCores
from mmr5_lab.training.adapters import merge
from mmr5_lab.training.stopping import BEST, BEST_OF

LOG = "log.csv"


def finished_log(folder: str | Path) -> pd.DataFrame | None:
    """Return the log of the stage that is finished in `folder`, or None."""
    path = Path(folder) / LOG
    return pd.read_csv(path) if path.is_file() else None


def train_to_the_end(trainer, processor, folder: Path, base: str | Path) -> pd.DataFrame:
    """Train from the last checkpoint to the end, then write the adapter, the merged model and the log.

    Returns the log. The adapter is that of the last checkpoint, or the best one where `KeepBest` kept it.
    """
    trainer.remove_callback(PrinterCallback)
    output, wait_for_everyone = Path(trainer.args.output_dir), trainer.accelerator.wait_for_everyone
    last = _last_checkpoint(output)
    if last is None or not _is_final(last, folder):  # resumed after its last step, transformers would take another one
        with threads_fitted(trainer):
            trainer.train(resume_from_checkpoint=last and str(last))
        wait_for_everyone()  # the final checkpoint is written
        last = _last_checkpoint(output)
    assert last is not None  # the last step always writes one
    rows = [row for row in _state(last).log_history if "loss" in row]
    rows = [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]
    log = pd.DataFrame(rows).drop(columns="num_tokens", errors="ignore")  # trl counts them anew after an interruption
    if trainer.is_world_process_zero():
        (folder / "adapter").mkdir(exist_ok=True)
        for file in (folder / BEST if (folder / BEST / BEST_OF).is_file() else last).glob("adapter_*"):
            shutil.copy(file, folder / "adapter")
        merge(base, folder, processor, best_dtype(str(trainer.accelerator.device)))
        with replacing(folder / LOG) as new:
            log.to_csv(new, index=False)
    wait_for_everyone()
    return log


@contextmanager
def threads_fitted(trainer) -> Iterator[None]:
    """A block in which `trainer` takes as many threads as cores that others leave, and looks again at each step."""
    with SpareCores(trainer.accelerator.device) as spare:
        trainer.add_callback(_FitThreads(spare))
        yield


class _FitThreads(TrainerCallback):
    def __init__(self, spare: SpareCores):
        self.spare = spare

    def on_step_begin(self, args, state, control, **kwargs):
        self.spare.fit()


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


def _is_final(checkpoint: Path, folder: Path) -> bool:
    state, best = _state(checkpoint), read_object(folder / BEST / BEST_OF)[0] or {}
    return state.global_step >= state.max_steps or best.get("stopped") == state.global_step
