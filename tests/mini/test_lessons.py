"""The exercises of the base model: their completions are right, and none orders images by relevance."""

import random

import pytest

from mmr5_lab.mini import lessons
from mmr5_lab.mini.curriculum import ANSWERING
from mmr5_lab.mini.documents import PageContent, describe
from mmr5_lab.mini.lessons import KIND_OF_EXERCISE, draw_exercise
from mmr5_lab.mini.model import build_processor
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import build_messages, completion_text

POOLS = (["Orion", "Vega"], ["staff", "sales"], ["2014", "2015"])
PAGES = [
    PageContent("table", ("Vega",), ("sales",), ("2014", "2015"), (12, 34)),
    PageContent("figure", ("Orion",), ("staff",), ("2015",), (56,)),
    PageContent("text", ("Orion",), ("sales",), ("2014",), (78,)),
]


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.mark.parametrize(
    ("question", "order"),
    [
        ("Which are the first years?", [1, 3, 2]),
        ("Which are the last years?", [1, 2, 3]),
        ("Which names are first?", [2, 3, 1]),
        ("Which has most figures?", [1, 2, 3]),
        ("Which is a figure?", [2, 1, 3]),
    ],
)
def test_sorting_ties_stay_in_the_images_order(question, order, monkeypatch):
    monkeypatch.setattr(lessons, "ORDERS", {question: lessons.ORDERS[question]})
    exercise = lessons.sort(random.Random(0), PAGES, POOLS)
    assert exercise.messages == build_messages(question, 3)
    assert [i + 1 for i in parse_ranking(exercise.completion, 3).order] == order


def test_sentences_describe_the_named_pages_alone():
    exercise = lessons.find_in_sentences(random.Random(0), PAGES[1:2], POOLS)
    text = exercise.messages[1]["content"][0]["text"]
    assert text.startswith("Which images show ")
    assert exercise.completion.startswith("<think>Image 1 shows a figure with Orion (")
    assert exercise.completion.endswith(" The other images do not.</think><answer>[1]</answer>")
    marked = {word for word in ("Orion", "staff", "2015") if f"{word} (right)" in exercise.completion}
    assert marked == {word for word in ("Orion", "staff", "2015") if word in text}


def test_the_answers_to_questions_of_fact_do_not_depend_on_what_the_pages_state():
    """Among many drawn answers, the page that states the fact stands first no more often than any other."""
    rng, first, placed = random.Random(0), 0, 0
    for _ in range(3000):
        pages = [*PAGES]
        rng.shuffle(pages)
        exercise = lessons.keep_order(rng, pages, POOLS)
        parsed = parse_ranking(exercise.completion, 3)
        assert parsed.faults <= {"no_think"}
        if exercise.completion.count("It answers the question.") == 1:
            answering = next(i for i, line in enumerate((parsed.think or "").split("\n")) if "It answers" in line)
            first += parsed.order[0] == answering
            placed += 1
    assert placed > 1000
    assert first / placed == pytest.approx(1 / 3, abs=0.04)


def test_exercises_of_all_kinds_and_sizes_have_well_formed_answers(processor):
    for count in (1, 5, 12):
        for kind in KIND_OF_EXERCISE:
            for seed in range(20):
                exercise = draw_exercise(random.Random(seed), {kind: 1.0}, count, processor.tokenizer)
                images = [part for m in exercise.messages for part in m["content"] if part["type"] == "image"]
                assert len(images) == len(exercise.pages) == count
                if kind in ("sort", "keep"):
                    assert parse_ranking(exercise.completion, count).faults <= {"no_think"}


def test_no_token_spans_prompt_and_completion(processor):
    """It did: "assistant" + "\\nImage " in training, "assistant\\n" + "Image " when generating, never learnt."""
    tokenizer, rng = processor.tokenizer, random.Random(0)
    completions = [completion_text("Image 1: no.\nImage 2: yes.", [2, 1]), "2014 staff", " Orion", ". \n"]
    completions += [describe(PAGES[0]), *(draw_exercise(rng, ANSWERING, 2, tokenizer).completion for _ in range(200))]
    prompt = processor.apply_chat_template(build_messages("q?", 2), tokenize=False, add_generation_prompt=True)
    start = tokenizer(prompt)["input_ids"]
    for completion in completions:
        assert tokenizer(prompt + completion)["input_ids"] == start + tokenizer(completion)["input_ids"], completion
