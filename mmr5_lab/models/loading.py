"""Load a vision-language model and its processor, with device, dtype and pixel budget chosen sensibly."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from mmr5_lab.models.cpu_layers import use_onednn
from mmr5_lab.models.folders import adapter_folder, model_source
from mmr5_lab.models.probe import TOLERANCE, distance, kept_probe, probe, tolerance

# peft 0.21 and trl 1.16 ask by the name that transformers 5.24 gave up, trl twice a step
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 products were 77 times slower (docs/log.md)."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def best_attention(device: str, dtype: torch.dtype | str) -> str | None:
    """Flash attention where it is installed and has kernels (Ampere or newer, 16 bits); None: transformers' choice."""
    if not device.startswith("cuda") or dtype not in (torch.float16, torch.bfloat16) or not is_flash_attn_2_available():
        return None
    return "flash_attention_2" if torch.cuda.get_device_capability(torch.device(device))[0] >= 8 else None


def load_model(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    attention: str | None = None,
    max_pixels: int | None = None,
    four_bit: bool = False,
    **options: Any,
):
    """Return a model for image-text-to-text and its processor.

    model: a folder, also that of a finished run (then its merged model), or a name on the Hugging Face hub
    adapter: a PEFT adapter, merged into the weights; also the folder of a run or an export that has one
    attention: "sdpa", "flash_attention_2", "eager"; None: flash attention on a GPU where it is installed, else what
        transformers chooses
    max_pixels: budget of one page image, in pixels (28 × 28 make one visual token of Qwen2.5-VL); None leaves the
        processor's own
    four_bit: weights in 4-bit NormalFloat (QLoRA, arXiv 2305.14314); needs bitsandbytes and a GPU

    Nothing from the model's repository is executed. Raises FileNotFoundError for a folder that is not a checkpoint or
    lacks files, ValueError for damaged files, for a model without images, for an adapter that the weights hold already
    or that belongs to another base, and for `four_bit` where it cannot work.
    """
    model = model_source(model)
    device = device or best_device()
    config = AutoConfig.from_pretrained(model)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(f"{model} is a {config.model_type} model, which takes no images")
    dtype = dtype or best_dtype(device)
    attention = attention or best_attention(device, dtype)
    if attention:
        options["attn_implementation"] = attention
    if four_bit:
        if not (device.startswith("cuda") and is_bitsandbytes_available()):
            raise ValueError(
                f"4-bit weights need a GPU (the device is {device}) and bitsandbytes: pip install bitsandbytes, or"
                " leave four_bit away"
            )
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        options |= {"quantization_config": nf4, "device_map": {"": device}}
    processor = AutoProcessor.from_pretrained(model)
    if not processor.chat_template:
        raise ValueError(
            f"{model} has no chat template: copy chat_template.jinja of the model that it was trained from"
        )
    processor.tokenizer.padding_side = "left"  # generation continues at the right end
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, use_safetensors=True, **options)
    if not four_bit:  # quantised weights are placed when they are loaded
        loaded.to(torch.device(device))  # type: ignore[arg-type]
    if adapter is not None:
        loaded = _with_adapter(loaded.eval(), processor, adapter_folder(adapter), model)
    if max_pixels:
        set_max_pixels(processor, max_pixels)
    if device == "cpu":
        use_onednn(loaded)
    return loaded.eval(), processor


def _with_adapter(loaded, processor, adapter: str | Path, model: str | Path):
    """Return the model with an adapter merged into it. Raises ValueError for one that does not belong on it."""
    from peft import PeftModel

    already = f"{model} already holds the adapter {adapter} (already merged): load the model without it"
    if adapter_fingerprint(adapter) in getattr(loaded.config, "merged_adapters", []):
        raise ValueError(already)
    adapted = PeftModel.from_pretrained(loaded, adapter).eval()
    kept = kept_probe(adapter)
    if kept is not None:
        expected, without = kept
        after = distance(probe(adapted, processor), expected)
        if not after <= TOLERANCE[torch.float32]:  # rounding of 16 bits, or another model
            with adapted.disable_adapter():
                before = distance(probe(adapted, processor), expected)
            if before < after and before <= TOLERANCE[torch.bfloat16]:
                raise ValueError(already)
            if not after <= tolerance(torch.bfloat16, without):
                raise ValueError(
                    f"{adapter} was not trained on {model}: with it the logits differ by {after:.2g} of the largest"
                    " from those at the end of its training. Load the base that it was trained on"
                )
    return adapted.merge_and_unload()


def adapter_fingerprint(adapter: str | Path) -> str | None:
    """Return what names an adapter's weights (SHA-256, 16 digits); None for one that is not in a local folder."""
    path = Path(adapter) / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def set_max_pixels(processor, max_pixels: int) -> None:
    """Give the image processor a pixel budget; larger pages are scaled down to it."""
    size = dict(processor.image_processor.size)
    if "longest_edge" not in size:
        raise ValueError(f"{type(processor.image_processor).__name__} has no pixel budget to set")
    processor.image_processor.size = {
        **size,
        "longest_edge": max_pixels,
        "shortest_edge": min(size["shortest_edge"], max_pixels),
    }
