"""Completions and next-token logits of left-padded batches, by transformers' own `generate`."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmr5_lab.models.allowed_ids import AllowedIds

GROWTH = 64  # positions that are reserved at a time
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class PreallocatedLayer(DynamicLayer):
    """Keys and values in tensors with room at their end.

    A DynamicLayer copies all keys and values for each new token, a third of a step at 6,500 positions (`docs/log.md`,
    2026-11-26); a StaticLayer would attend to the whole room of `max_new_tokens`.
    """

    _rooms: tuple[torch.Tensor, ...]  # of keys and of values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._rooms = key_states, value_states
        else:
            pairs = zip((self.keys, self.values), self._rooms, (key_states, value_states), strict=True)
            self._rooms = tuple(_room_with(kept, room, new) for kept, room, new in pairs)
            length = self.get_seq_length() + key_states.shape[-2]
            self.keys, self.values = (room[..., :length, :] for room in self._rooms)
        return self.keys, self.values


def _room_with(kept: Any, room: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return a tensor that begins with `kept` and `new`: `room`, where it begins with `kept` and is large enough."""
    start, length = kept.shape[-2], kept.shape[-2] + new.shape[-2]
    if kept.data_ptr() != room.data_ptr() or room.shape[-2] < length:  # other rows were selected since, or it is full
        room = new.new_empty((*new.shape[:2], length + GROWTH, new.shape[-1]))
        room[..., :start, :] = kept
    room[..., start:length, :] = new
    return room


def preallocated_cache(model: Any) -> DynamicCache:
    """Return an empty cache for a model, whose keys and values grow in place."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.inference_mode()
def complete(
    model: Any,
    inputs: dict[str, Any],
    ends: set[int],
    *,
    allowed: Sequence[AllowedIds] | None = None,
    seed: int | None = None,
    **options: Any,
) -> list[list[int]]:
    """Return the tokens that follow each row of a left-padded batch, its end token included.

    ends: tokens that end a row
    allowed: what may follow in each row
    seed: makes sampling repeatable, whatever was drawn before; None: draws from PyTorch's generator as it is
    options: as `generate` takes them (max_new_tokens, do_sample, temperature, …)
    """
    width = inputs["input_ids"].shape[1]
    if allowed is not None:
        options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed[row].following(ids[width:].tolist())
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        ids = model.generate(
            **inputs, **options, eos_token_id=sorted(ends), pad_token_id=min(ends), cache=preallocated_cache(model)
        )
    rows = ids[:, width:].tolist()
    return [row[: next((k for k, token in enumerate(row, 1) if token in ends), None)] for row in rows]


@torch.inference_mode()
def next_logits(model: Any, inputs: dict[str, Any], prefixes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Return logits (batch × vocabulary, float32) after each row of a left-padded batch and each of `prefixes`.

    The first prefix is empty; the prompt is read once for all. Raises FloatingPointError for logits that are no
    numbers, which would rank at random.
    """

    def after(inputs: dict[str, Any], **cache: Any) -> torch.Tensor:
        output = model.generate(
            **inputs, **GREEDY, **cache, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        [logits] = output.logits
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"the model's logits are not finite ({logits.dtype}): load it with dtype float32")
        return logits.float()

    if len(prefixes) == 1:  # nothing is read twice, so no keys and values are kept
        return [after(inputs, use_cache=False)]
    cache = preallocated_cache(model)
    logits = [after(inputs, cache=cache)]
    cache.activate_past_recording()  # sliding windows keep what they will need again
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for prefix in prefixes[1:]:
        added = torch.tensor(prefix, device=ids.device).expand(len(ids), -1)
        longer = {
            "input_ids": torch.cat([ids, added], 1),
            "attention_mask": torch.cat([mask, torch.ones_like(added)], 1),
        }
        logits.append(after(longer, cache=cache))
        cache.crop(-len(prefix))
    return logits
