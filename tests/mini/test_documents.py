"""The miniature's documents: same seed, same files; what a page states is what its questions ask for."""

import random

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.mini.documents import (
    ENTITIES,
    HEIGHT,
    MEASURES,
    QUESTION_TYPE,
    WIDTH,
    YEARS,
    PageContent,
    describe,
    draw_page,
    make_corpus,
    make_questions,
    random_content,
)

SMALL = {"sft": (2, 4), "eval": (1, 3)}


def test_a_page_is_described_in_reading_order_and_each_word_compared():
    page = PageContent("chart", ("Orion", "Vega"), ("sales",), ("2014",), (12, 34))
    assert describe(page) == "a chart with sales 2014 Orion Vega"
    asked = {"entity": "Vega", "measure": "sales", "year": "2015"}
    assert describe(page, asked) == "a chart with sales (right) 2014 (wrong) Orion (wrong) Vega (right)"


def test_drawn_words_are_the_stated_ones_in_reading_order_and_inside_the_page():
    rng = random.Random(0)
    for _ in range(60):
        content = random_content(rng, ENTITIES, MEASURES, YEARS)
        drawn = draw_page(content, "News", 1, rng)
        assert drawn.image.size == (WIDTH, HEIGHT)
        assert [word for word, _ in drawn.words] == content.words
        for word, (left, top, right, bottom) in drawn.words:
            assert 0 <= left < right <= WIDTH, word
            assert 0 <= top < bottom <= HEIGHT, word


def test_same_seed_same_corpus(tmp_path):
    one, two = (make_corpus(tmp_path / name, seed=3, splits=SMALL) for name in ("one", "two"))
    assert one.questions["question"].tolist() == two.questions["question"].tolist()
    assert one.page_bytes("sft-000", 2) == two.page_bytes("sft-000", 2)


def test_gold_pages_are_all_pages_that_state_the_asked_fact(tmp_path):
    corpus = make_corpus(tmp_path, seed=4, splits=SMALL)
    pages = corpus.documents.set_index("doc_name")["extra"]
    assert set(corpus.documents["split"]) == {"sft", "eval"}
    for _, question in corpus.questions.iterrows():
        asked = question["extra"]["facts"]
        stating = [
            k
            for k, page in enumerate(pages[question["doc_name"]]["pages"])
            if asked["entity"] in page["entities"]
            and asked["measure"] in page["measures"]
            and asked["year"] in page["years"]
        ]
        assert question["gold_pages"] == stating


def test_the_evidence_frames_what_is_asked_for_and_its_value():
    content = PageContent("text", ("Orion",), ("staff",), ("2014", "2015"), (31, 52))
    drawn = draw_page(content, "News", 1, random.Random(0))
    above, below = (drawn.values[fact] for fact in content.facts)
    assert above[3] < below[1], "the years stand below each other"
    boxes = {}
    for question in make_questions([content], [drawn], 2, random.Random(0)):
        fact = tuple(question["facts"].values())
        [evidence] = question["layout_mapping"]
        left, top, right, bottom = boxes[fact[2]] = evidence["bbox"]
        for box in (*(box for word, box in drawn.words if word in fact), drawn.values[fact]):
            assert left < box[0] < box[2] < right
            assert top < box[1] < box[3] < bottom
    assert above[3] < boxes["2014"][3] < below[1], "the other year is not part of it"


def test_the_shipped_long_documents_hold_more_than_ten_pages_with_evidence_of_every_kind(tmp_path):
    shipped, made = load_corpus("data/mini/long"), make_corpus(tmp_path, long=True)
    assert made.questions["question"].tolist() == shipped.questions["question"].tolist()
    assert made.page_bytes("long-eval-039", 11) == shipped.page_bytes("long-eval-039", 11)
    pages = shipped.documents["num_pages"]
    assert (len(pages), len(shipped.questions)) == (40, 320)
    assert (pages.min(), pages.max()) == (12, 19)
    kinds = shipped.questions["type"].explode().value_counts(normalize=True)
    assert set(kinds.index) == set(QUESTION_TYPE.values())
    assert kinds.min() > 0.1
    assert set(shipped.questions["gold_pages"].map(len)) == {1, 2}
