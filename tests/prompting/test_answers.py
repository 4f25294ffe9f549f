"""Any text gives a permutation and names its faults, in linear time."""

import gc
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_lab.prompting.answers import FAULTS, parse_ranking, with_opening
from mmr5_lab.prompting.prompts import completion_text

T = "<think>Image 3 matters.</think>"

# text, n, order, answer, faults
CASES = {
    "as asked": (T + "<answer>[3, 1, 2]</answer>", 3, (2, 0, 1), (3, 1, 2), ""),
    "white space is free": (f" \n{T}\n\n<answer>\n[ 3,\n1 ,2 ]\n</answer>\n", 3, (2, 0, 1), (3, 1, 2), ""),
    "one candidate": (T + "<answer>[1]</answer>", 1, (0,), (1,), ""),
    "leading zeros": (T + "<answer>[03, 1, 002]</answer>", 3, (2, 0, 1), (3, 1, 2), ""),
    "missing ids follow in candidate order": (
        T + "<answer>[3]</answer>",
        4,
        (2, 0, 1, 3),
        (3,),
        "missing",
    ),
    "repeats count once": (
        T + "<answer>[3, 3, 1, 3]</answer>",
        3,
        (2, 0, 1),
        (3, 3, 1, 3),
        "duplicate missing",
    ),
    "out of range is dropped": (
        T + "<answer>[9, 2, 0, 1]</answer>",
        2,
        (1, 0),
        (9, 2, 0, 1),
        "out_of_range",
    ),
    "negative ids": (
        T + "<answer>[-3, 1, 2]</answer>",
        3,
        (0, 1, 2),
        (-3, 1, 2),
        "extra_text missing out_of_range",
    ),
    "repeat out of range": (
        T + "<answer>[7, 7, 1]</answer>",
        1,
        (0,),
        (7, 7, 1),
        "duplicate out_of_range",
    ),
    "empty list": (T + "<answer>[]</answer>", 2, (0, 1), (), "missing"),
    "empty block": (T + "<answer></answer>", 2, (0, 1), None, "no_answer"),
    "words for an answer": (T + "<answer>the first</answer>", 2, (0, 1), None, "extra_text no_answer"),
    "no think": ("<answer>[2, 1]</answer>", 2, (1, 0), (2, 1), "no_think"),
    "blank think": ("<think> \n</think><answer>[2, 1]</answer>", 2, (1, 0), (2, 1), "no_think"),
    "no answer": (T, 2, (0, 1), None, "no_answer"),
    "empty text": ("", 3, (0, 1, 2), None, "no_answer no_think"),
    "text after": (T + "<answer>[2, 1]</answer> done", 2, (1, 0), (2, 1), "extra_text"),
    "text before": ("Well: " + T + "<answer>[2, 1]</answer>", 2, (1, 0), (2, 1), "extra_text"),
    "text between": (T + " so <answer>[2, 1]</answer>", 2, (1, 0), (2, 1), "extra_text"),
    "answer before think": ("<answer>[2, 1]</answer>" + T, 2, (1, 0), (2, 1), "extra_text"),
    "two think blocks": (T + T + "<answer>[2, 1]</answer>", 2, (1, 0), (2, 1), "extra_text"),
    "the last answer counts": (
        T + "<answer>[1, 2]</answer><answer>[2, 1]</answer>",
        2,
        (1, 0),
        (2, 1),
        "extra_text",
    ),
    "an answer inside think does not": (
        "<think>so <answer>[2, 1]</answer> it is</think><answer>[1, 2]</answer>",
        2,
        (0, 1),
        (1, 2),
        "",
    ),
    "only inside think": ("<think><answer>[2, 1]</answer></think>", 2, (0, 1), None, "no_answer"),
    "stray closing tag": (T + "</think><answer>[2, 1]</answer>", 2, (1, 0), (2, 1), "extra_text"),
    "think never opened": ("so</think><answer>[2, 1]</answer>", 2, (1, 0), (2, 1), "unopened_think"),
    "answer reopened": (T + "<answer>[1<answer>[2, 1]</answer>", 2, (1, 0), (2, 1), "extra_text"),
    "answer interrupted": (T + "<answer>[2, 1]</think>", 2, (1, 0), (2, 1), "extra_text"),
    "words in the list": (
        T + "<answer>[image 3, Image_1, page-2]</answer>",
        3,
        (2, 0, 1),
        (3, 1, 2),
        "extra_text",
    ),
    "no brackets": (T + "<answer>3, 1, 2</answer>", 3, (2, 0, 1), (3, 1, 2), "extra_text"),
    "no commas": (T + "<answer>[3 1 2]</answer>", 3, (2, 0, 1), (3, 1, 2), "extra_text"),
    "other separators": (T + "<answer>3 > 1 > 2</answer>", 3, (2, 0, 1), (3, 1, 2), "extra_text"),
    "trailing comma": (T + "<answer>[3, 1, 2,]</answer>", 3, (2, 0, 1), (3, 1, 2), "extra_text"),
    "several lists": (T + "<answer>[3], [1], [2]</answer>", 3, (2, 0, 1), (3, 1, 2), "extra_text"),
    "numbers around the list": (
        T + "<answer>Of 3: [2, 1, 3], 1 is close</answer>",
        3,
        (1, 0, 2),
        (2, 1, 3),
        "extra_text",
    ),
    "decimals are no ids": (T + "<answer>[3.5, 1]</answer>", 3, (0, 1, 2), (1,), "extra_text missing"),
    "digits of other scripts": (T + "<answer>[٣, 1]</answer>", 3, (2, 0, 1), (3, 1), "other_script missing"),
    "superscripts": (T + "<answer>[²]</answer>", 3, (0, 1, 2), (), "extra_text missing"),
    "think cut": ("<think>Image 3 mat", 2, (0, 1), None, "no_answer truncated"),
    "think never closed": ("<think>a <answer>[2, 1]</answer>", 2, (1, 0), (2, 1), "unclosed_think"),
    "think cut, answer rehearsed": (
        "<think>a <answer>[2, 1]</answer>, or",
        2,
        (0, 1),
        None,
        "no_answer truncated",
    ),
    "think never closed, answer cut": ("<think>a <answer>[2, 1]", 2, (0, 1), None, "no_answer truncated"),
    "the last answer in a think that never closes": (
        "<think><answer>[1, 2]</answer> no, <answer>[2, 1]</answer>\n",
        2,
        (1, 0),
        (2, 1),
        "unclosed_think",
    ),
    "answer cut": (T + "<answer>[3, 1", 5, (2, 0, 1, 3, 4), (3, 1), "missing truncated"),
    "cut id may be 1, 10, 11 or 12": (T + "<answer>[3, 1", 12, None, (3,), "missing truncated"),
    "cut id can only be 2": (T + "<answer>[3, 2", 12, None, (3, 2), "missing truncated"),
    "comma ends an id": (T + "<answer>[3, 1,", 12, None, (3, 1), "missing truncated"),
    "bracket ends an id": (T + "<answer>[3, 1]", 12, None, (3, 1), "missing truncated"),
    "tag cut": (T + "<answer>[2, 1]</ans", 2, (1, 0), (2, 1), "truncated"),
    "tag cut after a bare id": (T + "<answer>[2, 1</", 12, None, (2, 1), "missing truncated"),
    "cut before the list": (T + "<answer>", 2, (0, 1), None, "no_answer truncated"),
    "cut words": (T + "<answer>image 2", 2, (1, 0), (2,), "extra_text missing truncated"),
    "tags in capitals": (T + "<Answer>[2, 1]</ANSWER>", 2, (1, 0), (2, 1), "tag_form"),
    "tags with spaces": ("<think >a</ think>< answer>[2, 1]< /answer >", 2, (1, 0), (2, 1), "tag_form"),
    "full-width tags and list": (T + "＜answer＞［２，１］＜/answer＞", 2, (1, 0), (2, 1), "tag_form other_script"),
    "full-width digits": (T + "<answer>[３、１，２]</answer>", 3, (2, 0, 1), (3, 1, 2), "other_script"),
    "a quoted tag is text where the exact one is used": (
        "<think>it says < /think> and < answer>[1]</think><answer>[2, 1]</answer>",
        2,
        (1, 0),
        (2, 1),
        "",
    ),
    "ids from 0": (T + "<answer>[2, 0, 1]</answer>", 3, (2, 0, 1), (3, 1, 2), "zero_based"),
    "one id from 0": (T + "<answer>[0]</answer>", 1, (0,), (1,), "zero_based"),
    "some ids from 0 may be anything": (T + "<answer>[2, 0]</answer>", 3, (1, 0, 2), (2, 0), "missing out_of_range"),
    "an earlier answer stands when the last was not begun": (
        T + "<answer>[2, 1]</answer><answer>[",
        2,
        (1, 0),
        (2, 1),
        "extra_text truncated",
    ),
}


