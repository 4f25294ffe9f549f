"""What README and notebook 00 show is what came out: shipped results, their notebook, the pictures made of them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.experiments.notebooks import run_notebook
from mmr5_lab.experiments.runs import latest, project_root
from mmr5_lab.files import results

ROOT = project_root()
TOUR = ROOT / "data" / "mini" / "tour"


@pytest.fixture(scope="module")
def tour(tmp_path_factory) -> Path:
    return run_notebook("00_tour", {}, tmp_path_factory.mktemp("runs"))


def test_the_tour_counts_what_the_shipped_texts_say(tour):
    gold = load_corpus(ROOT / "data/mini/corpus").by_id
    written = pd.read_parquet(latest("04_inference", TOUR) / "SFT + RL.generations.parquet")
    first = [row.pages[0] in gold[row.question_id]["gold_pages"] for row in written.itertuples()]
    assert results(tour)["questions"] == len(written) == 352
    assert [results(latest(name, TOUR))["questions"] for name in ("04_inference", "05_evaluation")] == [352, 352]
    assert results(tour)["hit"]["SFT + RL"] == pytest.approx(sum(first) / 352)


def test_the_tours_figures_are_described(tour):
    shown = (tour / "notebook.html").read_text()
    assert shown.count("<img alt=") == 5 + 2, "five figures, the diagram and the course"
    assert shown.count('src="data:image/png;base64,') == 5
    assert "No description has been provided" not in shown
    assert shown.count("<iframe ") == 1


def test_the_projectors_notebook_has_the_shipped_results_where_there_are_no_others(tmp_path):
    run = run_notebook("09_browse", {"RUNS": "nowhere", "SHOWN": 2}, tmp_path)
    shipped = [f"{name} · shipped results" for name in ("SFT + RL", "SFT", "base")]
    assert results(run)["choices"] == shipped  # the last system first
    assert (run / "notebook.html").read_text().count("<iframe ") == 1


def test_readme_tells_the_shipped_result():
    """The table's rows."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {"BM25": "BM25", "base": "base model", "SFT": "SFT", "SFT + RL": "SFT + RL",
             "ceiling: candidates": "best order of these candidates"}  # fmt: skip
    columns = ("macro R@1", "micro R@1", "micro R@3", "micro R@5", "valid")
    table = results(latest("05_evaluation", TOUR))["table"]
    for name, told in names.items():
        numbers = (f"{table[name][c]:.3f}".removeprefix("0") if c in table[name] else "" for c in columns)
        row = re.sub(" +", " ", f"| {told} | {' | '.join(numbers)} |")
        assert row in re.sub(" +", " ", readme), row


def test_readme_tells_the_papers_figures():
    paper = pd.read_csv(ROOT / "data/paper_results.csv").query("table == 'main' and first_stage == 'ColQwen'")
    macro = paper.set_index("method")["macro_r1"]
    of = ("retriever only", "Qwen2.5-VL-7B-rl", "Qwen2.5-VL-7B-sft", "MM-R5")
    row = " | ".join(f"{macro[name]:.3f}".removeprefix("0") for name in of)
    assert f" | {row} |" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_pictures_of_a_document_are_there_and_described(path):
    for described, link in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        assert len(described) > 20, link
        assert (path.parent / link).is_file(), link


def test_every_notebook_has_its_row_and_thumbnail_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = notebook.stem
        assert re.search(rf"^\| \[{name}\]\(notebooks/{name}.ipynb\) \|.*\(docs/images/notebooks/{name}.png\) \|$",
                         readme, re.MULTILINE), name  # fmt: skip
        width, height = Image.open(ROOT / f"docs/images/notebooks/{name}.png").size
        assert width <= 200, name
        assert height <= 150, name


def test_the_shipped_files_are_small_and_tell_where_they_are_from():
    files = [path for path in TOUR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    manifests = [json.loads(path.read_text()) for path in TOUR.glob("*/*/manifest.json")]
    assert {m["notebook"] for m in manifests} == {"02_sft", "03_grpo", "04_inference", "05_evaluation"}
    assert all(m["commit"] and m["packages"]["torch"] for m in manifests)


@pytest.fixture
def copy(tour, tmp_path) -> Path:
    """The project without its pictures; the shipped runs stand for those of `make demo`, the tour has been run."""
    for name in ("data/mini", "docs/images/notebooks", "notebooks"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("mmr5_lab", "data/mini/corpus"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("notebooks/00_tour.ipynb", "docs/shown.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(TOUR, tmp_path / "runs")
    shutil.copytree(tour, tmp_path / "runs" / "00_tour" / tour.name)
    return tmp_path


def test_pictures_are_made_of_finished_runs(copy):
    """The documented command."""
    done = subprocess.run([sys.executable, "docs/shown.py", "runs"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "BM25 at rank 2; SFT + RL at rank 1" in done.stdout
    shipped = {path.relative_to(TOUR) for path in TOUR.rglob("*.*")}
    assert {path.relative_to(copy / "data/mini/tour") for path in (copy / "data/mini/tour").rglob("*.*")} == shipped
    for name in ("reranked.png", "notebooks/00_tour.png"):
        with Image.open(copy / "docs/images" / name) as made, Image.open(ROOT / "docs/images" / name) as ours:
            assert made.size == ours.size


def test_nothing_is_shipped_of_a_chain_that_is_not_finished(copy):
    shutil.rmtree(copy / "runs" / "05_evaluation")
    done = subprocess.run([sys.executable, "docs/shown.py", "runs"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no finished run of 05_evaluation in runs/" in done.stderr
    assert not (copy / "data/mini/tour").exists()
