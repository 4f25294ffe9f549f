"""Other orders and perturbed, with rankers of which it is known what they look at, and with a real model."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from mmr5_lab.corpus.rankings import Rankings
from mmr5_lab.evaluation.comparison import compare
from mmr5_lab.evaluation.metrics import evaluate
from mmr5_lab.evaluation.robustness import (
    AS_SHOWN,
    blank_page,
    consensus,
    faithfulness,
    order_audit,
    order_effects,
    order_runs,
    perturbation_effects,
    perturbation_test,
    position_bias,
)
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.ranking import Ranker, Ranking


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), seed=5, splits={"eval": (3, 3)})


@pytest.fixture(scope="module")
def run(corpus):
    """Four candidates a question, its first gold page in second place, no other gold page."""
    pages = {}
    for question, gold, name in zip(
        *(corpus.questions[c] for c in ("question_id", "gold_pages", "doc_name")), strict=True
    ):
        others = [page for page in range(corpus.num_pages(name)) if page not in gold][:3]
        pages[question] = [others[0], gold[0], *others[1:]]
    return Rankings(pages)


class First(Ranker):
    """Believes that the first image is the right one, whatever it shows."""

    def rank_each(self, pairs, mode="reason", batch_size=16):
        for i, (_, pages) in enumerate(pairs):
            lines = ["Image 1: it answers.", *(f"Image {k}: it does not help." for k in range(2, len(pages) + 1))]
            think = "\n".join(lines)
            yield i, Ranking(list(range(len(pages))), think, f"<think>{think}</think>", frozenset(), None, 10, 0.5)


@dataclass
class Reads(Ranker):
    """Knows each question's right pages by their bytes and says so; with `contrary`, ranks another page first."""

    right: dict[str, set[bytes]]
    contrary: bool = False

    def rank_each(self, pairs, mode="reason", batch_size=16):
        for i, (query, pages) in enumerate(pairs):
            good = [k for k, page in enumerate(pages) if page in self.right[query]]
            order = good + [k for k in range(len(pages)) if k not in good]
            says = [
                "It answers the question." if k in good else f"Page {len(page)} does not."
                for k, page in enumerate(pages)
            ]
            think = "\n".join(
                f"Image {k}: {text} It is {'' if k - 1 in good else 'not '}relevant." for k, text in enumerate(says, 1)
            )
            yield i, Ranking(order[::-1] if self.contrary else order, think, think, frozenset(), None, 10, 0.5)


@pytest.fixture(scope="module")
def right(corpus):
    rows = zip(*(corpus.questions[c] for c in ("question", "doc_name", "gold_pages")), strict=True)
    return {question: {corpus.page_bytes(name, page) for page in gold} for question, name, gold in rows}


@pytest.fixture(scope="module")
def by_place(corpus, run, tmp_path_factory):
    return order_audit(First(), corpus, run, tmp_path_factory.mktemp("first"), shuffles=4)


def test_the_given_order_comes_first_and_all_show_the_same_pages(by_place, run):
    assert by_place.groupby("turn").size().to_dict() == dict.fromkeys(range(4), len(run.pages))
    given = by_place[by_place["turn"] == 0]
    assert dict(zip(given["question_id"], given["candidates"], strict=True)) == run.pages
    for question, group in by_place.groupby("question_id"):
        assert {tuple(sorted(pages)) for pages in group["candidates"]} == {tuple(sorted(run.pages[question]))}
    assert len({tuple(pages) for pages in by_place["candidates"]}) > len(run.pages)


def test_a_liking_for_the_first_place_is_seen(by_place, corpus):
    bias = position_bias(by_place, corpus, samples=200)
    drawn = 3 * by_place["question_id"].nunique()
    assert bias["first"].tolist() == [1, 0, 0, 0]
    assert bias.loc[1, ["first low", "first high", "even"]].tolist() == [1, 1, 0.25]
    assert bias["shown"].tolist() == [drawn] * 4
    assert bias["gold"].sum() == drawn, "each ranking has its gold page in one place"
    known = bias["found"].dropna()
    assert known.tolist() == [1.0, *[0.0] * (len(known) - 1)], "found where it is in the first place, and only there"


