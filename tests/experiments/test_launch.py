"""Two processes, started by accelerate and talking over gloo, train what one process trains."""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import nbformat
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import write_trec
from mmr5_lab.experiments.launch import main, training_settings
from mmr5_lab.experiments.notebooks import chain_run, run_notebook
from mmr5_lab.experiments.parameters import default_parameters
from mmr5_lab.experiments.runs import open_run, project_root
from mmr5_lab.mini.teacher import EvidenceTeacher
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.construction import make_traces, training_candidates
from mmr5_lab.training.checkpoints import finished_log
from mmr5_lab.training.monitoring import completions
from mmr5_lab.training.stages import train_grpo, train_sft

ROOT = project_root()
SCRIPT = [ROOT / "tests" / "helpers" / "same_draws.py", "2"]
# `accelerate launch --cpu --num_processes 2` would start a single process
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def profile(material, tmp_path_factory):
    """A profile with the tiny model: of two steps, the fewest that apply what the first one learnt."""
    folder = tmp_path_factory.mktemp("distributed")
    corpus = {"CORPUS": str(material.folder / "corpus")}
    parameters = {
        "01_data_construction": {**corpus, "MAX_TRACES": 4},
        "02_sft": {
            "MODEL": str(material.model), "EPOCHS": 1.0, "BATCH_SIZE": 1, "ACCUMULATION": 2, "LORA_RANK": 4,
            "LORAPLUS_RATIO": 4.0, "PROBES": 1,
        },
        "03_grpo": {
            "MAX_STEPS": 2, "GENERATIONS": 2, "BATCH_SIZE": 4, "ACCUMULATION": 2, "MAX_COMPLETION": 8,
            "LORA_RANK": 4, "TOP_ENTROPY": 0.3,
        },
    }  # fmt: skip
    (folder / "profile.yaml").write_text(yaml.safe_dump(parameters))
    return folder / "profile.yaml"


def trained(profile, runs, start, by, **environment: str) -> tuple:
    """Run folders of SFT and GRPO in `runs`, trained by the command that `start` begins, which says by how many."""
    given = ["--profile", str(profile), "--runs", str(runs)]
    parameters, sft = chain_run("02_sft", profile, runs)
    run = open_run("02_sft", {**parameters, "RUN": str(sft)})
    run.finish({"base": parameters["MODEL"], "model": str(sft / "model")})  # as notebook 02 leaves it
    command = [sys.executable, *start, *SCRIPT, "02_sft", *given, ",", "03_grpo", *given]
    on_cpus = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=on_cpus, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"is trained, by {by}, in") == 2, "one process speaks"
    return sft, chain_run("03_grpo", profile, runs)[1]


@pytest.fixture(scope="module")
def by_one(profile) -> tuple:
    one = profile.parent / "one"
    parameters, folder = chain_run("01_data_construction", profile, one)
    run = open_run("01_data_construction", {**parameters, "RUN": str(folder)})
    corpus = load_corpus(parameters["CORPUS"])
    sft, rl = corpus.split("sft"), corpus.split("rl")
    write_trec(retrieve(rl, top_k=10), rl, folder / "rl.trec")
    candidates = training_candidates(sft, retrieve(sft, top_k=10))[: parameters["MAX_TRACES"]]
    make_traces(sft, candidates, EvidenceTeacher(sft), folder / "traces.jsonl")
    run.finish({"corpus": parameters["CORPUS"]})  # as notebook 01 leaves it
    return trained(profile, one, [], "one process")


def as_shipped(name: str) -> dict[str, str]:
    """The environment that accelerate makes of a shipped configuration."""
    config = yaml.safe_load((ROOT / "notebooks" / "accelerate" / f"{name}.yaml").read_text())
    if "deepspeed_config" in config:
        given = {f"ACCELERATE_DEEPSPEED_{key.upper()}": str(value) for key, value in config["deepspeed_config"].items()}
        return given | {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    given = {key.upper(): str(value) for key, value in config.get("fsdp_config", {}).items()}
    return given | ({"ACCELERATE_USE_FSDP": "true"} if given else {})


WITHOUT_DEEPSPEED = pytest.mark.skipif(not find_spec("deepspeed"), reason="pip install deepspeed")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", pytest.param("deepspeed", marks=WITHOUT_DEEPSPEED)])
def test_two_processes_train_what_one_trains(name, profile, by_one):
    one, two = profile.parent / "one", profile.parent / name
    shutil.copytree(one / "01_data_construction", two / "01_data_construction")
    by_two = trained(profile, two, TWO, "2 processes (gloo)", **as_shipped(name))
    for alone, together in zip(by_one, by_two, strict=True):
        log, other = finished_log(alone), finished_log(together)
        assert len(log) == len(other) > 1
        assert other["loss"].tolist() == pytest.approx(log["loss"].tolist(), abs=1e-4)
        assert other["grad_norm"].tolist() == pytest.approx(log["grad_norm"].tolist(), rel=1e-5, abs=1e-5)
        assert (log["grad_norm"] > 0).any(), "something was learnt"
        expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (alone, together))
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-4), name
    assert completions(together)["text"].tolist() == completions(alone)["text"].tolist()
    assert completions(together)["advantage"].tolist() == pytest.approx(
        completions(alone)["advantage"].tolist(), abs=1e-4
    )


def test_the_notebook_finds_the_training_done(profile, by_one):
    """Its settings are those of the launcher: a difference would be refused."""
    sft, runs = by_one[0], profile.parent / "one"
    (sft / "results.json").unlink()
    written = (sft / "log.csv").stat().st_mtime_ns
    [data_run] = (runs / "01_data_construction").iterdir()
    parameters = yaml.safe_load(profile.read_text())["02_sft"]
    assert run_notebook("02_sft", {**parameters, "DATA_RUN": str(data_run)}, runs) == sft
    assert (sft / "log.csv").stat().st_mtime_ns == written


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_accelerate_takes_each_configuration(name, kind):
    """accelerate refuses a file with a key that it does not know."""
    config = load_config_from_file(str(ROOT / "notebooks" / "accelerate" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert config.num_processes == 4


def test_every_training_parameter_of_the_notebooks_is_an_argument():
    """The launcher takes them by name; the notebook writes out the same call."""
    for name, train in (("02_sft", train_sft), ("03_grpo", train_grpo)):
        path = ROOT / "notebooks" / f"{name}.ipynb"
        settings = training_settings(default_parameters(path))
        known = inspect.signature(train).parameters
        assert {s for s in settings if s not in known or known[s].kind is not inspect.Parameter.KEYWORD_ONLY} == set()
        [call] = [
            node
            for cell in nbformat.read(path, as_version=4).cells
            if cell.cell_type == "code" and f"{train.__name__}(" in cell.source
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == train.__name__
        ]
        written = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg != "adapter"}
        assert written == {setting: setting.upper() for setting in settings}


def test_bad_input_is_named_and_exits_with_2(profile, tmp_path, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("02_sft: {LERNING_RATE: 1.0}\n")
    assert main(["02_sft", "--profile", str(profile), "--runs", str(tmp_path)]) == 2
    assert "is not a finished run (no results.json): run its notebook to the end first" in capsys.readouterr().err
    assert main(["02_sft", "--profile", str(wrong), "--runs", str(profile.parent / "one")]) == 2
