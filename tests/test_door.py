"""The public door: every promised name comes from the package itself, which loads nothing heavy by itself."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmr5_lab

# What checks from outside import: these names and their meanings stay.
PROMISED = [
    *("QueryReranker", "Reranker", "RemoteReranker", "Windows", "Consensus"),
    *("load_corpus", "build_corpus", "retrieve", "read_trec", "write_trec", "build_messages", "parse_ranking"),
    *("rank_reward", "format_reward", "ndcg_reward", "released_rank_reward", "released_format_reward"),
    *("train_sft", "train_grpo", "recall_at_k", "evaluate", "compare", "reasoning_browser"),
]


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_name_comes_from_the_package(name):
    assert name in dir(mmr5_lab)
    assert callable(getattr(mmr5_lab, name))


def test_every_name_of_the_door_has_its_home():
    for module, names in mmr5_lab.HOMES.items():
        home = importlib.import_module(f"mmr5_lab.{module}")
        for name in names:
            value = getattr(mmr5_lab, name)
            assert value is (getattr(home, name, None) or home), name
    assert mmr5_lab.__all__ == sorted(set(mmr5_lab.__all__)), "no name has two homes"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mmr5_lab' has no attribute 'Rernaker'"):
        mmr5_lab.Rernaker  # noqa: B018
    with pytest.raises(ImportError, match="Rernaker"):
        from mmr5_lab import Rernaker  # noqa: F401


def test_the_package_is_imported_at_once_and_loads_no_library():
    """In a process of its own, in processor time: other tests may take the cores."""
    code = (
        "import sys, time; start = time.process_time(); import mmr5_lab; took = time.process_time() - start\n"
        "print(took, *(name for name in ('torch', 'pandas', 'numpy', 'transformers') if name in sys.modules))"
    )
    root = Path(mmr5_lab.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    assert loaded == []
    assert float(seconds) < 0.1


def test_threads_wait_without_spinning_in_every_process_that_loads_the_package(monkeypatch):
    """Set before PyTorch is loaded; a value of the user's own stays, and processes that are started inherit it."""
    code = "import sys, os, mmr5_lab; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    nested = f"import mmr5_lab, subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for program in (code, nested):
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert run.stdout.split() == ["PASSIVE", "False"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["ACTIVE", "False"]


def test_notebooks_load_the_package_before_pytorch():
    """A kernel reads the policy when it loads PyTorch."""
    for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        source = "\n".join("".join(cell["source"]) for cell in cells)
        loads = [
            m[0] for m in re.finditer(r"^(?:import|from) (?:mmr5_lab|torch|transformers|trl)\b", source, re.MULTILINE)
        ]
        assert loads, path
        assert loads[0].endswith("mmr5_lab"), path
