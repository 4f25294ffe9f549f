"""Loading: what is chosen for a device, and what is refused."""

import json
import shutil

import pytest
import torch
from helpers.material import SFT, TINY
from peft import LoraConfig, get_peft_model

from mmr5_lab.mini.model import build_model, build_processor
from mmr5_lab.models.loading import best_attention, best_dtype, load_model, set_max_pixels
from mmr5_lab.models.probe import PROBE


def test_choices_fit_the_device():
    assert best_dtype("cpu") == torch.float32
    assert best_dtype("cuda:0") == torch.bfloat16
    assert best_attention("cpu", torch.bfloat16) is None
    assert best_attention("cuda", torch.float32) is None


def test_dtype_and_attention_can_be_set(tiny_model):
    model, processor = load_model(tiny_model, dtype=torch.float16, attention="eager", max_pixels=28 * 28 * 10)
    assert model.dtype == torch.float16
    assert model.config._attn_implementation == "eager"
    assert processor.image_processor.size["longest_edge"] == 7840
    assert processor.tokenizer.padding_side == "left"


def test_an_adapter_is_merged(tiny_model, tmp_path):
    model, _ = load_model(tiny_model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        plain = load_model(tiny_model)[0](input_ids=ids).logits
        merged, _ = load_model(tiny_model, tmp_path)
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-5)
    assert not hasattr(merged, "peft_config"), "merged weights, no adapter left"


def test_what_cannot_be_loaded_is_named(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="model folder runs/none does not exist"):
        load_model("runs/none")
    shutil.copytree(tiny_model, tmp_path / "text", dirs_exist_ok=True)
    config = json.loads((tiny_model / "config.json").read_text())["text_config"]
    (tmp_path / "text" / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(ValueError, match=r"is a qwen2 model, which takes no images"):
        load_model(tmp_path / "text")
    with pytest.raises(ValueError, match=r"4-bit weights need a GPU .the device is cpu."):
        load_model(tiny_model, device="cpu", four_bit=True)


def test_a_processor_without_a_pixel_budget_is_named(tmp_path):
    from helpers.architectures import BUILD

    _, processor = BUILD["gemma3"]()
    with pytest.raises(ValueError, match=r"Gemma3ImageProcessor.* has no pixel budget to set"):
        set_max_pixels(processor, 1000)


@pytest.fixture
def exported(sft, tmp_path):
    """The folders as `mmr5 export` writes them, without probes."""
    folder = shutil.copytree(sft / "model", tmp_path / "exported")
    shutil.copytree(sft / "adapter", folder / "adapter")
    for probe in folder.rglob(PROBE):
        probe.unlink()
    return folder


def test_an_adapter_is_not_merged_twice(sft, exported, tmp_path):
    unmarked = shutil.copytree(sft / "model", tmp_path / "unmarked")  # as folders were before configurations said it
    config = json.loads((unmarked / "config.json").read_text())
    assert len(config.pop("merged_adapters")) == 1
    (unmarked / "config.json").write_text(json.dumps(config))
    for model, adapter in [
        (sft / "model", sft / "adapter"), (sft, sft), (exported, exported / "adapter"), (exported, exported),
        (unmarked, sft / "adapter"),
    ]:  # fmt: skip
        with pytest.raises(
            ValueError, match=r"already holds the adapter .* \(already merged\): load the model without it"
        ):
            load_model(model, adapter)


def test_adapters_merged_in_an_earlier_stage_are_known_too(sft, material, tmp_path):
    from mmr5_lab.training.stages import train_sft

    train_sft(sft / "model", material.traces, tmp_path / "next", **SFT)
    for adapter in (sft / "adapter", tmp_path / "next" / "adapter"):
        with pytest.raises(ValueError, match="already merged"):
            load_model(tmp_path / "next", adapter)
    load_model(sft / "model", tmp_path / "next" / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_loaded_on_its_own_base(material, sft, dtype):
    load_model(material.model, sft / "adapter", dtype=dtype)


def test_an_adapter_on_another_base_is_refused(material, sft, tmp_path):
    processor = build_processor()
    build_model(processor, **TINY, seed=1).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"adapter was not trained on .*: with it the logits differ by .* Load the base"
    ):
        load_model(tmp_path, sft / "adapter")
