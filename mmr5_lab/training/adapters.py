"""From one stage to the next: the trained adapter, the merged model, and the proof that they are the same.

A finished stage leaves in its folder

    adapter/   the LoRA adapter        model/   the same merged into the weights (safetensors), with the processor

and in both `probe.npy`: the logits of the trained model after a fixed prompt of one page. A stage that starts from
either computes them again before its first step (`check_logits`): a wrong base, an adapter that was not loaded or one
that was merged twice shows there, not after a day.

RL starts from SFT in one of two ways (`starting_point`): "merge" trains a new adapter on the merged weights, as the
paper does; "continue" trains the SFT adapter itself on the base. KL is measured from the SFT model in both.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from mmr5_lab.files import results
from mmr5_lab.models.loading import load_model
from mmr5_lab.prompting.prompts import build_messages

SFT_ADAPTER = ("merge", "continue")  # what RL does with the adapter of SFT
PROBE = "probe.npy"
PROBE_PAGE = (112, 112)  # pixels; a page of one colour looks the same at any pixel budget
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


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
    np.save(folder / "adapter" / PROBE, logits)
    merged = adapted.merge_and_unload()
    _compare(probe(merged, processor), logits, dtype, f"the merged weights of {folder}")
    merged.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    shutil.copy(folder / "adapter" / PROBE, folder / "model" / PROBE)


def check_logits(model, processor, source: str | Path) -> float | None:
    """Return the largest difference between `model`'s logits and those kept in `source`, a model or adapter folder.

    None where `source` holds no probe (a base model). Raises RuntimeError where the difference is more than rounding.
    """
    path = Path(source) / PROBE
    if not path.is_file():
        return None
    return _compare(probe(model, processor), np.load(path), model.dtype, f"the model loaded from {source}")


@torch.inference_mode()
def probe(model, processor) -> np.ndarray:
    """Return the logits (float32, one a token of the vocabulary) after a fixed question on one grey page."""
    messages = build_messages("What was the revenue in 2015?", 1)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    page = Image.new("RGB", PROBE_PAGE, "grey")
    inputs: Any = processor(text=[text], images=[[page]], return_tensors="pt", add_special_tokens=False)
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    training = model.training
    model.eval()
    logits = model(**inputs, use_cache=False).logits[0, -1]
    model.train(training)
    return logits.float().cpu().numpy()


def _compare(logits: np.ndarray, expected: np.ndarray, dtype: torch.dtype, what: str) -> float:
    difference = float(np.abs(logits - expected).max())
    tolerance = TOLERANCE[dtype] * max(1.0, float(np.abs(expected).max()))
    if not difference <= tolerance:  # not `>`: a difference of nan must fail too
        raise RuntimeError(
            f"{what} gives logits that differ by {difference:.3g} from those at the end of its training (up to"
            f" {tolerance:.3g} is rounding): another base, or an adapter that is missing or merged twice"
        )
    return difference
