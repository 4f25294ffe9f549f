"""Notebooks run with checked parameters; a finished run is found again."""

import pytest

from mmr5_lab.experiments.notebooks import (
    NotebookError,
    checked_parameters,
    default_parameters,
    parents,
    read_profile,
    run_folder,
    run_notebook,
)
from mmr5_lab.experiments.runs import CHAIN, project_root, read_run
from mmr5_lab.files import results

NOTEBOOKS = project_root() / "notebooks"


def test_defaults_are_read_from_the_parameters_cell():
    defaults = default_parameters(NOTEBOOKS / "01_data_construction.ipynb")
    assert defaults["NUM_CANDIDATES"] == 5
    assert defaults["SPLITS"] == ["sft", "rl", "eval"]


def test_a_notebook_names_the_runs_it_takes_by_its_parameters():
    assert parents(NOTEBOOKS / "01_data_construction.ipynb") == {}
    assert parents(NOTEBOOKS / "03_grpo.ipynb") == {"01_data_construction": "DATA_RUN", "02_sft": "SFT_RUN"}


def test_unknown_names_and_wrong_types_are_errors():
    notebook = NOTEBOOKS / "02_sft.ipynb"
    with pytest.raises(NotebookError, match="has no parameter LERNING_RATE"):
        checked_parameters(notebook, {"LERNING_RATE": 1.0})
    with pytest.raises(NotebookError, match="BATCH_SIZE = '8' is a str, expected int"):
        checked_parameters(notebook, {"BATCH_SIZE": "8"})
    assert checked_parameters(notebook, {"EPOCHS": 2})["EPOCHS"] == 2


@pytest.mark.parametrize("profile", sorted((NOTEBOOKS / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_profiles_name_notebooks_of_the_chain_and_their_parameters(profile):
    parameters = read_profile(profile)
    assert list(parameters) == list(CHAIN)
    for notebook, given in parameters.items():
        checked_parameters(NOTEBOOKS / f"{notebook}.ipynb", given)


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