def test_reading_is_blind_to_places(corpus, run, right, tmp_path):
    orders = order_audit(Reads(right), corpus, run, tmp_path, shuffles=3)
    assert position_bias(orders, corpus, samples=200)["found"].dropna().eq(1).all()
    assert order_effects(orders)["changed"].eq(0).all()


def test_effects_by_question(by_place, run):
    effects = order_effects(by_place)
    assert list(effects.index) == list(run.pages)
    for question, turns in by_place.sort_values("turn").groupby("question_id"):
        tops = [pages[0] for pages in turns["pages"]]
        assert effects.loc[question, "changed"] == np.mean([top != tops[0] for top in tops[1:]])
    assert effects["stability"].between(-1, 1).all()


def test_consensus_adds_up_places_and_cost(corpus):
    question = corpus.questions["question_id"][0]
    orders = pd.DataFrame({
        "question_id": [question] * 3, "turn": [0, 1, 2],
        "candidates": [[5, 6, 7], [7, 5, 6], [6, 7, 5]], "pages": [[5, 7, 6], [7, 5, 6], [7, 6, 5]],
        "tokens": [10, 20, 30], "seconds": [1.0, 2.0, 3.0],
    })  # fmt: skip
    [row] = consensus(orders).to_dict("records")
    # points of n - rank: page 5: 2 + 1 + 0, page 6: 0 + 0 + 1, page 7: 1 + 2 + 2
    assert row == {"question_id": question, "candidates": [5, 6, 7], "pages": [7, 5, 6], "tokens": 60, "seconds": 6.0}


def test_the_gain_of_consensus_is_a_comparison(by_place, corpus):
    merged = consensus(by_place)
    fused = dict(zip(merged["question_id"], merged["pages"], strict=True))
    table = compare({"one order": order_runs(by_place), "consensus": fused}, corpus, samples=100)
    assert table["seeds"].tolist() == [4, 1]
    gold = [corpus.by_id[q]["gold_pages"] for q in by_place["question_id"]]
    hits = [(pages[0] in g) / len(g) for pages, g in zip(by_place["pages"], gold, strict=True)]
    assert table.loc["one order", "micro R@1"] == pytest.approx(np.mean(hits))
    assert table.loc["consensus", "difference"] == pytest.approx(
        evaluate(fused, corpus).loc["micro", "R@1"] - np.mean(hits)
    )


def means(perturbed, corpus) -> pd.Series:
    return faithfulness(perturbation_effects(perturbed, corpus), samples=100).set_index(["perturbation", "measure"])[
        "mean"
    ]


def test_a_faithful_reranker_reacts_to_the_page_and_to_nothing_else(corpus, run, right, tmp_path):
    perturbed = perturbation_test(Reads(right), corpus, run, tmp_path)
    assert perturbed.groupby("perturbation").size().to_dict() == dict.fromkeys(
        [AS_SHOWN, "blank", "swap", "remove"], len(run.pages)
    )
    assert perturbed.loc[perturbed["perturbation"] == "remove", "candidates"].map(len).eq(3).all()
    found = means(perturbed, corpus)
    assert found["blank"][["called relevant", "right page first", "calls some relevant"]].eq(0).all()
    assert found["blank", "its text stays"] < 1
    assert found["swap"].eq(1).all(), "nothing changes, and text and answer agree"
    assert found["remove", "calls some relevant"] == 0
    assert found.xs("other text stays", level="measure").eq(1).all()


def test_reasoning_that_does_not_look_is_seen(corpus, run, tmp_path):
    found = means(perturbation_test(First(), corpus, run, tmp_path), corpus)
    assert found["blank", "its text stays"] == 1, "white paper is described as the page was"
    assert found["blank", "top page stays"] == 1
    assert found["remove", "calls some relevant"] == 1, "a page is made up to be relevant"
    assert found[AS_SHOWN, "answer follows text"] == 1