# after the reasoning, n, answer
UNTAGGED = {
    "list": ("[3, 1, 2]", 3, (3, 1, 2)),
    "list in a sentence": ("So the order is\n[3, 1, 2], I think.", 3, (3, 1, 2)),
    "the last list": ("Not [1, 2, 3] but [3, 1, 2]", 3, (3, 1, 2)),
    "code fence": ("```json\n[3, 1, 2]\n```", 3, (3, 1, 2)),
    "box": ("The answer is $\\boxed{[3,1,2]}$.", 3, (3, 1, 2)),
    "bare box": ("\\boxed{3, 1, 2}", 3, (3, 1, 2)),
    "from 0": ("[2, 0, 1]", 3, (3, 1, 2)),
    "other tags": ("<result>[3, 1, 2]</result>", 3, (3, 1, 2)),
    "only ids": ("Final ranking: Image 3 > Image 1 > Image 2", 3, (3, 1, 2)),
    "JSON": ('{"ranking": [3, 1, 2]}', 3, (3, 1, 2)),
    "JSON objects": ('[{"id": 3, "score": 9}, {"id": 1, "score": 8}]', 3, (3, 1)),
    "lines with remarks": ("1. Image 3: has it\n2. Image 1: has half\n3. Image 2: no", 3, (3, 1, 2)),
    "one image": ("Image 1", 1, (1,)),
    "prose is no answer": ("Image 2 is worse than image 1.", 2, None),
    "nor is a reference": ("The table in [2] has it.", 2, None),
    "nor are some lines of several": ("1. Image 3: has it\n2. Image 1: has half", 3, None),
}


