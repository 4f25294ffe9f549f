"""What a request will take, before weights are loaded: visual tokens, context, memory.

    budget = plan("Qwen/Qwen2.5-VL-7B-Instruct", image_sizes=[(1100, 850)] * 10, batch_size=8)
    print(budget)
    budget.check()          # ValueError, with settings that would fit, where it does not

Only the model's configuration and processor are read. Weights, keys and values, page features and pixels follow from
them; what a pass through the vision tower and the reading of the prompts hold at once is estimated.
`plan_training` estimates memory and time of LoRA training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmr5_lab.models.folders import model_source
from mmr5_lab.models.loading import best_device, best_dtype, set_max_pixels
from mmr5_lab.models.vision_cache import PIXELS_AT_ONCE
from mmr5_lab.prompting.prompts import build_messages

GIB = 1 << 30
PAGE_CACHE = GIB  # bytes that `PageCache` may take
OPERATIONS, BANDWIDTH, LATENCY = 3e14, 2e12, 2.2e-3  # a second; seconds a layer and token that is written (H200: log)
PATCH_NUMBERS = 6 * 14**2  # two frames of three colours, 14 × 14 pixels


def visual_tokens(processor, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens that a processor makes of images of these (height, width) in pixels.

    Raises ValueError for a size that the processor refuses (such as an aspect ratio above 200).
    """
    if hasattr(processor, "_get_num_multimodal_tokens"):
        counted = processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in image_sizes])
        return list(counted["num_image_tokens"])
    known: dict[tuple[int, int], int] = {}
    for height, width in set(image_sizes):  # a processor that cannot count shows what it does with a blank page
        blank = Image.new("RGB", (width, height))
        inputs = processor(text=[processor.image_token], images=[[blank]], return_tensors="pt")
        known[height, width] = inputs["input_ids"].numel()
    return [known[size] for size in image_sizes]


def patch_grid(processor, size: tuple[int, int]) -> tuple[int, int, int] | None:
    """How a page of this (height, width) is cut: rows and columns of patches, and patches along a side of a token.

    None for models that cut pages otherwise (Gemma 3, InternVL).
    """
    images = processor.image_processor
    if not hasattr(images, "merge_size"):
        return None
    blank = Image.new("RGB", size[::-1])
    _, rows, columns = images(images=[blank], return_tensors="pt")["image_grid_thw"][0].tolist()
    return rows, columns, images.merge_size


def text_tokens(processor, text: str) -> int:
    """Tokens of a prompt (chat template applied) beside its images."""
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) - text.count(processor.image_token)


def overfull(page_tokens: Sequence[int], words: int, room: int, context: int | None) -> str | None:
    """What is too much for the context, with its numbers; None where the pages, words and answer fit."""
    tokens = sum(page_tokens) + words + room
    if context is None or tokens <= context:
        return None
    return (
        f"{len(page_tokens)} pages make {sum(page_tokens)} visual tokens; with {words} of text and {room} for the"
        f" answer that is {tokens} of a context of {context}"
    )


def context_length(config) -> int | None:
    """Positions of the language model, or None where the configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def cache_bytes_a_token(config, dtype: torch.dtype) -> int:
    """Keys and values of one token: 2 × layers × key-value heads × head size × bytes a number."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * dtype.itemsize


