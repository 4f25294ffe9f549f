"""Traces: labels decide the verdicts and the answer; finished lines survive an interruption."""

import json

import pytest

from mmr5_lab.corpus import Corpus
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.parsing import parse_ranking
from mmr5_lab.retrieve import Run, retrieve
from mmr5_lab.teachers import EvidenceTeacher
from mmr5_lab.traces import make_traces, read_traces, rl_dataset, sft_dataset, training_candidates


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), seed=5, splits={"sft": (2, 5)})


@pytest.fixture(scope="module")
def candidates(corpus):
    return training_candidates(corpus, retrieve(corpus, top_k=5), num_candidates=5)


def test_a_trace_is_well_formed_and_puts_positives_first(corpus, candidates, tmp_path):
    traces = read_traces(make_traces(corpus, candidates, EvidenceTeacher(corpus), tmp_path / "t.jsonl"))
    assert len(traces) == len(candidates)
    for trace in traces:
        parsed = parse_ranking(trace["messages"][-1]["content"], len(trace["images"]))
        assert not parsed.faults
        assert list(parsed.answer[: len(trace["positive_ids"])]) == trace["positive_ids"]
        rest = list(parsed.answer[len(trace["positive_ids"]) :])
        assert rest == sorted(rest), "the others follow in candidate order"
        lines = parsed.think.split("\n")
        right = [i for i, line in enumerate(lines, 1) if line.endswith("It answers the question.")]
        assert right == trace["positive_ids"]
        assert trace["messages"][1]["content"].count("<image>") == len(trace["images"])
        assert all((tmp_path / image).is_file() for image in trace["images"])


def test_a_half_written_line_is_made_again_and_nothing_twice(corpus, candidates, tmp_path):
    path = make_traces(corpus, candidates, EvidenceTeacher(corpus), tmp_path / "t.jsonl")
    whole = path.read_text()
    path.write_text(whole[: len(whole) * 2 // 3])
    make_traces(corpus, candidates, EvidenceTeacher(corpus), path)
    ids = [trace["query_id"] for trace in read_traces(path)]
    assert len(ids) == len(set(ids)) == len(candidates)
    assert path.read_text() == whole


def test_each_question_comes_in_as_many_orders_as_asked_for(corpus):
    run = retrieve(corpus, top_k=5)
    once, thrice = (training_candidates(corpus, run, 5, shuffles=count) for count in (1, 3))
    assert [c.pages for c in thrice[: len(once)]] == [c.pages for c in once]
    orders = [(c.question["question_id"], tuple(c.pages)) for c in thrice]
    assert len(orders) == len(set(orders)) > 2.5 * len(once)
    for chosen in thrice:
        question_id = chosen.question["question_id"]
        assert sorted(chosen.pages) == sorted(run.pages[question_id][:5])
        assert {chosen.pages[i - 1] for i in chosen.positive_ids} <= set(chosen.question["gold_pages"])
    kept = training_candidates(corpus, run, 5, shuffles=0)
    assert [c.pages for c in kept] == [run.pages[c.question["question_id"]][:5] for c in kept]


def test_a_line_that_is_not_a_trace_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [], "candidates": []}) + "\n")
    with pytest.raises(ValueError, match="line 1 is not a trace: it has no images"):
        read_traces(path)


def test_questions_without_a_positive_candidate_are_left_out(corpus):
    question = corpus.questions.iloc[0]
    wrong = next(k for k in range(corpus.num_pages(question["doc_name"])) if k not in question["gold_pages"])
    with pytest.raises(ValueError, match="no question has a positive"):
        training_candidates(corpus, Run({question["question_id"]: [wrong]}))
    with pytest.raises(ValueError, match="belongs to another corpus"):
        training_candidates(corpus, Run({"nobody": [0]}))


def test_datasets_hold_prompts_images_and_labels(corpus, candidates, tmp_path):
    sft = sft_dataset(make_traces(corpus, candidates, EvidenceTeacher(corpus), tmp_path / "t.jsonl"))
    rl = rl_dataset(corpus, candidates)
    assert sft.column_names == ["prompt", "completion", "images"]
    assert rl[0]["positive_ids"] == candidates[0].positive_ids
    assert rl[0]["num_candidates"] == len(rl[0]["images"]) == len(candidates[0].pages)
    assert rl[0]["images"][0].size == sft[0]["images"][0].size == (140, 168)
