"""A probe: the logits after a fixed prompt of one page, which tell whether two models are the same.

Training keeps them in `probe.npy` beside an adapter and beside the weights that it was merged into, and with them those
of the model without the adapter, which say how much the adapter changes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmr5_lab.prompting.prompts import build_messages

PROBE = "probe.npy"
PROBE_PAGE = (112, 112)  # pixels; a page of one colour looks the same at any pixel budget
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


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


def distance(logits: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, in units of the largest expected logit (at least 1); nan where one is nan."""
    return float(np.abs(logits - expected).max()) / max(1.0, float(np.abs(expected).max()))


def kept_probe(folder: str | Path) -> tuple[np.ndarray, float] | None:
    """Return the probe in a folder of a model or an adapter, and how far from it the model without the adapter is.

    None where there is none (a base model). The distance is 0 where only the probe was kept.
    """
    path = Path(folder) / PROBE
    if not path.is_file():
        return None
    kept = np.load(path)
    return (kept, 0.0) if kept.ndim == 1 else (kept[0], distance(kept[1], kept[0]))


def tolerance(dtype: torch.dtype, without: float) -> float:
    """Return what `distance` from a kept probe is rounding, where a missing adapter gives the distance `without`.

    In 16 bits a deep model's logits differ from a CPU to a GPU by more than `TOLERANCE`: those of a random model of
    Qwen2.5-VL-7B's shape by .13 (docs/log.md, 2026-11-27). An adapter that is missing still shows.
    """
    return TOLERANCE[dtype] if dtype == torch.float32 else max(TOLERANCE[dtype], 0.8 * without)
