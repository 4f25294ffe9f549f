"""Completions and next-token logits of left-padded batches, by transformers' own `generate`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start with no positions."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self._rooms = (self.keys, self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        first = self.keys.shape[-2] == 0
        keys, key_room = _appended(self.keys, self._rooms[0], key_states)
        values, value_room = _appended(self.values, self._rooms[1], value_states)
        self.keys, self.values, self._rooms = keys, values, (key_room, value_room)
        return (key_states, value_states) if first else (keys, values)


def _appended(kept: torch.Tensor, room: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (kept and new as one tensor, its room). `kept` is the front of `room` unless rows were selected since."""
    length = kept.shape[-2] + new.shape[-2]
    if kept.data_ptr() != room.data_ptr() or room.shape[-2] < length:
        room = new.new_empty((*new.shape[:2], length + GROWTH, new.shape[-1]))
        room[..., : kept.shape[-2], :] = kept
    room[..., kept.shape[-2] : length, :] = new
    return room[..., :length, :], room


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
    with _seeded(seed, model.device):
        ids = model.generate(
            **inputs, **options, eos_token_id=sorted(ends), pad_token_id=min(ends), cache=preallocated_cache(model)
        )
    rows = ids[:, width:].tolist()
    return [row[: next((k for k, token in enumerate(row, 1) if token in ends), None)] for row in rows]


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators within the block and put them back afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.inference_mode()
def next_logits(model: Any, inputs: dict[str, Any], prefixes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Return logits (batch × vocabulary) of what follows each row of a left-padded batch and each of `prefixes`.

    The first prefix is empty; the prompt is read once for all.
    """

    def after(inputs: dict[str, Any], **cache: Any) -> torch.Tensor:
        output = model.generate(
            **inputs, **GREEDY, **cache, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        return output.logits[0]

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
