"""The one-pass scorer: its loss is of the scores that mode "score" ranks by, and training moves the gold page up."""

import math

import pytest
from transformers import TrainingArguments

from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.models.loading import load_model
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.construction import rl_dataset, training_candidates
from mmr5_lab.training.scorer import Collator, ScorerTrainer, first_shares, train_scorer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("scorer") / "corpus", 3, {"sft": (2, 12)})


def chosen(corpus, count: int):
    return training_candidates(corpus, retrieve(corpus, "bm25", top_k=count), count, 0, 0)[:4]


@pytest.mark.parametrize("count", [4, 12])  # 12: ids of one and of two tokens
@pytest.mark.parametrize("labels", ["gold", "shares"])
def test_the_loss_is_of_the_scores_that_rank(tiny_model, corpus, count, labels, tmp_path):
    candidates = chosen(corpus, count)
    first = {c.question["question_id"]: {c.pages[0]: 0.25, c.pages[2]: 0.75} for c in candidates}
    model, processor = load_model(tiny_model)
    trainer = ScorerTrainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to="none"))
    batch = Collator(processor, first if labels == "shares" else None)(list(rl_dataset(corpus, candidates)))
    loss = trainer.compute_loss(model, batch).item()

    reranker, expected = Reranker(model, processor), 0.0
    for c in candidates:
        pages = [corpus.page_image(c.question["doc_name"], page) for page in c.pages]
        scores = reranker.rank(c.question["question"], pages, mode="score").scores
        total = math.log(math.fsum(map(math.exp, scores)))
        gold = {i - 1: 1 / len(c.positive_ids) for i in c.positive_ids}
        wanted = gold if labels == "gold" else {0: 0.25, 2: 0.75}
        expected -= sum(share * (scores[i] - total) for i, share in wanted.items()) / len(candidates)
    assert loss == pytest.approx(expected, abs=1e-4)


def test_training_puts_the_gold_pages_first_and_a_second_call_returns_the_log(tiny_model, corpus, tmp_path):
    """Four prompts learnt by heart, always in the same order."""
    data = rl_dataset(corpus, candidates := chosen(corpus, 4))
    settings = {"learning_rate": 2e-2, "max_steps": 30, "batch_size": 4, "lora_rank": 8}
    log = train_scorer(tiny_model, data, tmp_path / "run", **settings)
    assert log["loss"].iloc[-1] < 0.3 < 1.2 < log["loss"].iloc[0]
    trained = Reranker.from_pretrained(tmp_path / "run" / "model")
    for c in candidates:
        pages = [corpus.page_image(c.question["doc_name"], page) for page in c.pages]
        assert trained.rank(c.question["question"], pages, mode="score").order[0] + 1 in c.positive_ids
    assert train_scorer(tiny_model, data, tmp_path / "run", **settings).equals(log)
    with pytest.raises(ValueError, match="lora_rank"):
        train_scorer(tiny_model, data, tmp_path / "run", **{**settings, "lora_rank": 4})


def test_shares_are_counted_over_the_samples(corpus):
    class Turns:
        """Puts another page first each time that it is asked."""

        asked = 0

        def rank_many(self, pairs, batch_size):
            from mmr5_lab.reranking.ranking import Ranking

            self.asked += 1
            first = [1, 1, 1, 0][self.asked - 1]
            order = [first, *(k for k in range(4) if k != first)]
            return [Ranking(order, None, "", frozenset(), None, 1, 0.0) for _ in pairs]

    candidates = chosen(corpus, 4)[:1]
    [c] = candidates
    assert first_shares(Turns(), corpus, candidates, samples=4) == {
        c.question["question_id"]: {c.pages[1]: 0.75, c.pages[0]: 0.25}
    }
