"""Attention by sums of rows gives what PyTorch's kernel gives, and is used where it pays."""

import pytest
import torch
from test_decoding import PAIRS, VARIED, prepared
from transformers import AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmr5_lab import cpu_attention
from mmr5_lab.cpu_attention import NAME, attention, sums_of_rows
from mmr5_lab.decoding import RoomyLayer, write
from mmr5_lab.rerank import Reranker


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


@pytest.mark.parametrize("masked", [False, True])
def test_one_token_a_row_attends_as_by_pytorch(masked):
    """Token by token, past the room's growth and after a row has left."""
    torch.manual_seed(0)
    layer, module = RoomyLayer(transposed=True), torch.nn.Module()
    module.is_causal = True
    layer.update(some(3, 2, 60, 8), some(3, 2, 60, 8))
    for step in range(12):
        if step == 9:
            layer.batch_select_indices(torch.tensor([0, 2]))
        rows = layer.keys.shape[0]
        keys, values = layer.update(some(rows, 2, 1, 8), some(rows, 2, 1, 8))
        query, mask = some(rows, 2, 1, 8), None
        if masked:
            mask = torch.arange(keys.shape[2]) >= torch.tensor([[0], [7], [40]])[:rows]
            mask = mask[:, None, None]
        found, _ = attention(module, query, keys, values, mask, scaling=0.3)
        expected, _ = sdpa_attention_forward(module, query, keys.contiguous(), values, mask, scaling=0.3)
        assert found.shape == expected.shape == (rows, 1, 2, 8)
        assert torch.allclose(found, expected, atol=1e-6)


def test_several_tokens_a_row_are_left_to_pytorch():
    query, keys, values = some(2, 2, 3, 8), some(2, 2, 8, 5).mT, some(2, 2, 5, 8)
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool).tril(2)
    found, _ = attention(torch.nn.Module(), query, keys, values, mask, scaling=1.0)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=1.0)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


def test_what_changes_scores_is_neither_lost_nor_taken_for_granted():
    module, bias = torch.nn.Module(), some(2, 2, 1, 5)
    query, keys, values = some(2, 2, 1, 8), some(2, 2, 8, 5).mT, some(2, 2, 5, 8)
    found, _ = attention(module, query, keys, values, None, scaling=1.0, position_bias=bias)
    expected, _ = sdpa_attention_forward(module, query, keys, values, None, scaling=1.0, position_bias=bias)
    plain, _ = attention(module, query, keys, values, None, scaling=1.0, position_bias=None)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-2)
    with pytest.raises(ValueError, match="softcap"):
        attention(module, query, keys, values, None, softcap=30.0)


def test_it_is_used_on_a_cpu_in_float32_with_a_key_head_for_each_query_head(tiny_model):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    config = model.config.get_text_config()
    config.num_key_value_heads = config.num_attention_heads
    used = lambda: config._attn_implementation == NAME  # noqa: E731
    with sums_of_rows(model) as pays:
        assert (pays, used()) == (True, True)
    with pytest.raises(KeyError), sums_of_rows(model):
        raise KeyError
    assert config._attn_implementation == "sdpa", "and left as it was"
    config.num_key_value_heads = 1
    with sums_of_rows(model) as pays:
        assert (pays, used()) == (False, False)
    config.num_key_value_heads = config.num_attention_heads
    with sums_of_rows(model.to(torch.bfloat16)) as pays:
        assert (pays, used()) == (False, False)


def test_what_is_written_is_what_generate_writes(tiny_model, monkeypatch):
    reranker, sums = Reranker.from_pretrained(tiny_model, page_cache_bytes=0), []
    given = [prepared(reranker, [pair], "reason") for pair in PAIRS]
    alone = [
        reranker.model.generate(**one, **VARIED, max_new_tokens=80)[0, one["input_ids"].shape[1] :].tolist()
        for one in given
    ]
    kept = cpu_attention._sums
    monkeypatch.setattr(cpu_attention, "_sums", lambda *given: sums.append(1) or kept(*given))
    end = alone[0][40]  # rows end at several places
    expected = [row[: row.index(end) + 1] if end in row else row for row in alone]
    together = prepared(reranker, PAIRS, "reason")
    assert write(reranker.model, together, {end}, **VARIED, max_new_tokens=80, eos_token_id=end) == expected
    assert len(sums) >= 2 * 40
