"""What several test files need: the smallest model of the real class, what to train it on, one trained stage, and a
project with notebooks of seconds."""

from pathlib import Path

import nbformat
import pytest
from helpers.architectures import BUILD, save
from helpers.material import SFT, TINY, Material
from nbformat.v4 import new_code_cell, new_notebook

import mmr5_lab
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.mini.model import build_model, build_processor
from mmr5_lab.reranking.local import Reranker


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    processor = build_processor()
    build_model(processor, **TINY).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=BUILD)
def architecture(request, tmp_path_factory) -> Reranker:
    """A tiny model of each architecture, which encodes for itself until it is given a page cache."""
    folder = save(request.param, tmp_path_factory.mktemp(request.param))
    return Reranker.from_pretrained(folder, max_new_tokens=12, page_cache_bytes=0)


TOYS = {  # notebook -> its parameters and what it does
    "01_data_construction": (
        'X: int = 1  # a number\nHOW: str = ""  # to fail: "raise", or "die" as the system kills\nSLEEP: float = 0.0',
        "import os, time\n"
        "open(run.folder / 'begun.txt', 'a').write('x')\n"
        "time.sleep(SLEEP)\n"
        "if HOW == 'die': os.kill(os.getpid(), 9)\n"
        "if HOW == 'long': raise ValueError('x' * 100_000)\n"
        "if HOW == 'raise': raise ValueError('no such page')\n"
        "print('squared', X)\n"
        "run.finish({'square': X * X, 'threads': os.environ.get('OMP_NUM_THREADS')})",
    ),
    "02_sft": (
        'DATA_RUN: str = ""  # run of 01\nRATE: float = 1.0\nSEED: int = 0',
        "from mmr5_lab import results\nrun.finish({'score': RATE * results(DATA_RUN)['square'] + SEED})",
    ),
    "hang": ("SECONDS: float = 600.0", "import time\ntime.sleep(SECONDS)\nrun.finish({})"),
    "eat": ("BYTES: int = 1500000000", "x = b'x' * BYTES\nimport time\ntime.sleep(600)\nrun.finish({})"),
}


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A project of tiny notebooks with this package, as the working folder."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "mmr5_lab").symlink_to(Path(mmr5_lab.__file__).parent)
    for name, (parameters, body) in TOYS.items():
        notebook = new_notebook(
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        )
        opening = f"from mmr5_lab.experiments.runs import open_run\n\nrun = open_run({name!r}, globals())"
        notebook.cells = [
            new_code_cell(f'{parameters}\nRUN: str = ""', metadata={"tags": ["parameters"]}),
            new_code_cell(opening),
            new_code_cell(body),
        ]
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def material(tiny_model, tmp_path_factory) -> Material:
    from mmr5_lab.mini.teacher import EvidenceTeacher
    from mmr5_lab.retrieval.retrieve import retrieve
    from mmr5_lab.traces.construction import make_traces, training_candidates

    folder = tmp_path_factory.mktemp("material")
    corpus = make_corpus(folder / "corpus", seed=4, splits={"sft": (2, 5), "rl": (2, 3)}).split("sft")
    candidates = training_candidates(corpus, retrieve(corpus, top_k=5))
    make_traces(corpus, candidates, EvidenceTeacher(corpus), folder / "traces.jsonl")
    return Material(tiny_model, folder)


@pytest.fixture(scope="session")
def sft(material, tmp_path_factory) -> Path:
    """A folder in which SFT has finished."""
    from mmr5_lab.training.stages import train_sft

    folder = tmp_path_factory.mktemp("sft")
    train_sft(material.model, material.traces, folder, **SFT)
    return folder
