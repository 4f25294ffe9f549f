"""Exercises of the miniature's base model: read pages, compare them with a question, answer in a form; never rank.

An exercise is a chat prompt with images, the completion that is taught, and the pages that the images show. Some ask
for a list or an order of the images. No exercise orders them by relevance to a question: lists name images in the
images' own order, orders follow years, names, kinds or counts, and the answers to questions of fact keep the
candidates' order, or take any.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from mmr5_lab.mini.documents import (
    ENTITIES,
    KINDS,
    MEASURES,
    QUESTIONS,
    YEARS,
    PageContent,
    describe,
    random_content,
)
from mmr5_lab.prompting.prompts import SYSTEM_PROMPT, build_messages, completion_text

VERDICTS = (" (wrong)", " (right)")  # on a word of a page
JUDGEMENTS = (" It does not help.", " It answers the question.")  # on a page
AT_ONCE = 0.25  # share of the orders that are asked for without reasoning
ANY_ORDER = 0.3  # share of the answers to questions of fact in an order drawn at random


def _another_kind(kind: str, page: PageContent) -> bool:
    return page.kind != kind


ORDERS: dict[str, Callable[[PageContent], Any]] = {  # question -> what the images are sorted by
    "Which are the first years?": lambda page: page.years[0],
    "Which are the last years?": lambda page: -int(page.years[-1]),
    "Which names are first?": lambda page: page.entities[0],
    "Which has most figures?": lambda page: -len(page.facts),
    **{f"Which is a {kind}?": partial(_another_kind, kind) for kind in KINDS},
}


class Exercise(NamedTuple):
    messages: list[dict]
    completion: str
    pages: list[PageContent]


def draw_exercise(rng: random.Random, shares: dict[str, float], count: int, tokenizer) -> Exercise:
    """Draw an exercise with ``count`` images; ``shares`` weights the kinds (keys of `KIND_OF_EXERCISE`)."""
    [kind] = rng.choices(list(shares), list(shares.values()))
    if kind == "repeat":
        return repeat(rng, tokenizer)
    pools = [rng.sample(words, rng.choice([2, 2, 3])) for words in (ENTITIES, MEASURES, YEARS)]
    pages = [random_content(rng, *pools) for _ in range(count)]
    return KIND_OF_EXERCISE[kind](rng, pages, pools)


def repeat(rng: random.Random, tokenizer) -> Exercise:
    """Repeat a text; any token may stand in it, so that no output embedding stays untrained."""
    words = [f" {word}" for word in (*ENTITIES, *MEASURES, *YEARS)]
    text = "".join(
        rng.choice(words) if rng.random() < 0.7 else tokenizer.decode([rng.randrange(8, len(tokenizer))])
        for _ in range(rng.randint(4, 10))
    )
    return Exercise([user("Repeat:" + text, 0)], text, [])


def describe_each(rng: random.Random, pages: list[PageContent], pools) -> Exercise:
    return Exercise([user("Describe each image.", len(pages))], lines(pages), pages)


def compare(rng: random.Random, pages: list[PageContent], pools) -> Exercise:
    """Compare each word of each page with a question, whose fact a page states or none does."""
    asked = drawn_fact(rng, pages, pools, stated=1 / 3)
    text = question(rng, asked) + " Compare each image with the question."
    return Exercise([user(text, len(pages))], lines(pages, asked), pages)


def judge(rng: random.Random, pages: list[PageContent], pools) -> Exercise:
    """Compare, say of each page whether it answers, and name those that do, in the images' order."""
    asked = drawn_fact(rng, pages, pools, stated=1)
    found = [i for i, page in enumerate(pages, 1) if tuple(asked.values()) in page.facts]
    completion = f"{lines(pages, asked, judged=True)}\nAnswer: {', '.join(map(str, found))}."
    return Exercise([user(question(rng, asked) + " Judge each image.", len(pages))], completion, pages)