@dataclass(frozen=True)
class Budget:
    """What one batch takes.

    page_tokens: visual tokens of each page; text_tokens: of the prompt's words; new_tokens: room for the answer
    context: positions of the model (None: not stated)
    weights, memory: bytes of the model, and free on the device
    cache, features, prefill: bytes of the whole batch: keys and values, pages after the vision tower, and what one
        layer holds while the prompts are read
    vision: bytes while pages are encoded, a bounded number at once
    pixels_a_token: of a page; None where a processor has no pixel budget
    """

    page_tokens: list[int]
    text_tokens: int
    new_tokens: int
    context: int | None
    batch_size: int
    parameters: int
    weights: int
    cache: int
    features: int
    prefill: int
    vision: int
    memory: int
    pixels_a_token: int | None

    @property
    def tokens(self) -> int:
        """Tokens of one query: pages, text and answer."""
        return sum(self.page_tokens) + self.text_tokens + self.new_tokens

    def needed(self, batch_size: int) -> int:
        """Bytes at once with a batch of this size."""
        share = batch_size / self.batch_size
        return self.weights + round(share * self.features + max(share * (self.cache + self.prefill), self.vision))

    def check(self) -> None:
        """Raise ValueError, naming numbers and settings that would fit, where the request does not."""
        problems = []
        problem = overfull(self.page_tokens, self.text_tokens, self.new_tokens, self.context)
        if problem and self.context is not None:
            room, pages = self.context - self.text_tokens - self.new_tokens, len(self.page_tokens)
            most = max(self.page_tokens)
            advice = [f"at most {room // most} such pages"] if room >= most else []
            if self.pixels_a_token and room >= pages:
                advice.append(f"max_pixels={room // pages * self.pixels_a_token}")
            problems.append(f"{problem}. What would fit: {' or '.join(advice) or 'a shorter answer (max_new_tokens)'}")
        if self.needed(self.batch_size) > self.memory:
            batch = next((n for n in range(self.batch_size, 0, -1) if self.needed(n) <= self.memory), 0)
            fitting = f"batch_size={batch}" if batch else "a smaller model, 4-bit weights or more memory"
            problems.append(
                f"weights take {self.weights / GIB:.1f} GiB and a batch of {self.batch_size} queries"
                f" {(self.needed(self.batch_size) - self.weights) / GIB:.1f} GiB, but {self.memory / GIB:.1f} GiB are"
                f" free. What would fit: {fitting}"
            )
        if problems:
            raise ValueError("this does not fit: " + "; ".join(problems))

    def __str__(self) -> str:
        return (
            f"{len(self.page_tokens)} pages: {sum(self.page_tokens)} visual tokens, {self.text_tokens} of text,"
            f" {self.new_tokens} for the answer: {self.tokens} of {self.context or 'an unknown number of'} positions\n"
            f"{self.parameters / 1e6:.1f} million parameters: {self.weights / GIB:.2f} GiB; keys and values of"
            f" {self.batch_size} queries: {self.cache / GIB:.2f} GiB; at once:"
            f" {self.needed(self.batch_size) / GIB:.2f} GiB; free: {self.memory / GIB:.2f} GiB"
        )


def _layer_bytes(hidden: int, inner: int, dtype: torch.dtype) -> int:
    """Return what one token holds within a layer of inference: residual, normed input, and three of the MLP's width."""
    return (2 * hidden + 3 * inner) * dtype.itemsize


def _vision_bytes(
    config, image_sizes: Sequence[tuple[int, int]], tokens: Sequence[int], dtype: torch.dtype, device: str
) -> int:
    """Return bytes while `PIXELS_AT_ONCE` are encoded: pixels and one layer.

    On a CPU the processor's own copies count, about four of the pixels in float32 (measured: docs/log.md, 2026-11-26).
    """
    vision = config.vision_config
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size  # Qwen2-VL calls its output hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(hidden * getattr(vision, "mlp_ratio", 4))
    a_patch = PATCH_NUMBERS * (16 if device == "cpu" else dtype.itemsize) + _layer_bytes(hidden, inner, dtype)
    at_once = (
        min(math.ceil(PIXELS_AT_ONCE / (height * width)), len(tokens)) * count
        for (height, width), count in zip(image_sizes, tokens, strict=True)
    )
    return max(at_once) * getattr(vision, "spatial_merge_size", 2) ** 2 * a_patch  # patches a token


