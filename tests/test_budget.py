"""The planner counts what the processor and the model really make."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mmr5_lab.budget import GIB, cache_bytes_a_token, plan, visual_tokens
from mmr5_lab.models import load_model
from mmr5_lab.prompts import build_messages

SIZES = [(168, 140), (300, 90), (56, 56), (1000, 800)]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_model(tiny_model)


def test_tokens_are_those_of_the_processor(tiny_model, loaded):
    _, processor = loaded
    text = processor.apply_chat_template(build_messages("Why?", 4), tokenize=False, add_generation_prompt=True)
    images = [Image.new("RGB", (width, height)) for height, width in SIZES]
    ids = processor(text=[text], images=images, return_tensors="pt")["input_ids"]
    budget = plan(tiny_model, SIZES, query="Why?", max_new_tokens=100)
    image_token = processor.image_token_id
    assert sum(budget.page_tokens) == int((ids == image_token).sum())
    assert budget.text_tokens == int((ids != image_token).sum())
    assert budget.tokens == ids.numel() + 100
    assert visual_tokens(processor, SIZES[:1]) == [30], "10 × 12 patches in groups of four"


def test_memory_is_that_of_weights_and_cache(tiny_model, loaded):
    model, processor = loaded
    budget = plan(tiny_model, SIZES, batch_size=3, max_new_tokens=10, memory=GIB)
    assert budget.parameters == sum(p.numel() for p in model.parameters())
    assert budget.weights == 4 * budget.parameters
    text = processor.apply_chat_template(build_messages("Why?", 1), tokenize=False)
    inputs = processor(text=[text], images=[Image.new("RGB", (140, 168))], return_tensors="pt")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    kept = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kept == cache_bytes_a_token(model.config, torch.float32) * inputs["input_ids"].numel()
    assert budget.cache == cache_bytes_a_token(model.config, torch.float32) * budget.tokens * 3
    budget.check()


def test_what_does_not_fit_the_context_is_refused_with_what_would(tiny_model):
    budget = plan(tiny_model, [(168, 140)] * 200, max_new_tokens=500, memory=GIB)
    with pytest.raises(ValueError, match=r"200 pages make 6000 visual tokens; .* of a context of 4096"):
        budget.check()
    [problem] = budget.problems()
    advised = int(problem.split("at most ")[1].split(" such pages")[0])
    pixels = int(problem.split("max_pixels=")[1])
    fewer = plan(tiny_model, [(168, 140)] * advised, max_new_tokens=500, memory=GIB)
    assert not fewer.problems() or advised > 100, "what is advised fits (fewer pages also need less text)"
    assert not plan(tiny_model, [(168, 140)] * 100, max_new_tokens=200, max_pixels=pixels, memory=GIB).problems()


def test_what_does_not_fit_memory_is_refused_with_what_would(tiny_model):
    tight = plan(tiny_model, SIZES, batch_size=64, memory=4 << 20)
    with pytest.raises(ValueError, match=r"but 0.0 GiB are free. What would fit: batch_size=\d+") as error:
        tight.check()
    batch = int(str(error.value).split("batch_size=")[1])
    assert not plan(tiny_model, SIZES, batch_size=batch, memory=4 << 20).problems()
    assert plan(tiny_model, SIZES, batch_size=batch + 1, memory=4 << 20).problems()
    assert "a smaller model" in plan(tiny_model, SIZES, memory=1000).problems()[0]


def test_nothing_is_loaded(tiny_model, monkeypatch):
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("weights were read")
    )
    assert plan(tiny_model, SIZES).parameters > 0


def test_no_pages_are_refused(tiny_model):
    with pytest.raises(ValueError, match="no pages to plan for"):
        plan(tiny_model, [])