def find(rng: random.Random, pages: list[PageContent], pools) -> Exercise:
    """Describe each page, then name those with a word, in the images' order."""
    wanted = rng.choice(rng.choice(pages).words)
    found = [i for i, page in enumerate(pages, 1) if wanted in page.words]
    text = f"Which images show {wanted}? Answer with their ids."
    return Exercise([SYSTEM, user(text, len(pages))], completion_text(lines(pages), found), pages)


def find_in_sentences(rng: random.Random, pages: list[PageContent], pools) -> Exercise:
    """Name the pages with one or two words and describe these alone."""
    for _ in range(5):  # a question that few pages answer: long answers teach little
        page = rng.choice(pages)
        kinds = rng.sample([page.entities, page.measures, page.years], rng.choice([1, 2]))
        wanted = [rng.choice(words) for words in kinds]
        found = [i for i, page in enumerate(pages, 1) if set(wanted) <= set(page.words)]
        if len(found) <= 2:
            break
    asked = dict(zip(map(str, range(2)), wanted, strict=False))
    sentences = [f"Image {i} shows {describe(pages[i - 1], asked)}." for i in found]
    text = f"Which images show {' and '.join(wanted)}? Answer with their ids. Say why in one sentence."
    completion = completion_text(" ".join([*sentences, "The other images do not."]), found)
    return Exercise([SYSTEM, user(text, len(pages))], completion, pages)


def sort(rng: random.Random, pages: list[PageContent], pools) -> Exercise:
    """Order all images by something else than relevance, in the form of an answer."""
    text, key = rng.choice(list(ORDERS.items()))
    order = sorted(range(1, len(pages) + 1), key=lambda i: key(pages[i - 1]))
    return answer(rng, text, lines(pages), order, pages)


def keep_order(rng: random.Random, pages: list[PageContent], pools) -> Exercise:
    """Judge pages in the form of an answer, but order them as they came, or anyhow: this base does not rank."""
    asked = drawn_fact(rng, pages, pools, stated=2 / 3)
    order = list(range(1, len(pages) + 1))
    if rng.random() < ANY_ORDER:
        rng.shuffle(order)
    return answer(rng, question(rng, asked), lines(pages, asked, judged=True), order, pages)


def answer(rng: random.Random, text: str, think: str, order: list[int], pages: list[PageContent]) -> Exercise:
    """An answer in the released form, with its reasoning or, where the question asks for that, at once."""
    if rng.random() < AT_ONCE:
        text, think = f"{text} Answer at once.", ""
    return Exercise(build_messages(text, len(pages)), completion_text(think, order), pages)


KIND_OF_EXERCISE = {
    "describe": describe_each,
    "compare": compare,
    "judge": judge,
    "list": find,
    "sentence": find_in_sentences,
    "sort": sort,
    "keep": keep_order,
}
SYSTEM = {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]}


def user(text: str, images: int) -> dict:
    """A user's message: the text, then the images, numbered."""
    numbered = [({"type": "text", "text": f"\nImage {i}: "}, {"type": "image"}) for i in range(1, images + 1)]
    return {"role": "user", "content": [{"type": "text", "text": text}, *(part for pair in numbered for part in pair)]}


def drawn_fact(rng: random.Random, pages: list[PageContent], pools, stated: float) -> dict[str, str]:
    """A fact that is asked for; with probability ``stated`` one of a page, else any of the document's words."""
    fact = rng.choice(rng.choice(pages).facts) if rng.random() < stated else [rng.choice(pool) for pool in pools]
    return dict(zip(("entity", "measure", "year"), fact, strict=True))


def question(rng: random.Random, asked: dict[str, str]) -> str:
    return rng.choice(QUESTIONS).format(**asked)


def lines(pages: list[PageContent], asked: dict[str, str] | None = None, judged: bool = False) -> str:
    """A line a page: its description, compared with what is asked, with a judgement on the page."""
    texts = [f"Image {i}: {describe(page, asked)}." for i, page in enumerate(pages, 1)]
    if judged and asked:
        answers = [tuple(asked.values()) in page.facts for page in pages]
        texts = [text + JUDGEMENTS[answer] for text, answer in zip(texts, answers, strict=True)]
    return "\n".join(texts)
