"""The base model's lessons as trainings."""

import random
from dataclasses import replace

import pytest
import torch
from helpers.material import TINY

from mmr5_lab.mini import curriculum
from mmr5_lab.mini.curriculum import LESSONS, random_page, reading_accuracy
from mmr5_lab.mini.documents import describe
from mmr5_lab.mini.model import build_model, build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_an_interrupted_lesson_goes_on_as_if_it_had_not_been(lesson, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(curriculum, "POOL", 12)
    lesson = replace(lesson, steps=4, pages=6)

    def train(folder):
        model = build_model(processor, **TINY)
        folder.mkdir(exist_ok=True)
        curriculum.train(lesson, model, processor, folder, save_every=2)
        return model.state_dict()

    whole, clip, calls = train(tmp_path / "whole"), torch.nn.utils.clip_grad_norm_, []

    def clip_or_stop(*arguments):
        calls.append(1)
        if len(calls) == 4:  # after the checkpoint of step 2 and one more step, which is lost
            raise KeyboardInterrupt
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped")
    resumed = train(tmp_path / "stopped")
    assert len(calls) == 4 + 2
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_reading_accuracy_counts_words_that_a_description_holds(processor, monkeypatch):
    rng = random.Random(1)
    pages = [random_page(rng) for _ in range(6)]
    model = build_model(processor, **TINY)
    texts = [describe(content) for content, _ in pages]
    monkeypatch.setattr(type(processor), "batch_decode", lambda *_, **__: texts)
    assert set(reading_accuracy(model, processor, pages).values()) == {1.0}
    texts[0] = ""
    accuracy = reading_accuracy(model, processor, pages)
    assert accuracy[pages[0][0].kind] < 1
