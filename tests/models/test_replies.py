"""What a 200 says, as a table of bodies, and that no body at all raises anything but ValueError."""

import json

import pytest
from helpers.servers import completion, failure
from hypothesis import given
from hypothesis import strategies as st

from mmr5_lab.models.replies import PROBLEMS, Reply, read_reply


def body(content, ended="stop", usage=None, **more) -> str:
    return completion(content, ended, usage, **more).decode()


@pytest.mark.parametrize(
    ("content", "more", "text", "answer"),
    [
        ("Because.", {}, "Because.", "Because."),
        ("<think>hm</think> Because.\n", {}, "<think>hm</think> Because.\n", "Because."),
        ("hm</think>Because.", {}, "<think>hm</think>Because.", "Because."),
        ("Because.", {"reasoning": "hm"}, "<think>hm</think>Because.", "Because."),
        ("Because.", {"reasoning_content": "hm<|im_end|>"}, "<think>hm</think>Because.", "Because."),
        ("<think>hm</think>Because.", {"reasoning": "hm"}, "<think>hm</think>Because.", "Because."),
        (None, {"reasoning": "hm</think>Because."}, "<think>hm</think>Because.", "Because."),
        (None, {"reasoning": "<think>hm</think>Because."}, "<think>hm</think>Because.", "Because."),
        ([{"type": "text", "text": "Be"}, {"type": "output_text", "text": "cause"}, "."], {}, "Because.", "Because."),
        ({"type": "text", "text": "Because."}, {}, "Because.", "Because."),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Because."}], {},
         "<think>hm</think>Because.", "Because."),
        ([{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Because."}], {},
         "Because.", "Because."),
        ("Half \ud83d", {}, "Half \ufffd", "Half \ufffd"),
        ("\ud83d\ude00", {"refusal": None, "reasoning": ""}, "😀", "😀"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ended", ["stop", None, "tool_calls", "eos", 3])
def test_an_answer_is_read_wherever_it_stands(content, more, text, answer, ended):
    reply = read_reply(body(content, ended, **more))
    assert (reply.text, reply.answer, reply.problem, reply.detail) == (text, answer, None, "")


@pytest.mark.parametrize(
    ("said", "problem", "detail"),
    [
        (body("Half an ans", "length"), "cut", "finish reason length"),
        (body(None, "length", reasoning="hm"), "cut", "finish reason length"),
        (body("Half", "MAX_TOKENS"), "cut", "finish reason MAX_TOKENS"),
        (body("Half", "content_filter"), "filtered", "finish reason content_filter"),
        (body("", "SAFETY"), "filtered", "finish reason SAFETY"),
        (body("Half", "error"), "failed", "finish reason error"),
        (body("", "abort"), "failed", "finish reason abort"),
        (body(None, refusal="I will not."), "refused", "I will not."),
        (body([{"type": "refusal", "refusal": "I will\nnot."}]), "refused", "I will not."),
        (body("Half", "content_filter", refusal="No."), "refused", "No."),
        (body(""), "empty", ""),
        (body(" \n"), "empty", ""),
        (body(None, reasoning="hm, I should explain"), "empty", ""),
        (body("<think>hm</think>"), "empty", ""),
        (body("<think>hm"), "empty", ""),
        ('{"choices": []}', "empty", ""),
        ('{"choices": null}', "empty", ""),
        ('{"choices": [{"message": null, "finish_reason": "stop"}]}', "empty", ""),
        (failure("out of memory"), "failed", "out of memory"),
        ('{"error": "out of memory"}', "failed", "out of memory"),
        ('{"error": {"code": 502, "error": {"message": "upstream"}}, "choices": []}', "failed", "upstream"),
        ('{"error": {"code": 502}}', "failed", '{"code": 502}'),
        ('{"detail": "Not Found"}', "failed", "Not Found"),
        ('{"object": "error", "message": "bad \\u001b[31m page"}', "failed", "bad \\x1b[31m page"),
        ('{"choices": [{"error": {"message": "upstream"}, "finish_reason": "stop", "message": {"content": "Half"}}]}',
         "failed", "upstream"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_named(said, problem, detail):
    reply = read_reply(said)
    assert (reply.problem, reply.detail) == (problem, detail)
    assert reply.reason == f"{problem}: {PROBLEMS[problem]}" + (f" ({detail})" if detail else "")


@pytest.mark.parametrize(
    "said",
    [
        "", "garbage", "<html>", "[1]", "5", "null", '"text"', "{}", '{"choices": {}}', '{"choices": [null]}',
        '{"choices": [{"message": 5}]}', body(7), body([7]), body([{"type": "text", "text": 7}]),
        body("x", reasoning=7), body("x")[:-9], "[" * 100_000, '{"choices": ' * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_chat_completion_is_refused(said):
    with pytest.raises(ValueError, match="is not a chat completion") as error:
        read_reply(said)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}, (3, 5)),
        ({"prompt_tokens": 3, "completion_tokens": 5}, (3, 5)),
        ({"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 108}, (3, 105)),  # 100 of thinking
        ({"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}, (3, 0)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (None, None)),
        ({"prompt_tokens": "3", "completion_tokens": None}, (None, None)),
        ({"prompt_tokens": -3, "completion_tokens": True}, (None, None)),
        ({"prompt_tokens": 10**30, "completion_tokens": 5}, (None, None)),
        ({"completion_tokens": 5, "total_tokens": 105}, (None, None)),  # the prompt was billed as the completion
        ([], (None, None)),
        (None, (None, None)),
    ],
)
def test_tokens_are_the_server_s_own_count(usage, tokens):
    reply = read_reply(body("Because.", usage=usage))
    assert (reply.prompt_tokens, reply.completion_tokens) == tokens
    assert reply.problem is None, "an odd count does not cost the answer"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "text", "thinking", "refusal", "message", "error", "code", "url"]), inner, max_size=4
    ),
    max_leaves=8,
)  # fmt: skip
messages = st.dictionaries(st.sampled_from(["content", "reasoning", "reasoning_content", "refusal", "role"]), values)
choices = st.dictionaries(st.sampled_from(["message", "finish_reason", "error"]), messages | values)
bodies = values | st.dictionaries(
    st.sampled_from(["choices", "usage", "error", "detail", "message", "id"]), st.lists(choices, max_size=2) | values
)


@given(bodies)
def test_any_json_is_a_reply_or_no_chat_completion(value):
    try:
        reply = read_reply(json.dumps(value))
    except ValueError:
        return
    assert isinstance(reply, Reply)
    assert (reply.problem is None) <= bool(reply.answer)
    (reply.text + reply.detail).encode()


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["stop", "eos", None]))
def test_a_well_formed_answer_stays_as_it_was_written(text, ended):
    reply = read_reply(body(f"<think>hm</think>{text}", ended))
    assert reply.text == f"<think>hm</think>{text}"
    assert reply.problem == (None if reply.answer else "empty")
