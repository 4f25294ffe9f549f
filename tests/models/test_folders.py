"""A folder that is no model, or a damaged one, is named with what to do, before transformers reads it."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from mmr5_lab.models.folders import adapter_folder, model_source
from mmr5_lab.models.loading import load_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4cac19\nsize 9792920\n"


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def cut(path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def shards(folder) -> None:
    """Store the weights in two files with an index, as large models are."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_whole_folders_are_taken(model, sft):
    assert model_source(model) == model
    shards(model)
    assert model_source(model) == model
    assert adapter_folder(sft / "adapter") == sft / "adapter"


def test_names_on_the_hub_are_left_alone():
    assert model_source("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert adapter_folder("someone/an-adapter") == "someone/an-adapter"


def test_a_run_stands_for_its_model_and_its_adapter(sft):
    assert model_source(sft) == sft / "model"
    assert adapter_folder(sft) == sft / "adapter"
    loaded, _ = load_model(sft)
    assert loaded.config.model_type == "qwen2_5_vl"


def test_an_export_stands_for_its_adapter(model, sft):
    shutil.copytree(sft / "adapter", model / "adapter")
    assert model_source(model) == model
    assert adapter_folder(model) == model / "adapter"


def test_adapters_and_checkpoints_are_not_models(sft):
    [checkpoint] = (sft / "checkpoints").glob("checkpoint-*")
    for folder in (sft / "adapter", checkpoint):
        with pytest.raises(ValueError, match=r"is a LoRA adapter, not a model: load .*tiny_model.* as the model and"):
            load_model(folder)


def test_a_model_is_not_an_adapter(model):
    with pytest.raises(FileNotFoundError, match=r"model is a model: an adapter's adapter_config.json is missing"):
        load_model(model, model)


def test_unfinished_runs_and_runs_without_a_model_are_named(sft, tmp_path):
    half = shutil.copytree(sft, tmp_path / "half")
    (half / "log.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"half is a run without a trained model: name a finished run"):
        model_source(half)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"run is a run without a trained model: name a finished run of 02_sft"):
        model_source(tmp_path / "run")
    with pytest.raises(ValueError, match=r"config.json is a file: name the model's folder"):
        model_source(sft / "model" / "config.json")
    with pytest.raises(FileNotFoundError, match="adapter folder nothing does not exist"):
        adapter_folder("./nothing")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tokenizer.json"], r"has no tokenizer \(tokenizer.json or .*: copy the files of the model"),
        (["processor_config.json", "preprocessor_config.json"], "has no image processor"),
        (["chat_template.jinja"], "has no chat template: copy chat_template.jinja"),
        (["model.safetensors"], "lacks model.safetensors: download or copy the weights again"),
        (["config.json"], "is not a model folder: config.json is missing"),
    ],
)
def test_missing_files_are_named(model, names, message):
    for name in names:
        (model / name).unlink(missing_ok=True)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_model(model)


@pytest.mark.parametrize("share", [0, 1e-5, 0.01, 0.5, 0.999999])
def test_weights_cut_short_are_named(model, share):
    cut(model / "model.safetensors", share)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short .*: download or copy it again"):
        load_model(model)


def test_missing_and_cut_shards_are_named(model):
    shards(model)
    cut(model / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"model-2.safetensors is damaged"):
        load_model(model)
    (model / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-2.safetensors"):
        load_model(model)


def test_pickled_weights_are_refused(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match="as pickles"):
        load_model(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_git_lfs_pointers_are_named(model, name):
    (model / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git-LFS pointer, not the file itself: run `git lfs pull`"):
        load_model(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
def test_damaged_json_is_named(model, name):
    cut(model / name)
    with pytest.raises(ValueError, match=rf"{name} is damaged .*: download or copy it again"):
        load_model(model)


def test_damaged_adapters_are_named(tiny_model, sft, tmp_path):
    adapter = shutil.copytree(sft / "adapter", tmp_path / "adapter")
    cut(adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged"):
        load_model(tiny_model, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model.safetensors"):
        load_model(tiny_model, adapter)