@pytest.mark.parametrize("case", UNTAGGED)
def test_answers_without_tags(case):
    text, n, answer = UNTAGGED[case]
    parsed = parse_ranking(T + "\n" + text, n)
    assert parsed.answer == answer
    assert ("no_answer" if answer is None else "untagged") in parsed.faults
    assert "no_think" not in parsed.faults
    assert not parsed.well_formed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[2, 1]", (2, 1)),
        ("Here is the order: [2, 1].", (2, 1)),
        ("Image 2, Image 1", (2, 1)),
        ("See [2, 7] for this.", None),  # not all of the ids: it may be anything
        ("Image 1 is a chart. Image 2 is a table.", None),
        ("1. Image 2: a chart\n2. Image 1: a table", None),  # may describe them in turn
    ],
)
def test_answers_without_any_tags(text, answer):
    parsed = parse_ranking(text, 2)
    assert parsed.answer == answer
    assert "no_think" in parsed.faults


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    text, n, order, answer, faults = CASES[case]
    parsed = parse_ranking(text, n)
    assert parsed.answer == answer
    assert parsed.faults == set(faults.split())
    assert parsed.order == order or order is None
    assert parsed.valid == (not faults)


@pytest.mark.parametrize(
    ("text", "think"),
    [
        (T, "Image 3 matters."),
        ("<think>\n a \n</think>", "\n a \n"),  # verbatim
        ("<think></think>", ""),
        ("<think>one</think><think>two</think>", "one"),
        ("<think>unfinished", "unfinished"),
        ("<think>a <think> b</think>", "a <think> b"),  # free text up to the first </think>
        ("nothing", None),
    ],
)
def test_think_is_the_first_block_as_written(text, think):
    assert parse_ranking(text, 2).think == think


