"""Decoding a batch of prompts: `transformers`' own preparation, and a loop that wastes less.

- Rows leave the batch when they end.
- Tokens that are forced (the separators of a list of ids) take no pass of their own.
- Keys and values grow in place.

Logits processors, sampling and positions are those of `generate`, which calls the loop (its `custom_generate`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmr5_lab.models.allowed_ids import AllowedIds

GROWTH = 64  # positions that are reserved at a time
STAY = 0.75  # rows that have ended leave when no more than this share is left: leaving copies what stays
BY_ROW = ("attention_mask", "token_type_ids", "mm_token_type_ids")  # what has a row a prompt


class RoomyLayer(DynamicLayer):
    """Keys and values in tensors with room for more, where a DynamicLayer copies all of them for each token."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Starts with no positions."""
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
    """(kept and new as one tensor, its room). `kept` is the front of `room` unless rows were selected since."""
    length = kept.shape[-2] + new.shape[-2]
    if kept.data_ptr() != room.data_ptr() or room.shape[-2] < length:
        shape = (*new.shape[:2], length + GROWTH, new.shape[-1])
        room = new.new_empty(shape)
        room[..., : kept.shape[-2], :] = kept
    room[..., kept.shape[-2] : length, :] = new
    return room[..., :length, :], room


def roomy_cache(model: Any) -> DynamicCache:
    """An empty cache for a model, whose keys and values grow in place."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.inference_mode()
def write(
    model: Any,
    inputs: dict[str, Any],
    ends: set[int],
    allowed: Sequence[AllowedIds] | None = None,
    draws: torch.Generator | None = None,
    **options: Any,
) -> list[list[int]]:
    """The tokens that each row of a left-padded batch writes.

    ends: tokens that end a row, and stand at its end
    allowed: what may follow in each row, which ends before its end token, when nothing is left to choose
    draws: what sampled tokens are drawn with; None: PyTorch's own generator
    options: as `generate` takes them (max_new_tokens, do_sample, temperature, …)
    """
    written: list[list[int]] = [[] for _ in inputs["input_ids"]]

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **given):
        limit = generation_config.max_length - input_ids.shape[1]
        rows = list(range(len(written)))  # which prompt each row of the batch is
        waiting: list[list[int]] = [[] for _ in rows]  # of each prompt: written, but not shown to the model yet
        over: set[int] = set()
        outputs = _forward(model, input_ids, None, given)
        while True:
            logits = outputs.logits[:, -1].to(torch.float32, copy=True)
            free = [row for row in rows if not waiting[row] and row not in over]
            if allowed is not None:
                for row in free:
                    _hold(logits[rows.index(row)], allowed[row].following(written[row]))
            if logits_processor:  # they may know each prompt by its place
                everyone = logits.new_zeros(len(written), logits.shape[1])
                everyone[rows] = logits
                logits = logits_processor(input_ids, everyone)[rows]
            if generation_config.do_sample:
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=draws)[:, 0].tolist()
            else:
                chosen = logits.argmax(-1).tolist()
            for row, token in zip(rows, chosen, strict=True):
                if row not in free:
                    continue
                waiting[row] = [token] if allowed is None else allowed[row].run(written[row], token)
                written[row] += waiting[row]
                done = allowed is not None and allowed[row].complete(written[row])
                if done or token in ends or len(written[row]) >= limit:
                    over.add(row)
            left = [row for row in rows if row not in over]
            if not left:
                return input_ids
            if len(left) <= STAY * len(rows):
                _select([rows.index(row) for row in left], given)
                rows = left
            # each row shows the model as many tokens as the row with the fewest has
            count = min(len(waiting[row]) for row in left)
            shown = [[0] * count if row in over else waiting[row][:count] for row in range(len(written))]
            waiting = [tokens[count:] for tokens in waiting]
            input_ids = torch.cat([input_ids, torch.tensor(shown, device=input_ids.device)], 1)
            given = model._update_model_kwargs_for_generation(outputs, given, num_new_tokens=count)
            outputs = _forward(model, input_ids[rows], count, given)

    model.generate(**inputs, **options, use_cache=True, cache=roomy_cache(model), custom_generate=loop)
    return written


@torch.inference_mode()
def next_logits(model: Any, inputs: dict[str, Any], prefixes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Logits (batch × vocabulary) of what follows each row of a left-padded batch and each of `prefixes`.

    The first prefix is empty; the prompt is read once for all.
    """
    found: list[torch.Tensor] = []

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **given):
        outputs = _forward(model, input_ids, None, given)
        found.append(outputs.logits[:, -1])
        cache = outputs.cache
        if cache is not None:
            cache.activate_past_recording()  # sliding windows keep what they will need again
        for prefix in prefixes[1:]:
            added = torch.tensor(prefix, device=input_ids.device).expand(len(input_ids), -1)
            more = model._update_model_kwargs_for_generation(outputs, dict(given), num_new_tokens=len(prefix))
            extended = _forward(model, torch.cat([input_ids, added], 1), len(prefix), more)
            found.append(extended.logits[:, -1])
            cache.crop(-len(prefix))
        return input_ids

    kept: dict[str, Any] = {"cache": roomy_cache(model)} if len(prefixes) > 1 else {"use_cache": False}
    model.generate(**inputs, **kept, max_new_tokens=8, custom_generate=loop)
    return found


def _forward(model: Any, input_ids: torch.Tensor, count: int | None, given: dict[str, Any]) -> Any:
    """The model's outputs for the last `count` tokens, or for the prompt (None)."""
    inputs = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=count, is_first_iteration=count is None, **given
    )
    return model(**inputs, return_dict=True)


def _hold(logits: torch.Tensor, tokens: list[int]) -> None:
    """Leave no token possible but these."""
    kept = logits[tokens]
    logits.fill_(-torch.inf)
    logits[tokens] = kept


def _select(places: list[int], given: dict[str, Any]) -> None:
    """Keep only these rows of what the model is given beside the tokens."""
    cache = given["cache"]
    kept = torch.tensor(places, device=cache.layers[0].device)
    for name in BY_ROW:
        if given.get(name) is not None:
            given[name] = given[name][kept]
    if given.get("position_ids") is not None:  # batch × length, after one more axis where positions have several
        given["position_ids"] = given["position_ids"].index_select(-2, kept)
    cache.batch_select_indices(kept)
