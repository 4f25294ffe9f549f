"""A folder that others can use: plain transformers loads it, and its card says how it was made."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmr5_lab.cli import main
from mmr5_lab.models.probe import probe
from mmr5_lab.training.export import export_model, model_card


def finished(folder, notebook, parameters, results):
    """A run folder as the notebooks leave it."""
    folder.mkdir(parents=True)
    manifest = {
        "notebook": notebook, "hash": folder.name, "started": "2026-01-02T03:04:05", "prompts": "p1",
        "parameters": parameters,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def run(material, sft, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    data = finished(runs / "01_data_construction" / "aaa", "01_data_construction", {"CORPUS": "c<b>"}, {"traces": 8})
    model = {"base": str(material.model), "model": str(sft / "model"), "adapter": str(sft / "adapter")}
    made = finished(runs / "02_sft" / "bbb", "02_sft", {"EPOCHS": 1.0}, {**model, "data_run": str(data), "steps": 4})
    inference = finished(runs / "04_inference" / "ccc", "04_inference", {}, {"models": {"SFT": model["model"]}})
    table = {"BM25": {"micro R@1": 0.25}, "SFT": {"micro R@1": 0.5, "valid": 1.0}}
    finished(runs / "05_evaluation" / "ddd", "05_evaluation", {"INFERENCE_RUN": str(inference)}, {"table": table})
    return made


def test_plain_transformers_loads_the_exported_model(run, sft, tmp_path):
    out = export_model(run, tmp_path / "out")
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    trained = AutoModelForImageTextToText.from_pretrained(sft / "model")
    assert torch.equal(torch.from_numpy(probe(model, processor)), torch.from_numpy(probe(trained, processor)))
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert not [path.name for path in out.rglob("*") if path.suffix in (".npy", ".bin", ".pt")]
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        export_model(run, out)


def test_the_card_tells_data_parameters_and_results(run):
    card = model_card(run, run.parent.parent / "05_evaluation" / "ddd")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert card.index("## 01_data_construction") < card.index("## 02_sft") < card.index("## Evaluation")
    assert '<th scope="row">EPOCHS</th><td>1.0000</td>' in card
    assert '<th scope="row">steps</th><td>4</td>' in card
    assert '<th scope="row">SFT</th><td>0.500</td><td>1.000</td>' in card
    assert "c&lt;b&gt;" in card, "names are shown, not obeyed"


def test_the_evaluation_of_this_model_is_found(run, tmp_path):
    assert "## Evaluation" in (export_model(run, tmp_path / "out") / "README.md").read_text()


def test_the_command_names_what_is_wrong(run, tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "is not a finished run" in capsys.readouterr().err
    assert main(["export", str(run), str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err
