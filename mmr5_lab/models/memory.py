"""What a request will take, before weights are loaded: visual tokens, context, memory.

    budget = plan("Qwen/Qwen2.5-VL-7B-Instruct", image_sizes=[(1100, 850)] * 10, batch_size=8)
    print(budget)
    budget.check()          # ValueError, with settings that would fit, where it does not

Only the model's configuration and processor are read. Memory counts weights and the cache of keys and values, which
follow from the configuration; activations come on top and are not known beforehand. `plan_training` estimates them, and
time, for LoRA training.
"""

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
from mmr5_lab.prompting.prompts import build_messages

GIB = 1 << 30


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
    context: positions of the model (None: not stated); weights, cache, memory: bytes (cache: of the whole batch;
    memory: free on the device)
    fitting_pixels: a max_pixels with which the pages would fit the context; None: they fit, or none would
    """

    page_tokens: list[int]
    text_tokens: int
    new_tokens: int
    context: int | None
    batch_size: int
    parameters: int
    weights: int
    cache: int
    memory: int
    fitting_pixels: int | None

    @property
    def tokens(self) -> int:
        """Tokens of one query: pages, text and answer."""
        return sum(self.page_tokens) + self.text_tokens + self.new_tokens

    def problems(self) -> list[str]:
        """What does not fit, each with the settings that would; empty where all fits."""
        found = []
        problem = overfull(self.page_tokens, self.text_tokens, self.new_tokens, self.context)
        if problem and self.context is not None:
            left = self.context - self.text_tokens - self.new_tokens
            most = max(self.page_tokens)
            advice = [f"at most {left // most} such pages"] if left >= most else []
            advice += [f"max_pixels={self.fitting_pixels}"] if self.fitting_pixels else []
            found.append(f"{problem}. What would fit: {' or '.join(advice) or 'a shorter answer (max_new_tokens)'}")
        if self.weights + self.cache > self.memory:
            each = self.cache // self.batch_size
            batch = (self.memory - self.weights) // max(1, each)
            advice = [f"batch_size={batch}"] if batch >= 1 else ["a smaller model, 4-bit weights or more memory"]
            found.append(
                f"weights take {self.weights / GIB:.1f} GiB and keys and values of {self.batch_size} queries"
                f" {self.cache / GIB:.1f} GiB, but {self.memory / GIB:.1f} GiB are free. What would fit: {advice[0]}"
            )
        return found

    def check(self) -> None:
        """Raises ValueError, naming numbers and settings that would fit, where the request does not."""
        problems = self.problems()
        if problems:
            raise ValueError("this does not fit: " + "; ".join(problems))

    def __str__(self) -> str:
        return (
            f"{len(self.page_tokens)} pages: {sum(self.page_tokens)} visual tokens, {self.text_tokens} of text,"
            f" {self.new_tokens} for the answer: {self.tokens} of {self.context or 'an unknown number of'} positions\n"
            f"{self.parameters / 1e6:.1f} million parameters: {self.weights / GIB:.2f} GiB; keys and values of"
            f" {self.batch_size} queries: {self.cache / GIB:.2f} GiB; free: {self.memory / GIB:.2f} GiB"
        )


def plan(
    model: str | Path,
    image_sizes: Sequence[tuple[int, int]],
    *,
    query: str = "What was the revenue in 2015?",
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
    model = model_source(model)
    config = AutoConfig.from_pretrained(model)
    processor: Any = AutoProcessor.from_pretrained(model)
    if max_pixels:
        set_max_pixels(processor, max_pixels)
    device = device or best_device()
    dtype = dtype or best_dtype(device)
    pages = visual_tokens(processor, image_sizes)
    text = processor.apply_chat_template(build_messages(query, len(pages)), tokenize=False, add_generation_prompt=True)
    words = text_tokens(processor, text)
    with torch.device("meta"):
        parameters = AutoModelForImageTextToText.from_config(config).num_parameters()
    context = context_length(config)
    room = None if context is None else context - words - max_new_tokens
    return Budget(
        page_tokens=pages,
        text_tokens=words,
        new_tokens=max_new_tokens,
        context=context,
        batch_size=batch_size,
        parameters=parameters,
        weights=parameters * dtype.itemsize,
        cache=cache_bytes_a_token(config, dtype) * (sum(pages) + words + max_new_tokens) * batch_size,
        memory=_free(device) if memory is None else memory,
        fitting_pixels=None if room is None or sum(pages) <= room else _fitting(processor, image_sizes, room),
    )


@dataclass(frozen=True)
class TrainingBudget:
    """What LoRA training takes on one device, estimated; bytes, and floating-point operations of one example.

    An example is a trace (SFT) or a completion (GRPO). adapter: LoRA's weights with gradients and Adam's two moments in
    float32, 16 bytes a parameter; activations: with checkpointing, of one pass; cache: keys and values while a pass's
    completions are sampled; operations: of learning, sampled_tokens: written one after another for a pass
    """

    request: Budget
    adapter_parameters: int
    activations: int
    operations: float
    sampled_tokens: int

    @property
    def adapter(self) -> int:
        return 16 * self.adapter_parameters

    @property
    def memory(self) -> int:
        """Bytes at once: learning and sampling take turns."""
        cache = self.request.cache if self.sampled_tokens else 0
        return self.request.weights + self.adapter + max(self.activations, cache)

    def hours(self, examples: int, devices: int = 1, operations: float = 4e14, bandwidth: float = 2e12) -> float:
        """Hours for so many examples, with devices that reach so many operations and bytes of memory a second.

        A sampled token of a batch reads all weights once: with transformers it is bandwidth that counts.
        """
        learning = examples * self.operations / operations
        passes = examples / self.request.batch_size
        sampling = passes * self.sampled_tokens * (self.request.weights + self.request.cache / 2) / bandwidth
        return (learning + sampling) / devices / 3600

    def __str__(self) -> str:
        parts = {
            "weights": self.request.weights, "adapter": self.adapter, "activations": self.activations,
            "keys and values": self.request.cache if self.sampled_tokens else 0, "at once": self.memory,
        }  # fmt: skip
        told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        return f"{self.request.tokens} tokens an example; GiB on a device: {told}"


def plan_training(
    model: str | Path,
    image_sizes: Sequence[tuple[int, int]],
    *,
    lora_rank: int,
    completion: int,
    batch_size: int,
    generations: int = 0,
    iterations: int = 1,
    max_pixels: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shared: bool = True,
) -> TrainingBudget:
    """Estimate LoRA training on prompts with pages of these (height, width); weights on every device, as with DDP.

    completion: tokens of a completion; batch_size: examples a device and pass; generations: 0 for SFT, else G of GRPO
    with a KL term; shared: a prompt is encoded once for its group (`mmr5_lab.training.shared_prefix`)

    A token costs 2 operations a parameter and pass. Learning takes three passes through the language model (forward,
    its repetition by checkpointing, gradients of activations; those of frozen weights are not computed) and one
    through the frozen vision tower. Activations: each layer's input, and 34 × hidden size bytes a token for the layer
    that is repeated (arXiv 2205.05198, table 2, without the attention's matrix).
    """
    request = plan(
        model,
        image_sizes,
        max_new_tokens=completion,
        batch_size=batch_size,
        max_pixels=max_pixels,
        dtype=dtype,
        memory=0,
    )
    config = AutoConfig.from_pretrained(model)
    text = config.get_text_config()
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    language = next(module for name, module in whole.named_modules() if name.endswith("language_model"))
    linear = [module for module in language.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in linear)
    seeing = sum(p.numel() for name, p in whole.named_parameters() if ".visual." in name)
    group = generations if generations and shared else 1
    prompt = (request.tokens - completion) / group
    learnt = prompt + completion  # tokens an example, where a prompt's are shared
    passes = 3 * iterations + (2 if generations else 0)  # the starting model's probabilities, and those when sampled
    return TrainingBudget(
        request=request,
        adapter_parameters=sum(lora_rank * (layer.in_features + layer.out_features) for layer in linear),
        activations=round(batch_size * learnt * text.hidden_size * (text.num_hidden_layers * dtype.itemsize + 34)),
        operations=2 * weights * learnt * passes + 2 * seeing * 4 * sum(request.page_tokens) / group,
        sampled_tokens=completion if generations else 0,
    )


def _fitting(processor, image_sizes: Sequence[tuple[int, int]], room: int) -> int | None:
    """A pixel budget, of those that halve step by step, with which the pages make at most `room` tokens."""
    pixels = max(height * width for height, width in image_sizes)
    while pixels >= 1024:
        try:
            set_max_pixels(processor, pixels)
            if sum(visual_tokens(processor, image_sizes)) <= room:
                return pixels
        except ValueError:  # no budget to set, or pages that would become too small
            return None
        pixels = pixels * 3 // 4
    return None


def _free(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return psutil.virtual_memory().available
