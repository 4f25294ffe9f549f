"""The miniature's tokenizer and its base model's lessons."""

import random

import pytest
import torch
from helpers.material import TINY

from mmr5_lab.mini import pretrain
from mmr5_lab.mini.documents import ENTITIES, MEASURES, YEARS, describe
from mmr5_lab.mini.model import build_model, build_processor
from mmr5_lab.mini.pretrain import SHARES, lesson_sample, random_page
from mmr5_lab.prompting.prompts import build_messages, completion_text


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_every_word_of_the_vocabulary_is_one_token(processor):
    for word in (*ENTITIES, *MEASURES, *YEARS):
        assert len(processor.tokenizer(f" {word}")["input_ids"]) == 1, word


def test_any_text_survives_the_tokenizer(processor):
    for text in ("Käse, 東京 🙂\n\ttab", "<think>Image 1: a</think><answer>[2, 1]</answer>", "assistant\nassistant"):
        assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_no_token_spans_prompt_and_completion(processor):
    """It did: "assistant" + "\\nImage " in training, "assistant\\n" + "Image " when generating, never learnt."""
    tokenizer, rng = processor.tokenizer, random.Random(0)
    completions = [completion_text("Image 1: no.\nImage 2: yes.", [2, 1]), "2014 staff", " Orion", ". \n"]
    completions += [lesson_sample(rng, 2, tokenizer, SHARES)[1] for _ in range(200)]
    prompt = processor.apply_chat_template(build_messages("q?", 2), tokenize=False, add_generation_prompt=True)
    start = tokenizer(prompt)["input_ids"]
    for completion in completions:
        assert tokenizer(prompt + completion)["input_ids"] == start + tokenizer(completion)["input_ids"], completion


@pytest.mark.parametrize("lesson", pretrain.LESSONS)
def test_an_interrupted_lesson_goes_on_as_if_it_had_not_been(lesson, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "LESSONS", {lesson: 4})
    monkeypatch.setattr(pretrain, "PAGES", {lesson: 6})
    monkeypatch.setattr(pretrain, "POOL", 12)

    def train(folder):
        model = build_model(processor, **TINY)
        folder.mkdir(exist_ok=True)
        pretrain.train(lesson, model, processor, folder, save_every=2)
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
    assert set(pretrain.reading_accuracy(model, processor, pages).values()) == {1.0}
    texts[0] = ""
    accuracy = pretrain.reading_accuracy(model, processor, pages)
    assert accuracy[pages[0][0].kind] < 1
