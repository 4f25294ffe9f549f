"""Attention on a CPU where each row of a batch shows one token: keys and values are read as fast as memory gives them.

Most of what it takes to write a token is reading the keys and values of all before it. PyTorch's kernel reads them at a
third of what memory gives, its sums of rows of a table (`embedding_bag`, made for word embeddings) at four fifths
(`docs/log.md`, 2026-11-24). And attention is two such sums: a query's scores are the sum of the rows of the transposed
keys, weighted by the query; its output is the sum of the values, weighted by their probabilities.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import embedding_bag
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sums_of_rows"


@contextmanager
def sums_of_rows(model: Any) -> Iterator[bool]:
    """Within it the model's text is attended to by sums of rows, where that pays: then it needs transposed keys (True).

    That is on a CPU in float32, with a key head for each query head: sharing reads a head's keys once for several.
    """
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    pays = (
        (model.device.type, model.dtype) == ("cpu", torch.float32)
        and getattr(config, "num_key_value_heads", heads) == heads
        and config._attn_implementation == "sdpa"
    )
    if not pays:
        yield False
        return
    config._attn_implementation = NAME
    try:
        yield True
    finally:
        config._attn_implementation = "sdpa"


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What `sdpa_attention_forward` gives: rows × 1 × heads × width.

    query: rows × heads × 1 × width; others than one token a row, and what changes scores, are left to that function
    key: rows × heads × length × width, a view of the front of rows × heads × width × room
    value: rows × heads × length × width, the front of rows × heads × room × width
    attention_mask: rows × 1 × 1 × length, False where nothing is to be seen; None: all is
    """
    rows, heads, tokens, width = query.shape
    more = any(options.get(name) is not None for name in ("position_bias", "softcap"))  # added by it, or refused
    if tokens > 1 or key.stride(-1) == 1 or more:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    length, bags = key.shape[2], rows * heads
    key_room, value_room = key.stride(-1), value.stride(1) // width
    keys = key.as_strided((bags * width, key_room), (key_room, 1))
    values = value.as_strided((bags * value_room, width), (width, 1))
    starts = torch.arange(bags)
    query = query * (width**-0.5 if scaling is None else scaling)
    scores = _sums(keys, torch.arange(bags * width), starts * width, query)[:, :length].view(rows, heads, 1, length)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    places = (starts[:, None] * value_room + torch.arange(length)).view(-1)
    found = _sums(values, places, starts * length, scores.softmax(-1))
    return found.view(rows, 1, heads, width), None


def _sums(table: torch.Tensor, places: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of each bag of rows of the table, which begins at a start among `places`, the weighted sum."""
    return embedding_bag(places, table, starts, mode="sum", per_sample_weights=weights.reshape(-1))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
