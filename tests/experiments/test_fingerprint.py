"""What a run depends on: an edit of code that a notebook can reach changes its hash, any other edit does not."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mmr5_lab.experiments import fingerprint
from mmr5_lab.experiments.fingerprint import code_hash, data_hashes, reached
from mmr5_lab.experiments.runs import project_root

NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))
PACKAGE = {
    "__init__.py": "import importlib\nHOMES = {'ranker': ['Ranker'], 'mini.draw': ['draw']}\n"
    "def __getattr__(name):\n    return getattr(importlib.import_module(name), name)\n",
    "ranker.py": "import mmr5_lab.pages as pages\n",
    "pages.py": "from mmr5_lab import colours\n",
    "colours.py": "FILE = 'words.txt'",
    "training.py": "def train():\n    from mmr5_lab.ranker import Ranker\n",
    "launch.py": "COMMAND = ['python', '-m', 'mmr5_lab.training']\n",
    "plugins.py": "import importlib\nimportlib.import_module(input())\n",
    "typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mmr5_lab import launch\nmodel.eval()\n",
    "mini/__init__.py": "from mmr5_lab.colours import RED\n",
    "mini/draw.py": "",
    "mini/any.css": "",
    "words.txt": "",
}


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    for name, source in PACKAGE.items():
        path = tmp_path / "mmr5_lab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path / "mmr5_lab")
    return tmp_path / "mmr5_lab"


def notebook(folder: Path, *cells: str, prose: str = "") -> Path:
    path = folder / "n.ipynb"
    tagged = new_code_cell("X = 1", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[tagged, new_markdown_cell(prose), *map(new_code_cell, cells)]), path)
    return path


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("from mmr5_lab import pages", "colours pages"),
        ("from mmr5_lab.ranker import Ranker", "colours pages ranker"),
        ("%matplotlib inline\ndef late():\n    import mmr5_lab.colours as c", "colours"),
        ("from mmr5_lab import Ranker", "colours pages ranker"),  # a name of the package itself
        ("from mmr5_lab import training", "colours pages ranker training"),  # in a function
        ("from mmr5_lab.launch import COMMAND", "colours launch pages ranker training"),  # as a process
        ("from mmr5_lab.mini import draw", "colours mini/__init__ mini/draw"),  # its package runs first
        ("from mmr5_lab.typed import x", "typed"),
        ("import json", ""),
    ],
)
def test_code_is_followed_from_the_notebooks_imports(package, tmp_path, code, files):
    found = [path.relative_to(package).as_posix() for path in reached(notebook(tmp_path, code))]
    others = ["words.txt"] * bool(files) + ["mini/any.css"] * ("mini" in files)  # with the modules beside them
    assert sorted(found) == sorted([*(f"{name}.py" for name in files.split()), *others])


@pytest.mark.parametrize(
    "code",
    [
        "from mmr5_lab import plugins",
        "%run other.py",
        "!mmr5 ask",
        "from mmr5_lab import pages\nexec(x)",
        "import mmr5_lab.colours",  # mmr5_lab.Ranker is within reach
        "from mmr5_lab import *",
    ],
)
def test_all_of_the_package_counts_where_code_cannot_be_followed(package, tmp_path, code):
    assert len(reached(notebook(tmp_path, code))) == len(PACKAGE)
    assert len(reached(tmp_path / "absent.ipynb")) == len(PACKAGE)


def test_only_what_matters_changes_the_hash(package, tmp_path):
    before = code_hash(notebook(tmp_path, "from mmr5_lab import pages"))
    assert code_hash(notebook(tmp_path, "from mmr5_lab import pages", prose="told better")) == before
    (package / "training.py").write_text("x = 1")
    assert code_hash(tmp_path / "n.ipynb") == before
    (package / "colours.py").write_text("RED = 1")
    edited = code_hash(tmp_path / "n.ipynb")
    assert edited != before
    assert code_hash(notebook(tmp_path, "from mmr5_lab import pages\npages.draw()")) not in (before, edited)


def test_exercises_change_no_run(package, tmp_path):
    """Who solves one, or gets a notebook without the solutions, finds the runs again that were made before."""
    path = notebook(tmp_path, "from mmr5_lab import pages")
    before = code_hash(path), reached(path)
    content = nbformat.read(path, as_version=4)
    for tag in ("exercise", "solution"):
        content.cells.append(new_code_cell("from mmr5_lab import training", metadata={"tags": [tag]}))
    nbformat.write(content, path)
    assert (code_hash(path), reached(path)) == before


def test_what_a_notebook_imports_is_among_what_it_reaches():
    """The shipped notebook's own import lines, carried out: Python loads nothing of the package that we missed."""
    path = project_root() / "notebooks" / "05_evaluation.ipynb"
    nodes = [node for cell in fingerprint._code_cells(path) for node in ast.walk(fingerprint._parsed(cell))]
    lines = [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    shown = "import sys; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('mmr5_lab')))"
    code = "\n".join([*lines, shown])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=project_root())
    loaded = {Path(file) for file in done.stdout.split()}
    assert len(loaded) > 5
    assert loaded - {project_root() / "mmr5_lab" / "__init__.py"} <= set(reached(path))


def test_the_command_line_and_sweeps_are_out_of_every_notebooks_reach():
    for path in NOTEBOOKS[:5]:
        assert {"cli", "grids", "scheduler", "history", "chain"}.isdisjoint(file.stem for file in reached(path)), (
            path.stem
        )


def test_data_is_known_by_its_content(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "pages").write_bytes(b"a" * 10)
    given = {"CORPUS": "corpus", "SPLITS": ["eval"], "TOP_K": 5, "MODEL": "Qwen/Qwen2.5-VL-7B-Instruct", "EMPTY": ""}
    before = data_hashes(given, tmp_path)
    assert list(before) == ["CORPUS"]
    shutil.copytree(corpus, tmp_path / "copy")
    assert data_hashes({"CORPUS": "copy"}, tmp_path) == before
    (corpus / "vectors").mkdir()
    (corpus / "vectors" / "vectors.f16").write_bytes(b"c")
    assert data_hashes(given, tmp_path) == before, "encoding a corpus's pages does not make it another corpus"
    (corpus / "pages").write_bytes(b"a" * 9 + b"b")
    assert data_hashes(given, tmp_path) != before


def test_runs_are_known_by_their_own_hash(tmp_path):
    model = tmp_path / "runs" / "02_sft" / "0123456789ab" / "model"
    model.mkdir(parents=True)
    assert data_hashes({"MODEL": str(model), "SFT_RUN": "runs/02_sft/0123456789ab"}, tmp_path) == {}


def test_of_a_large_file_blocks_all_over_it_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_FILE", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLES", 5)
    monkeypatch.setattr(fingerprint, "BLOCK", 100)
    seen = set()
    for changed in (None, 0, 1999, 990):
        content = bytearray(2000)
        if changed is not None:
            content[changed] = 1
        (tmp_path / "weights").write_bytes(content)
        seen.add(data_hashes({"MODEL": "weights"}, tmp_path)["MODEL"])
    assert len(seen) == 4
