"""Notebook 01 on a folder of PDFs: what the later notebooks read is there, and a corpus without questions says so."""

import json
import shutil

import pytest
from helpers.pdfs import text_pdf

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import read_trec
from mmr5_lab.experiments.notebooks import NotebookFailedError, run_notebook
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.files import results
from mmr5_lab.traces.construction import read_traces


@pytest.fixture
def pdfs(tmp_path, request):
    folder = tmp_path / f"pdfs-of-{tmp_path.parent.name}"
    folder.mkdir()
    text_pdf(folder / "a.pdf", "the staff of 2015", "the revenue of 2016", "about us")
    yield folder
    shutil.rmtree(project_root() / "runs" / "corpora" / folder.name)


def test_pdfs_become_traces(pdfs, tmp_path):
    question = {"Q": "What was the revenue in 2016?", "A": "", "page_id": [1], "type": "", "layout_mapping": []}
    record = {"doc_name": "a.pdf", "domain": "Brochure", "questions": [question]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(record) + "\n")
    given = {"PDF_FOLDER": str(pdfs), "TOP_K": 3, "NUM_CANDIDATES": 3, "SHUFFLES": 1, "EXPORT": ["vlm-r1", "datasets"]}
    with pytest.raises(NotebookFailedError, match="has no questions: label some"):
        run_notebook("01_data_construction", given, tmp_path)
    run = run_notebook("01_data_construction", {**given, "ANNOTATIONS": str(tmp_path / "questions.jsonl")}, tmp_path)
    corpus = load_corpus(project_root() / "runs" / "corpora" / pdfs.name)
    assert read_trec(run / "eval.trec", corpus).pages["a.pdf:q0"][0] == 1
    [trace] = read_traces(run / "traces.jsonl")
    assert trace["teacher"] == "quotes"
    assert "the revenue of 2016" in trace["messages"][-1]["content"]
    assert results(run)["traces"] == 1
    assert (run / "export" / "datasets" / "README.md").is_file()
    assert "Teacher: quotes." in (run / "README.md").read_text()
