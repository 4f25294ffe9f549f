"""`mmr5 reproduce`: plans of every target, what stands in the way, and `released` to its end on a stand-in hub."""

import re
import subprocess
import sys

import pytest
import yaml
from hub.stand_in import environment

from mmr5_lab.experiments.parameters import checked_parameters, read_profile
from mmr5_lab.experiments.reproduce import TARGETS, Plan, reproduce
from mmr5_lab.experiments.runs import project_root, source_of


@pytest.fixture
def cache(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    return hub


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_says_what_a_target_takes_without_any_weights(target, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plan = reproduce(target, str(tmp_path / "runs"), dry_run=True)
    assert "MMDocIR/MMDocIR_Evaluation_Dataset: 1.6 GB" in plan
    assert re.search(r"together \d+\.\d hours on one GPU", plan)
    assert re.search(r"Writes: \d+\.\d GB", plan)
    assert ("0 of 6 notebooks" if target in ("paper", "recommended") else "rows") in plan


def test_the_teachers_price_is_that_of_its_tokens(tmp_path):
    """7,200 traces of 5 pages and a summary: 43,200 calls of 1,225 tokens at 2.5 and 60 at 10 a million."""
    plan = reproduce("paper", str(tmp_path), dry_run=True)
    price = 43_200 * (1225 * 2.5 + 60 * 10) / 1e6
    assert "at most 43,200 calls, 53 + 2.6 million tokens" in plan
    assert f"{price:.0f} in your PRICE's money" in plan


def test_training_is_planned_as_the_documents_say():
    table = yaml.safe_load((project_root() / "data/full_size.yaml").read_text())["training"]
    lines = (project_root() / "docs/full_size.md").read_text().splitlines()
    for target, stages in table.items():
        for stage, figures in stages.items():
            [line] = [line for line in lines if line.startswith(f"| {stage}, `{target}`")]
            cells = [cell.strip().removesuffix(" GiB") for cell in line.split("|")]
            assert [float(cell) for cell in cells[-4:-1]] == figures


def test_inference_is_planned_as_by_the_planner():
    """Of 7B, 8 queries of 10 pages, 2,048 tokens each: `models.memory.plan` says 34.6 GiB (docs/log.md)."""
    profile = project_root() / "notebooks/profiles/released.yaml"
    values = checked_parameters(source_of("04_inference"), read_profile(profile)["04_inference"])
    plan = Plan("released", {"04_inference": values}, "runs")
    assert plan.stages.loc["rerank, ColQwen + MM-R5", "GiB a GPU"] == pytest.approx(34.6, rel=0.03)


def test_what_stands_in_the_way_is_said_with_its_remedy_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="paper cannot start yet") as error:
        reproduce("paper", str(tmp_path / "runs"))
    problems = str(error.value)
    assert "run `hf download MMDocIR/MMDocIR_Train_Dataset --repo-type dataset`" in problems
    assert "OPENAI_API_KEY is not set" in problems
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match="set MAX_QUESTIONS in a copy"):
        reproduce("paper", max_questions=2)


def test_a_damaged_download_is_named(cache, tmp_path, monkeypatch):
    [pages] = cache.glob("datasets--MMDocIR--MMDocIR_Evaluation_Dataset/snapshots/*/MMDocIR_pages.parquet")
    whole = pages.read_bytes()
    pages.write_bytes(whole[:100])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        with pytest.raises(ValueError, match=r"(?s)is not a readable parquet file.*hf download .* --repo-type dataset"):
            reproduce("released", str(tmp_path / "runs"))
    finally:
        pages.write_bytes(whole)


def test_the_released_weights_fill_their_rows(hub, tmp_path):
    """The documented command, offline, on two questions a row; started again it finds everything done."""
    command = [sys.executable, "-m", "mmr5_lab.cli", "reproduce", "released", "--max-questions", "2"]
    command += ["--runs", str(tmp_path / "runs")]
    options = {"cwd": project_root(), "env": environment(hub), "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    [table] = re.findall(r"(?s)\nretrievers, micro\n(.*?)(?=\n\n|$)", done.stdout)
    rows = [line for line in table.splitlines() if "+ MM-R5" in line]
    assert len(rows) == 5
    assert not [line for line in rows if line.split("+ MM-R5")[1].split()[0] == "–"], "every row has a figure of ours"
    again = subprocess.run([*command, "--dry-run"], **options)
    assert "5 of 5 rows" in again.stdout
