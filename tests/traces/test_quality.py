"""What makes a trace unfit, as a table of examples; duplicates are found whatever their number."""

import random
import time

import pytest
import yaml

from mmr5_lab.prompting.prompts import completion_text
from mmr5_lab.prompting.verdicts import verdict
from mmr5_lab.traces.quality import FAULTS, dataset_card, faults_of, near_duplicates, report, statistics, think_of

RIGHT = "Image 2: The table lists the revenue of 2015, so it answers the question."
WRONG = "Image 1: It shows staff numbers, which cannot help answer the question."


def trace(think: str, positives=(2,), count=2, query="What was the revenue in 2015?", query_id="a:q0", refined=False):
    order = [*positives, *(i for i in range(1, count + 1) if i not in positives)]
    return {
        "messages": [{"role": "assistant", "content": completion_text(think, order)}],
        "images": [f"{i}.png" for i in range(count)], "query_id": query_id, "query": query, "doc_name": "a",
        "candidates": list(range(count)), "positive_ids": list(positives), "refined": refined,
        "teacher": "m", "prompt_version": "p",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("It answers the question.", True),
        ("It does not help.", False),
        ("The page shows a chart of exports.", None),
        ("The chart can directly help answer it, as 2015 is shown.", True),
        ("It lists 2014, but does not provide information about 2015.", False),
        ("The picture doesn't contain the figure, however the table below it answers the question.", True),
        ("While the chart does not show 2015, the text contains the answer.", True),
        ("There is no relevant information on this page.", False),
        ("This page is unrelated to the question.", False),
        ("It lacks data that helps answer the question.", False),
        ("The firm could not repay its loans. This figure helps.", True),
        ("A text with Omega (right) imports (right). It answers the question.", True),
        ("The table lists revenue by year, which is directly relevant to the question.", True),
        ("This page isn't relevant.", False),
        ("It is less relevant than the first one.", False),
        ("None of it is relevant.", False),
        ("It provides no information that would help to answer.", False),
        ("Not a chart but a table. It answers the question.", True),
        ("It seems relevant. However, it does not answer the question.", False),
        ("The answer is in the table of 2015.", True),
        # what broken answers leave behind in reasoning is no judgement
        ("A text with Vega (wrong). It does not help.\nAnswer: 2, 1.", False),
        ("Image 5]</answer>", None),
        ("", None),
    ],
)
def test_the_last_verdict_of_an_explanation_counts(said, expected):
    assert verdict(said) is expected


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        (RIGHT, []),
        ("Image 2: ", ["empty"]),
        ("Image 2: …", ["empty"]),
        ("Image 2: I'm sorry, I can't assist with that.", ["refusal", "contradicts_label"]),
        ("Image 2: I cannot see the image you refer to, but it answers the question.", ["refusal"]),
        ("Image 2: It is labelled as relevant, so it answers the question.", ["label_leaked"]),
        ("Image 2: As the ground truth says, it answers the question.", ["label_leaked"]),
        ("Image 2: This is a positive page, with revenue.", ["label_leaked"]),
        ("Image 2: The axis label says revenue, which answers the question.", []),
        ("Image 2: It cannot help answer the question about revenue.", ["contradicts_label"]),
        ("Image 2: Unlike image 1, it answers the question.", ["wrong_image"]),
        ("Image 2: As shown in Image 3, revenue is 4.", ["wrong_image"]),
        ("Image 3: It answers the question.", ["wrong_image"]),
        ("It answers the question.", ["empty", "wrong_image"]),
        ("Image 2: " + "word " * 61, ["too_long"]),
        ("Image 2: " + "word " * 60, []),
        ("Image 2: I'm sorry, the label says so; it cannot help. " + "x " * 60, [
            "refusal", "label_leaked", "contradicts_label", "too_long"]),
    ],
)  # fmt: skip
def test_each_fault_is_named(line, faults):
    assert faults_of(trace(f"{WRONG}\n{line}")) == faults


def test_a_negative_page_must_not_be_said_to_answer():
    assert faults_of(trace(f"Image 1: It answers the question.\n{RIGHT}")) == ["contradicts_label"]


def test_lines_must_be_there_and_in_order():
    assert faults_of(trace(f"{RIGHT}\n{WRONG}")) == ["contradicts_label", "wrong_image"]
    assert faults_of(trace(WRONG)) == ["wrong_image"]
    assert faults_of(trace("")) == ["empty", "wrong_image"]


