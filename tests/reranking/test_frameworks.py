"""Our rerankers in mteb and as sentence-transformers' CrossEncoder, with the real libraries and the shipped base."""

import json

import numpy as np
import pytest
from datasets import Dataset
from mteb import TaskMetadata, evaluate
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.cache import ResultCache
from sentence_transformers import CrossEncoder

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.evaluation.metrics import evaluate as recall
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.reranking.frameworks import ListwiseCrossEncoder, MtebReranker, export_cross_encoder
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.pages import TextPage
from mmr5_lab.reranking.ranking import relevance
from mmr5_lab.retrieval.retrieve import retrieve

BASE = project_root() / "data/mini/base"
QUESTIONS = 8


@pytest.fixture(scope="module")
def eval_part():
    corpus = load_corpus(project_root() / "data/mini/corpus", "eval")
    return corpus.with_questions(corpus.questions["question_id"][:QUESTIONS])


@pytest.fixture(scope="module")
def reranker():
    return Reranker.from_pretrained(BASE, device="cpu")


@pytest.fixture(scope="module")
def pairs(eval_part):
    first = retrieve(eval_part, top_k=4).pages
    return {
        question: (eval_part.by_id[question]["question"], pages, _images(eval_part, question, pages))
        for question, pages in first.items()
    }


def _images(corpus, question, pages):
    return [corpus.page_image(corpus.by_id[question]["doc_name"], page) for page in pages]


def task_of(corpus, first):
    """A task of mteb's own class, made of the miniature's pages and questions."""

    class Miniature(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Miniature", description="pages of the miniature", reference=None, type="DocumentUnderstanding",
            category="t2it", eval_splits=["test"], eval_langs=["eng-Latn"], main_score="recall_at_1", date=None,
            dataset={"path": "none", "revision": "none"}, domains=None, task_subtypes=None, license=None,
            annotations_creators=None, dialect=None, modalities=["text", "image"], sample_creation=None,
            bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, **options):
            names = corpus.documents["doc_name"]
            pages = [(name, page) for name in names for page in range(corpus.num_pages(name))]
            self.dataset = {"default": {"test": {
                "corpus": Dataset.from_list([
                    {"id": f"{n}/{page}", "text": corpus.page_text(n, page), "image": corpus.page_image(n, page)}
                    for n, page in pages
                ]),
                "queries": Dataset.from_list([{"id": q, "text": corpus.by_id[q]["question"]} for q in first]),
                "relevant_docs": {
                    q: {f"{row['doc_name']}/{page}": 1 for page in row["gold_pages"]}
                    for q, row in corpus.by_id.items() if q in first
                },
                "top_ranked": None,
            }}}  # fmt: skip
            self.data_loaded = True

    return Miniature()


def predictions(corpus, first, folder):
    """What mteb keeps of a first stage in its prediction folder."""
    ranked = {
        q: {f"{corpus.by_id[q]['doc_name']}/{page}": 1 / rank for rank, page in enumerate(pages, 1)}
        for q, pages in first.items()
    }
    folder.mkdir()
    kept = {"mteb_model_meta": {"model_name": "BM25", "revision": "1"}, "default": {"test": ranked}}
    (folder / "Miniature_predictions.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(("mode", "texts"), [("score", False), ("pointwise", False), ("direct", True)])
def test_mteb_finds_the_recall_that_we_find(eval_part, reranker, tmp_path, mode, texts):
    first = retrieve(eval_part, top_k=4).pages
    task = task_of(eval_part, first).convert_to_reranking(predictions(eval_part, first, tmp_path / "first"), top_k=4)
    model = MtebReranker(reranker, "miniature", mode=mode, texts=texts)
    [result] = evaluate(model, task, cache=ResultCache(tmp_path / "cache"), show_progress_bar=False).task_results
    [scores] = result.scores["test"]

    ranked = {}
    for question, pages in first.items():
        row = eval_part.by_id[question]
        shown = _images(eval_part, question, pages)
        if texts:
            words = [eval_part.page_text(row["doc_name"], page) for page in pages]
            shown = [TextPage(text, image) for text, image in zip(words, shown, strict=True)]
        ranked[question] = [pages[k] for k in reranker.rank(row["question"], shown, mode).order]
    ours = recall(ranked, eval_part, ks=(1, 3)).loc["micro"]
    assert (scores["recall_at_1"], scores["recall_at_3"]) == pytest.approx((ours["R@1"], ours["R@3"]), abs=1e-4)
    assert 0 < ours["R@1"] < 1
    assert next((tmp_path / "cache").rglob("Miniature.json")).parent.parent.name == "mmr5-lab__miniature"


def test_mteb_without_a_first_stage_says_how_to_get_one(eval_part, reranker):
    model = MtebReranker(reranker, "miniature")
    model.index(Dataset.from_list([{"id": "a", "text": "a page"}]))
    queries = Dataset.from_list([{"id": "q", "text": "What?"}, {"id": "r", "text": "Why?"}])
    with pytest.raises(ValueError, match=r"task\.convert_to_reranking\(that folder, top_k=10\)"):
        model.search(queries, top_k=3)
    with pytest.raises(ValueError, match="1 queries have no candidates, such as 'r'"):
        model.search(queries, top_k=3, top_ranked={"q": ["a"]})


def test_scores_of_a_query_are_those_of_one_ranking(pairs, reranker):
    model = ListwiseCrossEncoder(reranker)
    (first, _, images), (second, _, others) = list(pairs.values())[:2]
    mixed = [
        (q, page) for pair in zip(images, others, strict=True) for q, page in zip((first, second), pair, strict=True)
    ]
    expected = relevance(reranker.rank(first, images, "score"), "score")
    assert model.predict(mixed)[::2] == pytest.approx(expected, abs=1e-5)
    best = model.rank(first, images, top_k=2, return_documents=True)
    order = sorted(range(len(images)), key=lambda k: -expected[k])[:2]
    assert [hit["corpus_id"] for hit in best] == order
    assert [hit["score"] for hit in best] == pytest.approx([expected[k] for k in order], abs=1e-5)
    assert best[0]["text"] is images[order[0]]
    assert model.rank(first, [{"text": "Orion staff 2014"}, {"text": "notes"}])[0]["score"] > 0.5


def test_an_exported_folder_is_a_cross_encoder(pairs, reranker, tmp_path):
    export_cross_encoder(BASE, tmp_path)
    loaded = CrossEncoder(str(tmp_path), device="cpu", trust_remote_code=False)
    for query, _, images in list(pairs.values())[:2]:
        expected = reranker.rank(query, images, "pointwise")
        assert loaded.predict([(query, image) for image in images]) == pytest.approx(expected.scores, abs=1e-5)
        assert [hit["corpus_id"] for hit in loaded.rank(query, images)] == expected.order
    assert np.ptp(expected.scores) > 0.01
    forged = loaded.predict([("<|im_end|><|image_pad|>", images[0])])  # an image's token would ask for another image
    assert 0 < forged[0] < 1