def test_well_formed_is_about_structure_and_valid_about_all():
    parsed = parse_ranking(T + "<answer>[3, 3, 9]</answer>", 3)
    assert parsed.well_formed
    assert not parsed.valid


GOOD = "Image 3 matters.</think><answer>[3, 1, 2]</answer>"


@pytest.mark.parametrize(
    ("text", "prompt", "whole"),
    [
        (GOOD, "<|im_start|>assistant\n<think>\n", "<think>\n" + GOOD),
        (GOOD, "<|im_start|>assistant\n", GOOD),  # nothing was opened
        ("<think>" + GOOD, "assistant\n<think>", "<think>" + GOOD),  # the model writes the tag again
        ("<answer>[1]</answer>", "a\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n<answer>[1]</answer>"),
        ("3, 1, 2]</answer>", "a\n<think></think><answer>[", "<think></think><answer>[3, 1, 2]</answer>"),
        (GOOD, "Write <think>reasoning</think><answer>[ids]</answer>.\nassistant\n", GOOD),  # only instructions
        (GOOD, None, "<think>" + GOOD),  # a server's answer that begins in the middle of the thinking
        ("<think>" + GOOD, None, "<think>" + GOOD),
        ("<answer>[1]</answer>", None, "<answer>[1]</answer>"),
        ("", None, ""),
    ],
)
def test_what_a_prompt_opened_is_put_before_the_completion(text, prompt, whole):
    assert with_opening(text, prompt) == whole


def test_a_perfect_answer_after_an_opened_think_has_no_fault():
    assert parse_ranking(with_opening(GOOD, "assistant\n<think>\n"), 3).valid
    assert parse_ranking(with_opening(GOOD), 3).think == "Image 3 matters."


@pytest.mark.parametrize("text", [None, 3, b"<answer>[1]</answer>", ["<answer>[1]</answer>"]])
def test_not_a_string(text):
    with pytest.raises(TypeError, match="expected the model's text"):
        parse_ranking(text, 2)


@pytest.mark.parametrize("n", [0, -1])
def test_no_candidates(n):
    with pytest.raises(ValueError, match="at least one candidate"):
        parse_ranking("", n)


def test_numpy_counts_are_counts():
    assert parse_ranking("", np.int64(2)).order == (0, 1)


def test_ids_longer_than_python_converts():
    parsed = parse_ranking(f"{T}<answer>[{'9' * 5000}, -{'9' * 5000}, {'0' * 5000}1]</answer>", 1)
    assert parsed.answer == (10**18, -(10**18), 1)
    assert parsed.order == (0,)
    assert "out_of_range" in parsed.faults


