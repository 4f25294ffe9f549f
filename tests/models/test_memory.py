"""The planner counts what the processor and the model really make."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from mmr5_lab.experiments.runs import project_root
from mmr5_lab.mini.model import build_processor
from mmr5_lab.models.loading import load_model, set_max_pixels
from mmr5_lab.models.memory import (
    GIB,
    TrainingBudget,
    cache_bytes_a_token,
    patch_grid,
    plan,
    plan_training,
    visual_tokens,
)
from mmr5_lab.prompting.prompts import build_messages

TIGHT = 32 << 20  # bytes: weights and some, not all, of 64 queries
SIZES = [(168, 140), (300, 90), (56, 56), (1000, 800)]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_model(tiny_model)


def test_tokens_are_those_of_the_processor(tiny_model, loaded):
    _, processor = loaded
    text = processor.apply_chat_template(
        build_messages("What was the revenue in 2015?", 4), tokenize=False, add_generation_prompt=True
    )
    images = [Image.new("RGB", (width, height)) for height, width in SIZES]
    ids = processor(text=[text], images=images, return_tensors="pt")["input_ids"]
    budget = plan(tiny_model, SIZES, max_new_tokens=100)
    image_token = processor.image_token_id
    assert sum(budget.page_tokens) == int((ids == image_token).sum())
    assert budget.text_tokens == int((ids != image_token).sum())
    assert budget.tokens == ids.numel() + 100
    assert visual_tokens(processor, SIZES[:1]) == [30], "10 × 12 patches in groups of four"


@pytest.mark.parametrize("max_pixels", [1_003_520, 12_845_056])
@pytest.mark.parametrize(
    "size", [(1164, 824), (2339, 1654), (1080, 1920), (768, 1024), (3000, 400), (8500, 227), (30, 20)]
)
def test_a4_slides_and_receipts_make_the_processor_s_tokens(size, max_pixels):
    processor = build_processor()
    set_max_pixels(processor, max_pixels)
    page = Image.new("RGB", (size[1], size[0]))
    ids = processor(text=[processor.image_token], images=[[page]], return_tensors="pt")["input_ids"]
    assert visual_tokens(processor, [size]) == [ids.numel()]


def test_a_page_is_cut_into_patches(loaded, architecture):
    assert patch_grid(loaded[1], (168, 140)) == (12, 10, 2)
    grid = patch_grid(architecture.processor, (168, 140))
    if grid is not None:  # else the model cuts pages in another way
        rows, columns, merge = grid
        assert [rows * columns / merge**2] == visual_tokens(architecture.processor, [(168, 140)])


def test_memory_is_that_of_weights_and_cache(tiny_model, loaded):
    model, processor = loaded
    budget = plan(tiny_model, SIZES, batch_size=3, max_new_tokens=10, memory=GIB)
    assert budget.parameters == sum(p.numel() for p in model.parameters())
    assert budget.weights == 4 * budget.parameters
    text = processor.apply_chat_template(build_messages("Why?", 1), tokenize=False)
    inputs = processor(text=[text], images=[Image.new("RGB", (140, 168))], return_tensors="pt")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
    kept = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kept == cache_bytes_a_token(model.config, torch.float32) * inputs["input_ids"].numel()
    assert budget.cache == cache_bytes_a_token(model.config, torch.float32) * budget.tokens * 3
    budget.check()


def test_what_does_not_fit_the_context_is_refused_with_what_would(tiny_model):
    budget = plan(tiny_model, [(168, 140)] * 200, max_new_tokens=500, memory=GIB)
    with pytest.raises(ValueError, match=r"200 pages make 6000 visual tokens; .* of a context of 4096"):
        budget.check()
    with pytest.raises(ValueError, match="at most") as refused:
        budget.check()
    advised = int(str(refused.value).split("at most ")[1].split(" such pages")[0])
    pixels = int(str(refused.value).split("max_pixels=")[1])
    fewer = plan(tiny_model, [(168, 140)] * min(advised, 100), max_new_tokens=500, memory=GIB)
    fewer.check()
    plan(tiny_model, [(168, 140)] * 200, max_new_tokens=500, max_pixels=pixels, memory=GIB).check()


def test_what_does_not_fit_memory_is_refused_with_what_would(tiny_model):
    tight = plan(tiny_model, SIZES, batch_size=64, memory=TIGHT)
    with pytest.raises(ValueError, match=r"but 0.0 GiB are free. What would fit: batch_size=\d+") as error:
        tight.check()
    batch = int(str(error.value).split("batch_size=")[1])
    plan(tiny_model, SIZES, batch_size=batch, memory=TIGHT).check()
    for options in ({"batch_size": batch + 1, "memory": TIGHT}, {"memory": 1000}):
        with pytest.raises(ValueError, match="this does not fit: weights take"):
            plan(tiny_model, SIZES, **options).check()
    with pytest.raises(ValueError, match="a smaller model"):
        plan(tiny_model, SIZES, memory=1000).check()


def test_nothing_is_loaded(tiny_model, monkeypatch):
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("weights were read")
    )
    assert plan(tiny_model, SIZES).parameters > 0


def test_no_pages_are_refused(tiny_model):
    with pytest.raises(ValueError, match="no pages to plan for"):
        plan(tiny_model, [])


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """The configuration of Qwen2.5-VL-7B, without its weights, and a processor that cuts pages as its own does."""
    folder = tmp_path_factory.mktemp("seven")
    text = {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 128000,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2,
    }  # fmt: skip
    Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def test_training_at_full_size_is_as_the_docs_say(seven):
    pages = [(1164, 824)] * 5
    budget = {"completion": 320, "max_pixels": 1_003_520}
    sft = plan_training(seven, pages, lora_rank=8, batch_size=1, **budget)
    assert sft.request.page_tokens == [1218] * 5
    assert sft.request.parameters == 8_292_166_656, "the published 8.29 billion"
    assert sft.adapter == 16 * 20_185_088, "7 matrices of 28 layers, rank × (in + out)"
    grpo = plan_training(
        seven, pages, lora_rank=64, batch_size=2, accumulation=4, generations=4, iterations=2, **budget
    )
    text = (project_root() / "docs" / "full_size.md").read_text(encoding="utf-8")
    for start, planned, examples in (
        ("SFT, `paper` (7,200 traces, rank 8)", sft, 7200),
        ("GRPO, `paper` (12,000 completions)", grpo, 12000),
    ):
        assert row(start, planned, examples) in text


def row(start: str, planned: TrainingBudget, examples: int) -> str:
    """Return the line of a stage in the table of docs/full_size.md."""
    parts = (planned.request.weights, planned.adapter, planned.activations, planned.pages, planned.sampling)
    sizes = [f"{size / GIB:.1f}" if size else "" for size in parts]
    hours = [f"{planned.hours(examples, devices):.1f}" for devices in (1, 4)]
    return f"| {' | '.join([start, *sizes, f'{planned.memory / GIB:.1f} GiB', *hours])} |".replace("|  |", "| |")
