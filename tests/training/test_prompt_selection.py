"""Choosing prompts: what each way keeps, and that an interrupted choice goes on as if it had not been."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.construction import training_candidates
from mmr5_lab.training import prompt_selection
from mmr5_lab.training.prompt_selection import balanced, image_sizes, pass_rates, select_prompts


@pytest.fixture(scope="module")
def found(material):
    corpus = load_corpus(material.folder / "corpus")
    return corpus, training_candidates(corpus, retrieve(corpus, top_k=5), shuffles=0)


def test_balanced_takes_as_many_of_each_size():
    """Eight small pages, three of four times their area, one huge: any beginning holds all sizes."""
    sizes = [100.0] * 8 + [400.0] * 3 + [6400.0]
    assert balanced([100, 127, 128, 400]) == [0, 2, 3, 1], "127 is in the bin of 100, 128 is not"
    order = balanced(sizes)
    assert sorted(order) == list(range(12))
    assert [sizes[i] for i in order[:7]] == [100, 400, 6400, 100, 400, 100, 400]


def test_all_and_balanced_keep_the_prompts_order(found, tmp_path):
    corpus, candidates = found
    assert image_sizes(corpus, candidates) == [140 * 168] * len(candidates)
    for how in ("all", "balanced"):
        chosen = select_prompts(candidates, corpus, how, 3, tmp_path, "no model")
        assert chosen == candidates[:3], how
    with pytest.raises(ValueError, match="there is no selection 'best': choose one of all, balanced, pass_rate"):
        select_prompts(candidates, corpus, "best", 3, tmp_path, "no model")


class Answers:
    """Stands for a model whose first answers to a question are known: right as often as `passes` says."""

    def __init__(self, corpus, passes):
        self.corpus, self.passes, self.asked, self.seed = corpus, passes, [], 0

    def rank_many(self, pairs, batch_size):
        rankings = []
        for place, (query, pages) in enumerate(pairs):
            [question] = [row for row in self.corpus.by_id.values() if row["question"] == query]
            name = question["doc_name"]
            gold = {self.corpus.page_bytes(name, page) for page in question["gold_pages"]}
            ids = sorted(range(1, len(pages) + 1), key=lambda i: pages[i - 1] not in gold)
            if place % 4 >= self.passes[question["question_id"]]:
                ids.reverse()
            rankings.append(SimpleNamespace(text=f"<think>t</think><answer>{ids}</answer>"))
            self.asked.append(question["question_id"])
        return rankings


def test_pass_rates_tell_what_is_learnt_from(found, tmp_path):
    corpus, candidates = found
    ids = [c.question["question_id"] for c in candidates]
    passes = {question_id: k % 5 for k, question_id in enumerate(ids)}
    ranker = Answers(corpus, passes)
    rates = pass_rates(ranker, corpus, candidates, tmp_path)
    assert rates.set_index("query_id")["passes"].to_dict() == passes
    assert len(ranker.asked) == 4 * len(ids)
    again = Answers(corpus, passes)
    path = tmp_path / "pass_rates.0.jsonl"
    path.write_text(path.read_text()[:-9])  # killed while the last line was written
    pd.testing.assert_frame_equal(pass_rates(again, corpus, candidates, tmp_path), rates)
    assert len(path.read_text().splitlines()) == len(ids)
    third = Answers(corpus, passes)
    pass_rates(third, corpus, candidates, tmp_path)
    assert third.asked == [], "finished work is not done again"


def test_pass_rates_are_sampled_as_grpo_samples(found, tiny_model, tmp_path, monkeypatch):
    """The model's own repetition penalty would count otherwise: 1.05 for Qwen2.5-VL."""
    corpus, candidates = found
    seen = {}

    def keep(ranker, *given):
        seen.update(ranker.generation)
        return pd.DataFrame({"query_id": [candidates[0].question["question_id"]], "passes": [1]})

    monkeypatch.setattr(prompt_selection, "pass_rates", keep)
    select_prompts(candidates, corpus, "pass_rate", 2, tmp_path, tiny_model, temperature=0.7, sample_top_k=50)
    assert seen == {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}


def test_prompts_are_kept_by_pass_rate_with_a_real_model(found, tiny_model, tmp_path):
    """A random model gets nothing right, and says so; prompts that were sampled before are taken as they are."""
    corpus, candidates = found
    options = {"max_completion": 4, "samples": 4}
    with pytest.raises(ValueError, match=r"of \d+ prompts the model answers none rightly in some of 4 completions"):
        select_prompts(candidates[:2], corpus, "pass_rate", 2, tmp_path, tiny_model, **options)
    rows = [
        {"query_id": c.question["question_id"], "passes": k, "pages": c.pages} for k, c in enumerate(candidates[:5])
    ]
    (tmp_path / "pass_rates.0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = select_prompts(candidates[:5], corpus, "pass_rate", 3, tmp_path, tiny_model, **options)
    assert chosen == candidates[1:4], "0 of 4 and 4 of 4 teach nothing"
