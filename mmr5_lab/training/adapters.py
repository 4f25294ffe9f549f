"""From one stage to the next: the trained adapter, the merged model, and the proof that they are the same.

A finished stage keeps beside its adapter and its merged model `probe.npy`: the logits of the trained model after a
fixed prompt of one page. A stage that starts from either computes them again before its first step (`check_logits`): a
wrong base, an adapter that was not loaded or one that was merged twice shows there, not after a day.

RL starts from SFT in one of two ways (`starting_point`): "merge" trains a new adapter on the merged weights, as the
paper does; "continue" trains the SFT adapter itself on the base. KL is measured from the SFT model in both.
"""

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from mmr5_lab.files import results
from mmr5_lab.models.loading import adapter_fingerprint, load_model
from mmr5_lab.models.probe import PROBE, distance, kept_probe, probe, tolerance

SFT_ADAPTER = ("merge", "continue")  # what RL does with the adapter of SFT


def starting_point(sft_run: str | Path, sft_adapter: str) -> tuple[str, str | None]:
    """Return the model that RL starts from after a finished SFT run, and the adapter to continue or None.

    Raises ValueError where `sft_adapter` is not one of `SFT_ADAPTER`, FileNotFoundError where the run is not finished.
    """
    if sft_adapter not in SFT_ADAPTER:
        raise ValueError(f"SFT_ADAPTER is {sft_adapter!r}: choose one of {', '.join(SFT_ADAPTER)}")
    run = results(sft_run)
    return (run["model"], None) if sft_adapter == "merge" else (run["base"], run["adapter"])


def merge(base: str | Path, folder: Path, processor, dtype: torch.dtype) -> None:
    """Merge `folder/adapter` into `base` as `folder/model`, on the CPU, whatever devices the training used.

    Raises RuntimeError where the merged weights do not give the adapter's logits.
    """
    loaded, _ = load_model(base, device="cpu", dtype=dtype)
    adapted = PeftModel.from_pretrained(loaded, folder / "adapter").eval()
    logits = probe(adapted, processor)
    with adapted.disable_adapter():
        without = probe(adapted, processor)
    np.save(folder / "adapter" / PROBE, np.stack([logits, without]))
    merged = adapted.merge_and_unload()
    after = probe(merged, processor)
    _compare(after, (logits, distance(without, logits)), dtype, f"the merged weights of {folder}")
    # Loading compares this list with an adapter's weights, so that no adapter is merged twice.
    merged.config.merged_adapters = [
        *getattr(merged.config, "merged_adapters", []), adapter_fingerprint(folder / "adapter")
    ]  # fmt: skip
    merged.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    np.save(folder / "model" / PROBE, np.stack([after, without]))  # of these weights: they were rounded


def check_logits(model, processor, source: str | Path) -> float | None:
    """Return how far `model`'s logits are from those kept in `source`, a model or adapter folder (`distance`).

    None where `source` holds no probe (a base model). Raises RuntimeError where the difference is more than rounding.
    """
    kept = kept_probe(source)
    if kept is None:
        return None
    return _compare(probe(model, processor), kept, model.dtype, f"the model loaded from {source}")


def _compare(logits: np.ndarray, kept: tuple[np.ndarray, float], dtype: torch.dtype, what: str) -> float:
    difference, limit = distance(logits, kept[0]), tolerance(dtype, kept[1])
    if not difference <= limit:  # not `>`: a difference of nan must fail too
        raise RuntimeError(
            f"{what} gives logits that differ by {difference:.3g} of the largest from those at the end of its training"
            f" (up to {limit:.2g} is rounding): another base, or an adapter that is missing or merged twice"
        )
    return difference
