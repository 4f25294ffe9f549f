"""What stops a training run before its last step: a broken loss, answers that lose their form, a reward that falls."""

import math
import shutil
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback, TrainerState

from mmr5_lab.files import read_object, write_json

WINDOW = 10  # logged steps over which the form of the answers is judged


class CollapseError(RuntimeError):
    """The model no longer writes answers in the right form, which it did before."""


class StopWhenBroken(TrainerCallback):
    """Stop a run that has broken its model, before a checkpoint of that is written.

    Raises FloatingPointError where loss or gradient is not finite, CollapseError where the share of well-formed
    answers over the last `WINDOW` steps is less than a quarter of its best so far.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        advice = f"lower the learning rate (now {args.learning_rate:g})"
        for key in ("loss", "grad_norm"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(float(value)):
                raise FloatingPointError(f"step {state.global_step}: {key} is {value}; {advice} and start again")
        shares = pd.Series([row["answers/well_formed"] for row in state.log_history if "answers/well_formed" in row])
        means = shares.rolling(WINDOW).mean()
        if len(shares) >= WINDOW and means.iloc[-1] < means.max() / 4 and means.max() > 0.1:
            raise CollapseError(
                f"step {state.global_step}: {means.iloc[-1]:.2f} of the last {WINDOW} steps' answers are well-formed,"
                f" after {means.max():.2f} at best: the policy has collapsed; {advice} or give the KL term more weight"
                f" (beta, now {getattr(args, 'beta', 0):g}), and read the last completions in"
                f" {args.output_dir}/completions"
            )


BEST = "best"  # of a stage's folder: the best adapter so far, and which it is


BEST_OF = "best.json"


class KeepBest(TrainerCallback):
    """Keep the adapter of the checkpoint with the best mean reward of the last `WINDOW` steps.

    With a `margin` above 0 the run stops when that mean falls further than this below its best.
    """

    def __init__(self, folder: Path, margin: float = 0.0):
        self.folder, self.margin = folder / BEST, margin

    def on_log(self, args, state, control, **kwargs):
        means = _mean_rewards(state)
        if self.margin and max(means) - means[-1] > self.margin:
            control.should_training_stop = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        mean = _mean_rewards(state)[-1]
        best = read_object(self.folder / BEST_OF)[0] or {"reward": -math.inf}
        if mean > best["reward"]:
            # The record goes first and comes last: a kill while files are copied leaves no best, not half of one.
            self.folder.mkdir(exist_ok=True)
            (self.folder / BEST_OF).unlink(missing_ok=True)
            for file in Path(args.output_dir, f"checkpoint-{state.global_step}").glob("adapter_*"):
                shutil.copy(file, self.folder)
            write_json(self.folder / BEST_OF, best := {"step": state.global_step, "reward": float(mean)})
        if control.should_training_stop and state.global_step < state.max_steps:
            write_json(self.folder / BEST_OF, {**best, "stopped": state.global_step})


def _mean_rewards(state: TrainerState) -> list[float]:
    """Return the mean of each `WINDOW` consecutive steps' rewards; [-inf] where there are fewer steps."""
    # A step that learns again from the completions before it (`iterations`) has none, nor has one without any reward.
    rewards = [row["reward"] for row in state.log_history if row.get("reward") is not None]
    return pd.Series(rewards, dtype=float).rolling(WINDOW).mean().dropna().tolist() or [-math.inf]
