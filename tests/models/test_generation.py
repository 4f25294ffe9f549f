"""Decoding gives what `generate` gives, one prompt at a time, with less work."""

import pytest
import torch
from PIL import Image
from transformers.cache_utils import DynamicLayer

from mmr5_lab.models.allowed_ids import AllowedIds
from mmr5_lab.models.generation import RoomyLayer, next_logits, write
from mmr5_lab.reranking.pages import Pages

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
VARIED = {**GREEDY, "repetition_penalty": 3.0}  # random weights like to say the same again
PAIRS = [
    (
        f"What was the debt of Vega in {2014 + k}?",
        [Image.new("RGB", (140, 168), (40 * j, 30 * k, 200)) for j in range(n)],
    )
    for k, n in enumerate([3, 1, 11, 2])
]


def prepared(reranker, pairs, mode):
    known = Pages(pairs)
    return reranker._inputs([reranker._prompt(q, len(p), mode) for q, p in pairs], known.keys, known)


def test_rows_that_end_early_leave_and_the_others_write_on(architecture):
    """The end is a token that the rows write at different places, or never."""
    model = architecture.model
    alone = [
        model.generate(**(given := prepared(architecture, [pair], "reason")), **VARIED, max_new_tokens=24)[
            0, given["input_ids"].shape[1] :
        ].tolist()
        for pair in PAIRS
    ]
    cut = lambda token: [row[: row.index(token) + 1] if token in row else row for row in alone]  # noqa: E731
    end = max({token for row in alone for token in row}, key=lambda token: len({len(row) for row in cut(token)}))
    assert len({len(row) for row in cut(end)}) > 1
    given = prepared(architecture, PAIRS, "reason")
    assert write(model, given, {end}, **VARIED, max_new_tokens=24, eos_token_id=end) == cut(end)


def test_held_to_permutations_rows_write_what_generate_writes(architecture):
    tokenizer, model = architecture.processor.tokenizer, architecture.model
    expected = []
    for pair in PAIRS:
        given = prepared(architecture, [pair], "direct")
        width, ids = given["input_ids"].shape[1], AllowedIds(tokenizer, len(pair[1]))
        row = model.generate(
            **given, **GREEDY, max_new_tokens=ids.longest,
            prefix_allowed_tokens_fn=lambda _, t, w=width, ids=ids: ids.following(t[w:].tolist()),
        )[0, width:].tolist()  # fmt: skip
        expected.append(row[: row.index(tokenizer.eos_token_id)])
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    allowed = [AllowedIds(tokenizer, len(pages)) for _, pages in PAIRS]
    written = write(model, prepared(architecture, PAIRS, "direct"), {tokenizer.eos_token_id}, allowed,
                    max_new_tokens=99, **GREEDY)  # fmt: skip
    hook.remove()
    assert written == expected
    assert len(passes) <= 12 < max(map(len, written)), "neither separators nor the last id take a pass of their own"


def test_logits_after_prefixes_are_those_of_whole_prompts(architecture):
    given = prepared(architecture, PAIRS, "score")
    prefixes = [(), (9,), (10,), (9, 11)]
    for prefix, found in zip(prefixes, next_logits(architecture.model, given, prefixes), strict=True):
        for k, pair in enumerate(PAIRS):
            alone = prepared(architecture, [pair], "score")
            for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
                if name in alone:
                    more = torch.tensor([prefix]) if name == "input_ids" else torch.zeros(1, len(prefix))
                    more = torch.ones_like(more) if name == "attention_mask" else more
                    alone[name] = torch.cat([alone[name], more.to(alone[name].dtype)], 1)
            with torch.no_grad():
                expected = architecture.model(**alone).logits[0, -1]
            assert torch.allclose(found[k], expected, atol=1e-3), (prefix, k)


def test_the_model_is_left_as_it_was(architecture):
    given = prepared(architecture, PAIRS[:1], "score")
    with torch.no_grad():
        before = architecture.model(**given).logits
        write(architecture.model, prepared(architecture, PAIRS, "reason"), set(), **GREEDY, max_new_tokens=3)
        with pytest.raises(IndexError):
            write(architecture.model, given, set(), [], **GREEDY, max_new_tokens=3)  # fails within the loop
        assert torch.equal(architecture.model(**given).logits, before)


def test_keys_and_values_grow_in_place():
    """As a DynamicLayer's, through growth, rows that leave, and tokens that are taken back."""
    torch.manual_seed(0)
    roomy, plain = RoomyLayer(), DynamicLayer()
    for rows, length in [(3, 70), (3, 1), (3, 90), (2, 1), (2, 5), (2, 1)]:
        if rows == 2 and plain.keys.shape[0] == 3:
            for layer in (roomy, plain):
                layer.batch_select_indices(torch.tensor([0, 2]))
        if length == 5:
            for layer in (roomy, plain):
                layer.crop(-2)
        keys, values = torch.rand(2, rows, 2, length, 4)
        for mine, theirs in zip(roomy.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(mine, theirs)
        assert roomy.get_seq_length() == plain.get_seq_length()
    room = roomy.keys.data_ptr()
    roomy.update(*torch.rand(2, 2, 2, 1, 4))
    assert roomy.keys.data_ptr() == room, "no copy for a token"