def test_an_answer_against_the_text_is_seen(corpus, run, right, tmp_path):
    found = means(perturbation_test(Reads(right, contrary=True), corpus, run, tmp_path), corpus)
    assert found[AS_SHOWN, "called relevant"] == 1
    assert found[AS_SHOWN, "answer follows text"] == 0


def test_text_of_windows_is_of_the_pages_that_they_showed(corpus):
    question = corpus.questions["question_id"][0]
    row = {
        "question_id": question, "candidates": [0, 1, 2], "pages": [2, 1, 0], "shown": [2, 1], "target": 2,
        "think": "Image 1 answers.", "perturbation": AS_SHOWN,
    }  # fmt: skip
    [effect] = perturbation_effects(pd.DataFrame([row]), corpus).to_dict("records")
    assert effect["called relevant"] == 1, "image 1 was candidate 3, page 2"


def test_questions_that_cannot_be_tested_are_left_out(corpus, run, right, tmp_path):
    questions = list(run.pages)
    gold = corpus.by_id[questions[0]]["gold_pages"]
    lost = {questions[0]: [gold[0]], questions[1]: [run.pages[questions[1]][0]], questions[2]: run.pages[questions[2]]}
    assert set(perturbation_test(Reads(right), corpus, Rankings(lost), tmp_path / "a")["question_id"]) == {questions[2]}
    with pytest.raises(ValueError, match="no question has both a right and a wrong candidate"):
        perturbation_test(Reads(right), corpus, Rankings({questions[0]: [gold[0]]}), tmp_path / "b")


def test_candidates_may_come_from_a_parquet_file(corpus, run, tmp_path):
    """Where they are arrays of numpy's numbers."""
    pages = {question: np.array(pages) for question, pages in run.pages.items()}
    orders = order_audit(First(), corpus, Rankings({q: list(p) for q, p in pages.items()}), tmp_path, shuffles=2)
    assert orders["candidates"][0] == run.pages[orders["question_id"][0]]


def test_an_order_with_a_question_twice_is_refused(by_place, corpus):
    with pytest.raises(ValueError, match="questions twice"):
        order_runs(pd.concat([by_place, by_place[:1]]))
    with pytest.raises(ValueError, match="no drawn orders"):
        position_bias(by_place[by_place["turn"] == 0], corpus)


def test_an_audit_needs_two_orders(corpus, run, tmp_path):
    with pytest.raises(ValueError, match="at least two orders"):
        order_audit(First(), corpus, run, tmp_path, shuffles=1)


def test_a_real_model_is_audited_and_resumed(corpus, run, tiny_model, tmp_path):
    some = Rankings(dict(list(run.pages.items())[:2]))
    reranker = Reranker.from_pretrained(tiny_model, max_new_tokens=8)
    orders = order_audit(reranker, corpus, some, tmp_path, shuffles=2)
    assert position_bias(orders, corpus)["first low"].isna().all(), "one document: no interval"
    perturbed = perturbation_test(reranker, corpus, some, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    assert len(stamps) == 2 + 4
    again = order_audit(First(), corpus, some, tmp_path, shuffles=2)  # would rank otherwise: nothing is ranked again
    assert again["pages"].tolist() == orders["pages"].tolist()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")} == stamps
    assert faithfulness(perturbation_effects(perturbed, corpus))["mean"].between(0, 1).all()
    with pytest.raises(ValueError, match="made with other settings"):
        order_audit(reranker, corpus, some, tmp_path, shuffles=2, seed=1)


def test_white_paper_keeps_its_size(corpus):
    from io import BytesIO

    from PIL import Image

    data = corpus.page_bytes("eval-000", 0)
    paper = Image.open(BytesIO(blank_page(data)))
    assert paper.size == Image.open(BytesIO(data)).size
    assert paper.convert("L").getextrema() == (255, 255)
