"""Notebooks run with checked parameters; a finished run is found again."""

import pytest

from mmr5_lab.experiments.notebooks import run_folder, run_notebook
from mmr5_lab.experiments.parameters import NotebookError
from mmr5_lab.experiments.runs import read_run
from mmr5_lab.files import results


def test_notebook_01_runs_top_to_bottom_and_is_reused(tmp_path):
    folder = run_notebook("01_data_construction", {"MAX_TRACES": 5}, tmp_path)
    found = results(folder)
    assert found["traces"] == 5
    assert found["bm25_micro_r1"]["eval"] == pytest.approx(0.5341, abs=1e-4)
    assert "No description has been provided" not in (folder / "notebook.html").read_text(), "figures are described"
    stamp = (folder / "results.json").stat().st_mtime_ns
    assert run_notebook("01_data_construction", {"MAX_TRACES": 5}, tmp_path) == folder
    assert (folder / "results.json").stat().st_mtime_ns == stamp


def test_a_notebook_without_a_named_parent_takes_the_newest_and_is_found_again(toy):
    data = run_notebook("01_data_construction", {"X": 3})
    folder = run_notebook("02_sft", {})
    assert results(folder)["score"] == 9
    named = read_run(folder).manifest["parameters"]["DATA_RUN"]
    assert named == str(data.relative_to(toy))
    assert run_folder("02_sft", {"DATA_RUN": named}) == folder


def test_a_run_of_the_chain_has_the_folder_of_its_parameters(toy):
    with pytest.raises(NotebookError, match="RUN cannot be set here: a run's folder follows from its parameters"):
        run_notebook("01_data_construction", {"RUN": "mine"})
    assert not (toy / "runs").exists()
