"""The order of the rooms: a room imports only from those below it, and the contract in pyproject.toml sees if not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is not installed")

ROOT = Path(__file__).resolve().parents[2]
LINT = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


def lint(folder: Path) -> subprocess.CompletedProcess:
    """What `make lint` runs, in a folder with a package and a pyproject.toml."""
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(ROOT / "mmr5_lab", tmp_path / "mmr5_lab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_rooms_import_only_from_rooms_below(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("corpus/ids.py", "from mmr5_lab.retrieval.bm25 import bm25_scores"),
        ("rewards.py", "def late():\n    from mmr5_lab.training import stages"),
        ("views/plots.py", "from mmr5_lab.mini.model import build_model"),
    ],
)
def test_an_arrow_that_runs_back_breaks_the_contract(copy, module, line):
    path = copy / "mmr5_lab" / module
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1
    assert f"mmr5_lab.{module.removesuffix('.py').replace('/', '.')} -> " in done.stdout


def test_a_new_room_must_take_its_place_in_the_order(copy):
    (copy / "mmr5_lab" / "attic.py").write_text("")
    done = lint(copy)
    assert done.returncode == 1
    assert "attic" in done.stdout


def test_the_first_level_has_at_most_fourteen_rooms():
    level = [path.stem for path in (ROOT / "mmr5_lab").iterdir() if path.suffix == ".py" or path.is_dir()]
    rooms = set(level) - {"__init__", "__pycache__", "cli", "mini"}
    assert len(rooms) <= 14, sorted(rooms)
