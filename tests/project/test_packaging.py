"""What a fresh clone relies on: the environment, the Makefile, the notebooks, and a README that tells the truth."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from mmr5_lab.experiments.parameters import default_parameters

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST_CELL = 25  # lines

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def make_targets() -> set[str]:
    """Every target that the Makefile declares as phony."""
    line = re.search(r"^\.PHONY:(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(line[1].split())


def code_in_readme() -> str:
    """README's fenced blocks and inline code; prose may say "make a corpus"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fenced = r"^```.*?^```"
    blocks = re.findall(fenced, text, re.DOTALL | re.MULTILINE)
    rest = re.sub(fenced, "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(blocks + re.findall(r"`([^`]+)`", rest))


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_conda_installs_the_project_and_nothing_of_its_own():
    """One place for dependencies: a package named here as well would drift away from pyproject.toml."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {re.split(r"[<>=! ]", entry)[0] for entry in dependencies if isinstance(entry, str)}
    through_pip = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert conda == {"python", "pip"}
    assert through_pip == [["-e .[dev]"]]


def test_conda_and_pip_ask_for_the_same_python():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{project()['requires-python']}" in dependencies


def test_every_dependency_has_a_lower_bound():
    extras = project().get("optional-dependencies", {}).values()
    unbounded = [name for group in (project()["dependencies"], *extras) for name in group if ">=" not in name]
    assert unbounded == []


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo", "test", "lab", "lint", "clean", "help"} <= make_targets()
    assert set(re.findall(r"^  make ([\w-]+)", shown, re.MULTILINE)) == make_targets()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_jupyterlab_opens_where_links_to_the_documents_lead_somewhere(tmp_path):
    """In the project's folder, not in notebooks/, which ../docs/method.md would leave."""
    command = ["make", "--no-print-directory", "--dry-run", "lab", f"VENV={tmp_path}"]  # make calls the tests
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1].endswith("jupyter lab notebooks/00_tour.ipynb")


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_a_python_that_is_missing_is_named(tmp_path):
    command = ["make", "lint", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no-such-python was not found" in done.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_a_python_that_is_too_old_is_refused(tmp_path):
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "lint", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"needs Python 3.11 or newer; {old} is Python 3.9.1." in done.stdout
    assert not (tmp_path / "venv").exists()


def test_readme_names_only_commands_that_exist():
    shown = subprocess.run(
        [sys.executable, "-m", "mmr5_lab.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = set(re.findall(r"^    (\w+)(?: |$)", shown, re.MULTILINE))
    named = set(re.findall(r"\bmmr5 (\w+)", code_in_readme()))
    assert "demo" in named
    assert named <= commands


def test_readme_names_only_make_targets_that_exist():
    named = set(re.findall(r"^make (\w+)", code_in_readme(), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= make_targets()


@each_notebook
def test_notebook_has_one_parameters_cell(path):
    tagged = [cell for cell in cells(path, "code") if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1


@each_notebook
def test_notebook_runs_on_any_machine(path):
    """papermill and JupyterLab find the kernel by this name."""
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3"


@each_notebook
def test_notebook_is_committed_without_results(path):
    for number, cell in enumerate(cells(path, "code")):
        assert cell["outputs"] == [], f"code cell {number}"
        assert cell["execution_count"] is None, f"code cell {number}"


@each_notebook
def test_notebook_cells_are_short(path):
    """The parameters aside: they take a line each."""
    for number, cell in enumerate(cells(path, "code")):
        if "parameters" in cell["metadata"].get("tags", []):
            continue
        lines = len("".join(cell["source"]).splitlines())
        assert lines <= LONGEST_CELL, f"code cell {number} has {lines} lines"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_default_names_the_folder_of_runs(path):
    """It grows while a notebook runs, whose name is a hash of what its parameters name."""
    named = [value for value in default_parameters(path).values() if isinstance(value, str)]
    assert not [value for value in named if value.strip("/") == "runs"]


def assigned(cell: dict) -> set[str]:
    """The names that a code cell binds, but for those inside functions, comprehensions and imports."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(re.sub(r"(?m)^%.*$", "", "".join(cell["source"])))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            waiting += ast.iter_child_nodes(node)
    return names


@each_notebook
def test_a_name_means_one_thing_in_a_notebook(path):
    """A cell that binds an earlier cell's name changes what later cells, and cells that are run again, work with."""
    code = [cell for cell in cells(path, "code") if "solution" not in cell["metadata"].get("tags", [])]
    names = [name for cell in code for name in assigned(cell)]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