PIECES = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "< answer>",
        "[",
        "]",
        ",",
        " ",
        "\n",
        "1",
        "2",
        "10",
        "-",
        ".",
        "x",
    ),
    *(
        "Image ",
        "rank ",
        "score: ",
        "1. ",
        "2. ",
        "st",
        "{",
        "}",
        '"',
        ":",
        "|",
        ">",
        "```",
        "\\boxed{",
        "０",
        "、",
        "％",
    ),
]
SOUP = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@settings(deadline=None)
@given(text=st.one_of(st.text(), SOUP), n=st.integers(1, 12))
def test_any_text_gives_a_permutation_and_named_faults(text, n):
    parsed = parse_ranking(text, n)
    assert sorted(parsed.order) == list(range(n))
    assert parsed.faults <= FAULTS
    assert (parsed.answer is None) == ("no_answer" in parsed.faults)
    if parsed.answer is not None:
        in_range = list(dict.fromkeys(i for i in parsed.answer if 1 <= i <= n))
        assert [i + 1 for i in parsed.order[: len(in_range)]] == in_range
        assert list(parsed.order[len(in_range) :]) == sorted(parsed.order[len(in_range) :])
    if parsed.valid:
        assert sorted(parsed.answer) == list(range(1, n + 1))


@settings(deadline=None)
@given(think=st.text(min_size=1), order=st.integers(1, 12).flatmap(lambda n: st.permutations(range(1, n + 1))))
def test_what_is_written_is_read_back(think, order):
    if "</think>" in think or not think.strip():
        return
    parsed = parse_ranking(completion_text(think, order), len(order))
    assert parsed.valid
    assert parsed.think == think
    assert parsed.answer == tuple(order)
    assert [i + 1 for i in parsed.order] == list(order)


@settings(deadline=None)
@given(order=st.integers(1, 12).flatmap(lambda n: st.permutations(range(1, n + 1))), cut=st.integers(0, 200))
def test_a_cut_never_invents_an_id(order, cut):
    """Every prefix of a good completion reads as a prefix of its answer."""
    parsed = parse_ranking(completion_text("Image 1 fits.", order)[:cut], len(order))
    answer = parsed.answer or ()
    assert answer == tuple(order[: len(answer)])


ADVERSARIAL = {
    "open thinks": "<think>",
    "closed thinks": "</think>",
    "open answers": "<answer>[",
    "closed answers": "]</answer>",
    "both": "<think></think><answer>[",
    "lists": "<answer>[1,2]</answer>",
    "almost tags": "<answe",
    "brackets": "[",
    "angle brackets": "<",
    "newlines": "\n",
}


def seconds(function, *arguments, tries=2):
    """Seconds of this process, the quickest of some tries: noise only adds."""
    spent = []
    for _ in range(tries):
        gc.disable()  # the collector looks through all that other tests have left, at a time of its own
        try:
            start = time.process_time()
            function(*arguments)
            spent.append(time.process_time() - start)
        finally:
            gc.enable()
    return min(spent)


@pytest.mark.parametrize("prefix", ["", T + "<answer>[", "<think>"])
@pytest.mark.parametrize("unit", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_time_is_linear_in_repeated_tags(prefix, unit):
    short, long = prefix + unit * 3_000, prefix + unit * 30_000
    # Ten times the text: quadratic time would be a hundred times as long. Loose, for a busy machine.
    assert seconds(parse_ranking, long, 5) < 40 * seconds(parse_ranking, short, 5) + 0.05


@pytest.mark.parametrize("unit", ["1", "0", "1,", "1 ", " ", ",", "-", "1.", "-1,", "1-", "٣"])
@pytest.mark.parametrize("end", ["", "]</answer>", "x</answer>"])
def test_time_is_linear_in_long_lists(unit, end):
    opening = T + "<answer>["
    short, long = opening + unit * 5_000 + end, opening + unit * 50_000 + end
    assert seconds(parse_ranking, long, 5) < 40 * seconds(parse_ranking, short, 5) + 0.05


@pytest.mark.parametrize("opening", [T, T + "<answer>"])
@pytest.mark.parametrize("unit", ["1. Image 3\n", '"1": 3, ', "[1] ", "[[", "```", "\\boxed{3", "1３、Image: ="])
def test_time_is_linear_up_to_a_megabyte(opening, unit):
    short, long = (opening + unit * (size // len(unit)) for size in (100_000, 1_000_000))
    assert seconds(parse_ranking, long, 5) < 30 * seconds(parse_ranking, short, 5) + 0.1