def plan(
    model: str | Path,
    image_sizes: Sequence[tuple[int, int]],
    *,
    max_new_tokens: int = 2048,
    batch_size: int = 1,
    max_pixels: int | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
) -> Budget:
    """The budget of a batch of queries with pages of these (height, width) each, in mode "reason".

    memory: bytes that may be used; None: what is free on the device now
    Raises ValueError for no pages and for a page size that the processor refuses.
    """
    if not image_sizes:
        raise ValueError("image_sizes is empty: there are no pages to plan for")
    model = model_source(model, weights=False)
    config = AutoConfig.from_pretrained(model)
    processor: Any = AutoProcessor.from_pretrained(model)
    if max_pixels:
        set_max_pixels(processor, max_pixels)
    device = device or best_device()
    dtype = dtype or best_dtype(device)
    if memory is None:
        on_gpu = device.startswith("cuda")
        memory = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    pages = visual_tokens(processor, image_sizes)
    messages = build_messages("What was the revenue in 2015?", len(pages))
    words = text_tokens(processor, processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    with torch.device("meta"):
        parameters = AutoModelForImageTextToText.from_config(config).num_parameters()
    text = config.get_text_config()
    read = (sum(pages) + words) * batch_size
    images = processor.image_processor
    return Budget(
        page_tokens=pages,
        text_tokens=words,
        new_tokens=max_new_tokens,
        context=context_length(config),
        batch_size=batch_size,
        parameters=parameters,
        weights=parameters * dtype.itemsize,
        cache=cache_bytes_a_token(config, dtype) * (sum(pages) + words + max_new_tokens) * batch_size,
        features=2 * sum(pages) * batch_size * text.hidden_size * dtype.itemsize,  # each page's own, and joined
        prefill=read * _layer_bytes(text.hidden_size, text.intermediate_size, dtype),
        vision=_vision_bytes(config, image_sizes, pages, dtype, device),
        memory=memory,
        pixels_a_token=(images.patch_size * images.merge_size) ** 2 if hasattr(images, "merge_size") else None,
    )


@dataclass(frozen=True)
class TrainingBudget:
    """What LoRA training takes on one device, estimated; bytes, and floating-point operations of one example.

    An example is a trace (SFT) or a completion (GRPO). adapter: LoRA's weights with gradients and Adam's two moments
    in float32, 16 bytes a parameter; activations: with checkpointing, of one pass; sampling: keys and values while a
    step's completions are sampled; pages: the page cache at its bound, and a step's pixels in float32; operations: of
    learning; sampled_tokens: written one after another; accumulation: passes a step; layers: of the language model
    """

    request: Budget
    adapter: int
    activations: int
    operations: float
    sampled_tokens: int
    sampling: int
    pages: int
    accumulation: int
    layers: int

    @property
    def memory(self) -> int:
        """Bytes at once: learning and sampling take turns."""
        return self.request.weights + self.adapter + self.pages + max(self.activations, self.sampling)

    def hours(
        self,
        examples: int,
        devices: int = 1,
        operations: float = OPERATIONS,
        bandwidth: float = BANDWIDTH,
        latency: float = LATENCY,
    ) -> float:
        """Hours for so many examples, with devices that reach so many operations and bytes of memory a second.

        A sampled token reads all weights once for all rows of a step, whose number on each device more devices lower.
        That takes no less than `latency` seconds a layer: transformers starts its kernels one after another, and more
        devices do not sample faster.
        """
        steps = examples / (self.request.batch_size * self.accumulation)
        reading = (self.request.weights + self.sampling / devices / 2) / bandwidth
        sampling = steps * self.sampled_tokens * max(reading, latency * self.layers)
        return (examples * self.operations / operations / devices + sampling) / 3600

    def __str__(self) -> str:
        parts = {
            "weights": self.request.weights, "adapter": self.adapter, "activations": self.activations,
            "pages": self.pages, "keys and values": self.sampling, "at once": self.memory,
        }  # fmt: skip
        sizes = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        return f"{self.request.tokens} tokens an example; GiB on a device: {sizes}"


def plan_training(
    model: str | Path,
    image_sizes: Sequence[tuple[int, int]],
    *,
    lora_rank: int,
    completion: int,
    batch_size: int,
    accumulation: int = 1,
    generations: int = 0,
    iterations: int = 1,
    max_pixels: int | None = None,
) -> TrainingBudget:
    """Estimate LoRA training in bfloat16 on prompts with pages of these (height, width); weights on every device (DDP).

    completion: tokens of a completion; batch_size: examples a device and pass; accumulation: passes a step, whose
    completions trl samples all at once; generations: 0 for SFT, else G of GRPO with a KL term, where a prompt is
    encoded once for its group (`mmr5_lab.training.shared_prefix`)

    A token costs 2 operations a parameter and pass. Learning takes three passes through the language model (forward,
    its repetition by checkpointing, gradients of activations; those of frozen weights are not computed) and one
    through the frozen vision tower. Activations: each layer's input, and for the layer that is repeated 8 numbers of
    the hidden size and 5 of the gated MLP's width a token (69 × hidden size bytes in 16 bits for 7B; arXiv 2205.05198,
    table 2, has 34 for a plain MLP of 4 times the width).
    """
    dtype = torch.bfloat16
    limits: dict[str, Any] = {"max_new_tokens": completion, "batch_size": batch_size, "max_pixels": max_pixels}
    request = plan(model, image_sizes, dtype=dtype, memory=0, **limits)
    config = AutoConfig.from_pretrained(model)
    text = config.get_text_config()
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    language = next(module for name, module in whole.named_modules() if name.endswith("language_model"))
    linear = [module for module in language.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in linear)
    seeing = sum(p.numel() for name, p in whole.named_parameters() if ".visual." in name)
    group = generations or 1
    learnt = (request.tokens - completion) / group + completion  # tokens an example: a prompt's are shared
    stored = (text.num_hidden_layers + 8) * text.hidden_size + 5 * text.intermediate_size  # numbers a token
    passes = 3 * iterations + (2 if generations else 0)  # the starting model's probabilities, and those when sampled
    return TrainingBudget(
        request=request,
        adapter=16 * lora_rank * sum(layer.in_features + layer.out_features for layer in linear),
        activations=round(batch_size * learnt * stored * dtype.itemsize),
        operations=2 * weights * learnt * passes + 2 * seeing * 4 * sum(request.page_tokens) / group,
        sampled_tokens=completion if generations else 0,
        sampling=request.cache * accumulation if generations else 0,
        accumulation=accumulation,
        layers=text.num_hidden_layers,
        pages=PAGE_CACHE + sum(request.page_tokens) * batch_size * accumulation * 4 * PATCH_NUMBERS * 4,
    )
