"""The miniature's retrievers: those shipped, and how they are made."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.evaluation.metrics import evaluate
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.mini.retrievers import STEPS, build, train
from mmr5_lab.retrieval.encoders import load_encoder
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.views import plots

MINI = project_root() / "data/mini"
SHIPPED = MINI / "retrievers"


@pytest.fixture(scope="module")
def part():
    corpus = load_corpus(MINI / "corpus", "eval")
    return corpus.subset(corpus.documents["doc_name"][:8])


@pytest.mark.parametrize("method", STEPS)
def test_shipped_retrievers_rank_unseen_pages_far_above_chance(part, tmp_path, method):
    run = retrieve(part, method, 10, model=SHIPPED / method, vectors=tmp_path, device="cpu", batch_size=32)
    assert evaluate(run.pages, part).loc["micro", "R@1"] > 0.25  # a page of nine at random: .11
    assert sum(path.stat().st_size for path in (SHIPPED / method).iterdir()) < 5_100_000


def test_training_changes_the_language_model_and_not_the_vision_tower(tmp_path):
    build("dse", MINI / "base", tmp_path)
    before = load_encoder("dse", tmp_path, device="cpu").model.state_dict()
    train("dse", tmp_path, load_corpus(MINI / "corpus", "sft"), steps=2)
    after = load_encoder("dse", tmp_path, device="cpu").model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value.half().float(), after[name])}
    assert len(moved) > 20
    assert not [name for name in moved if "visual" in name]


def test_the_heat_map_finds_the_words_of_a_question(part):
    """Of the questions whose entity stands on the gold page in one place, that place is found in most."""
    encoder = load_encoder("colqwen", SHIPPED / "colqwen", device="cpu")
    question = part.questions.iloc[0]
    page = part.page_image(question["doc_name"], question["gold_pages"][0])
    tokens, likeness = encoder.heat_map(question["question"], page)
    assert "".join(tokens) == question["question"].replace(" ", "")
    assert likeness.shape == (len(tokens), 6, 5)
    [words], [patches] = encoder.encode_queries([question["question"]]), encoder.encode_pages([page])
    every = words @ patches.T
    assert likeness.max() <= every.max() + 1e-5
    assert np.isclose(every, likeness[-1].max(), atol=1e-5).any()
    figure = plots.heat_map(page, tokens, likeness, shown=3)
    assert len(figure.axes) == 3
    assert figure.alt.startswith("A page of 6 × 5 patches")


def test_a_heat_map_of_a_page_without_words(part):
    encoder = load_encoder("colqwen", SHIPPED / "colqwen", device="cpu")
    tokens, likeness = encoder.heat_map("<|image_pad|>?", Image.new("RGB", (140, 168), "white"))
    assert "<|image_pad|>" not in tokens
    assert np.isfinite(likeness).all()
