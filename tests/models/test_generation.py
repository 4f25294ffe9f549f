"""A batch gives what `generate` gives, one prompt at a time."""

import torch
from PIL import Image
from transformers.cache_utils import DynamicLayer

from mmr5_lab.models.allowed_ids import AllowedIds
from mmr5_lab.models.generation import GREEDY, PreallocatedLayer, complete, next_logits
from mmr5_lab.reranking.inputs import model_inputs, prompts_of
from mmr5_lab.reranking.pages import Pages

VARIED = {**GREEDY, "repetition_penalty": 3.0}  # random weights like to say the same again
PAIRS = [
    (
        f"What was the debt of Vega in {2014 + k}?",
        [Image.new("RGB", (140, 168), (40 * j, 30 * k, 200)) for j in range(n)],
    )
    for k, n in enumerate([3, 1, 11, 2])
]


def prepared(reranker, pairs, mode):
    pages = Pages(pairs)
    prompts = prompts_of(pairs, pages, mode, reranker.model, reranker.processor, 12)
    return model_inputs(prompts, pages, reranker.model, reranker.processor, None)


def test_each_row_ends_with_its_own_end_token(architecture):
    """The end is a token that the rows write at different places, or never."""
    model = architecture.model
    alone = [
        model.generate(**(inputs := prepared(architecture, [pair], "reason")), **VARIED, max_new_tokens=24)[
            0, inputs["input_ids"].shape[1] :
        ].tolist()
        for pair in PAIRS
    ]
    cut = lambda token: [row[: row.index(token) + 1] if token in row else row for row in alone]  # noqa: E731
    end = max({token for row in alone for token in row}, key=lambda token: len({len(row) for row in cut(token)}))
    assert len({len(row) for row in cut(end)}) > 1
    assert complete(model, prepared(architecture, PAIRS, "reason"), {end}, **VARIED, max_new_tokens=24) == cut(end)


def test_held_to_permutations_a_batch_writes_what_each_prompt_writes(architecture):
    tokenizer, model = architecture.processor.tokenizer, architecture.model
    end, tokens_of = tokenizer.eos_token_id, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = []
    for pair in PAIRS:
        inputs = prepared(architecture, [pair], "direct")
        width, ids = inputs["input_ids"].shape[1], AllowedIds(tokens_of, len(pair[1]), end)
        row = model.generate(
            **inputs, **GREEDY, max_new_tokens=ids.longest + 1, eos_token_id=end,
            prefix_allowed_tokens_fn=lambda _, t, w=width, ids=ids: ids.following(t[w:].tolist()),
        )[0, width:].tolist()  # fmt: skip
        assert len(row) == ids.longest + 1
        assert row[-1] == end
        expected.append(row)
    allowed = [AllowedIds(tokens_of, len(pages), end) for _, pages in PAIRS]
    inputs = prepared(architecture, PAIRS, "direct")
    assert complete(model, inputs, {end}, allowed=allowed, max_new_tokens=99, **GREEDY) == expected


def test_a_seed_repeats_sampling_and_leaves_other_draws_alone(architecture):
    inputs = prepared(architecture, PAIRS, "reason")
    sample = {"ends": {architecture.processor.tokenizer.eos_token_id}, "do_sample": True, "max_new_tokens": 5}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rows = complete(architecture.model, inputs, seed=7, **sample)
    assert torch.equal(torch.rand(3), expected)
    assert complete(architecture.model, inputs, seed=7, **sample) == rows
    assert complete(architecture.model, inputs, seed=8, **sample) != rows


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


def test_keys_and_values_grow_in_place():
    """As a DynamicLayer's, through growth, rows that leave, and tokens that are taken back."""
    torch.manual_seed(0)
    ours, plain = PreallocatedLayer(), DynamicLayer()
    for rows, length in [(3, 70), (3, 1), (3, 90), (2, 1), (2, 5), (2, 1)]:
        if rows == 2 and plain.keys.shape[0] == 3:
            for layer in (ours, plain):
                layer.batch_select_indices(torch.tensor([0, 2]))
        if length == 5:
            for layer in (ours, plain):
                layer.crop(-2)
        keys, values = torch.rand(2, rows, 2, length, 4)
        for mine, theirs in zip(ours.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(mine, theirs)
        assert ours.get_seq_length() == plain.get_seq_length()
    room = ours.keys.data_ptr()
    ours.update(*torch.rand(2, 2, 2, 1, 4))
    assert ours.keys.data_ptr() == room, "no copy for a token"