@pytest.mark.parametrize(
    "line", ['Image 2: The page says "a hard negative, see Image 4" and answers it.', "Image 2: A hard negative."]
)
def test_what_the_page_itself_says_may_be_quoted(line):
    given = trace(f"{WRONG}\n{line}")
    assert faults_of(given) != []
    assert faults_of(given, ["", 'We call\nthis "a HARD negative,  see Image 4" below']) == []


@pytest.mark.parametrize(
    ("think", "positives", "faults"),
    [
        ("Image 2 lists the revenue. The other images cannot help.", (2,), []),
        ("Image 2 and Image 3 list the revenue. Image 1 does not help.", (2, 3), []),
        ("Images 2 and 3 list the revenue. Image 1 does not help.", (2, 3), []),
        ("Image 2 does not help. The others do.", (2,), ["contradicts_label"]),
        ("Image 2 lists it. Image 1 answers the question.", (2,), ["contradicts_label"]),
        ("Image 2 lists the revenue. Image 7 does not.", (2,), ["wrong_image"]),
        ("Image 2 lists the revenue.", (2, 3), ["wrong_image"]),
        ("", (2,), ["empty", "wrong_image"]),
    ],
)
def test_refined_traces_are_read_by_sentence(think, positives, faults):
    assert faults_of(trace(think, positives, count=3, refined=True)) == faults


def test_near_duplicates_are_found_but_not_orders_of_one_question():
    words = [f"w{k}" for k in range(60)]
    text = " ".join(words)
    other = " ".join([*words[:58], "new", "words"])
    traces = [
        trace(f"{text}", query_id="a:q0", query="first"),
        trace(f"{text}", query_id="a:q0", query="first"),  # the same question in another order
        trace(f"{text}", query_id="b:q3", query="first"),  # the same words asked of another document
        trace(other, query_id="c:q0", query="second"),
        trace(" ".join(reversed(words)), query_id="d:q0", query="third"),
    ]
    assert near_duplicates(traces) == {3: 0}
    assert near_duplicates(traces, threshold=0.99) == {}


def test_looking_for_near_duplicates_takes_time_that_grows_with_the_traces_alone():
    """Half of 3,600 traces from one template; all pairs would be 6 million comparisons."""
    draw = random.Random(0)
    words = [f"w{k}" for k in range(500)]
    template = " ".join(draw.choices(words, k=60))
    traces = [
        trace(f"{template if k % 2 else ''} {' '.join(draw.choices(words, k=60))}", query_id=str(k), query=str(k))
        for k in range(3600)
    ]
    traces[3000] = traces[11] | {"query_id": "copy", "query": "copy"}
    started = time.process_time()
    assert near_duplicates(traces) == {3000: 11}
    assert time.process_time() - started < 15


def test_a_report_counts_and_shows_an_example():
    rejected = [
        trace("Image 1: \nImage 2: ") | {"faults": ["empty"]},
        trace("Image 1: x\nImage 2: I'm sorry") | {"faults": ["empty", "refusal"]},
    ]
    table = report([trace(f"{WRONG}\n{RIGHT}")] * 2, rejected)
    assert table["traces"].to_dict() == {"accepted": 2, "empty": 2, "refusal": 1}
    assert table.loc["refusal", "share"] == 0.25
    assert table.loc["refusal", "meaning"] == FAULTS["refusal"]
    assert "I'm sorry" in table.loc["refusal", "example"]
    assert report([], []).loc["accepted", "traces"] == 0


def test_statistics_and_card_say_what_is_in_the_data():
    traces = [trace(f"{WRONG}\n{RIGHT}"), trace(f"{RIGHT.replace('2:', '1:')}\nImage 2: x", (1,), query_id="a:q1")]
    values = statistics(traces)
    assert values["questions"] == 2
    assert values["first right page is image 1"] == 0.5
    assert values["words of reasoning, most"] == len(think_of(traces[0]).split())
    card = dataset_card(traces, [trace("") | {"faults": ["empty"]}], "My traces")
    header = yaml.safe_load(card.split("---")[1])
    assert header["pretty_name"] == "My traces"
    assert "Teacher: m. Prompt texts: version p." in card
    assert "| empty | 1 | 33.3% |" in card
    assert statistics([])["traces"] == 0
    assert "# None yet" in dataset_card([], [], "None yet")
