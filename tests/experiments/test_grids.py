"""Grid files are checked before anything starts, and come to the right runs."""

import json

import pytest
import yaml

from mmr5_lab.experiments.grids import GridError, as_text, plan_sweep, read_grid, time_left
from mmr5_lab.experiments.runs import project_root

BOTH = ["01_data_construction", "02_sft"]
SHIPPED = sorted((project_root() / "notebooks" / "sweeps").glob("*.yaml"))


def grid(folder, told):
    path = folder / "grid.yaml"
    path.write_text(told if isinstance(told, str) else yaml.safe_dump(told, sort_keys=False))
    return read_grid(path)


def finish(job):
    """What a finished run leaves."""
    job.folder.mkdir(parents=True)
    manifest = {"hash": job.folder.name, "parameters": job.parameters, "started": "2026-01-01T00:00:00+0000"}
    (job.folder / "manifest.json").write_text(json.dumps(manifest))
    (job.folder / "results.json").write_text("{}")


def test_axes_multiply_lists_of_one_axis_go_together(toy):
    axes = [{"X": [2, 3]}, {"02_sft.RATE": [0.5, 1.5], "02_sft.SEED": [7, 8]}]
    plan = plan_sweep(grid(toy, {"notebooks": BOTH, "axes": axes, "without": [{"X": 3, "02_sft.RATE": [1.5]}]}))
    assert [point.name for point in plan.grid.points] == [
        "X 2, RATE 0.5, SEED 7",
        "X 2, RATE 1.5, SEED 8",
        "X 3, RATE 0.5, SEED 7",
    ]
    jobs = list(plan.jobs.values())
    assert [job.notebook for job in jobs].count("01_data_construction") == 2, "work that is shared is done once"
    first, second = jobs[:2]
    assert second.takes == (first.folder,)
    assert second.parameters["DATA_RUN"] == f"runs/01_data_construction/{first.folder.name}"
    assert (second.parameters["RATE"], second.parameters["SEED"], second.parameters["RUN"]) == (0.5, 7, "")


def test_profile_parameters_and_axes_override_each_other_in_this_order(toy):
    (toy / "p.yaml").write_text("01_data_construction: {X: 5, SLEEP: 3}\n02_sft: {RATE: 9.0}\n03_grpo: {}\n")
    told = {"notebooks": BOTH, "profile": "p.yaml", "parameters": {"02_sft": {"RATE": 8.0, "SEED": 1}}}
    [data, sft] = plan_sweep(grid(toy, told | {"axes": [{"SEED": [4]}]})).jobs.values()
    assert (data.parameters["X"], data.parameters["SLEEP"]) == (5, 3.0)
    assert (sft.parameters["RATE"], sft.parameters["SEED"]) == (8.0, 4)


def test_cases_have_names_take_fewer_notebooks_and_may_be_skipped(toy):
    cases = {"data only": {"notebooks": BOTH[:1]}, "both": {}, "7B": {"RATE": 2.0, "skip": "needs a GPU"}}
    plan = plan_sweep(grid(toy, {"notebooks": BOTH, "axes": [{"what": cases}, {"SEED": [0, 1]}]}))
    assert [job.notebook for job in plan.jobs.values()] == [BOTH[0], BOTH[1], BOTH[1]], "two seeds of 02"
    text = as_text(plan)
    assert "6 combinations (2 skipped), 3 runs, 0 finished before" in text
    assert "skipped: what 7B, SEED 0: needs a GPU" in text


def test_finished_runs_are_known_and_tell_the_time(toy):
    told = {"notebooks": BOTH, "axes": [{"RATE": [1.0, 2.0]}]}
    plan = plan_sweep(grid(toy, told))
    assert "time: unknown" in as_text(plan)
    finish(next(iter(plan.jobs.values())))
    plan = plan_sweep(grid(toy, told))
    assert [job.done for job in plan.jobs.values()] == [True, False, False]
    assert "3 runs, 1 finished before" in as_text(plan)


def test_time_left_is_that_of_the_longest_chain_or_of_all_work(toy):
    plan = plan_sweep(grid(toy, {"notebooks": BOTH, "axes": [{"RATE": [1.0, 2.0, 3.0]}]}))
    seconds = dict(zip(plan.jobs, [10.0, 30.0, 30.0, 30.0], strict=True))
    assert time_left(plan.jobs.values(), seconds, cores=1) == (100.0, True)
    assert time_left(plan.jobs.values(), seconds, cores=8) == (40.0, True)
    assert time_left(plan.jobs.values(), seconds | {next(iter(plan.jobs)): None}, cores=1) == (90.0, False)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("notebooks: [01_data_construction\n", "is not YAML"),
        ("just words", "must map names to values"),
        ({"notebook": BOTH}, "unknown 'notebook'; a grid has about, notebooks"),
        ({}, "notebooks must list what to run"),
        ({"notebooks": ["01_data"]}, "no notebook '01_data'; there are 01_data_construction, 02_sft, eat, hang"),
        ({"notebooks": BOTH, "axes": [{"RAET": [1.0]}]}, "none of 01_data_construction, 02_sft has a parameter RAET"),
        ({"notebooks": BOTH, "axes": [{"02_sft.RAET": [1.0]}]}, "02_sft.ipynb has no parameter RAET; it has DATA_RUN"),
        ({"notebooks": BOTH, "axes": [{"03_grpo.BETA": [1.0]}]}, "03_grpo is not among its notebooks"),
        ("notebooks: [01_data_construction, 02_sft]\naxes: [{RATE: [1e-3]}]", "write 1.0e-3"),
        ({"notebooks": BOTH, "axes": [{"X": [1, "2"]}]}, "X = '2' is a str, expected int"),
        ({"notebooks": BOTH, "axes": [{"X": 3}]}, "the axis X needs a list of values"),
        ({"notebooks": BOTH, "axes": [{"X": [1, 2], "RATE": [1.0]}]}, "of one length: X has 2, RATE has 1"),
        (
            {"notebooks": BOTH, "axes": [{"X": [1]}, {"01_data_construction.X": [2]}]},
            "01_data_construction is set by two axes",
        ),
        ({"notebooks": BOTH, "axes": [{"X": [1]}, {"X": [2]}]}, "X stands in two axes"),
        ({"notebooks": BOTH, "axes": [{"X": [1]}], "without": [{"Y": 1}]}, "without Y: no axis has that name"),
        ({"notebooks": BOTH, "axes": [{"X": [1]}], "without": [{"X": 1}]}, "no combination is left"),
        ({"notebooks": BOTH, "parameters": {"03_grpo": {}}}, "parameters of 03_grpo, which is not among"),
        ({"notebooks": BOTH, "parameters": {"02_sft": {"RAET": 1}}}, "has no parameter RAET"),
        ({"notebooks": BOTH, "profile": "absent.yaml"}, "there is no profile"),
        ("notebooks: [02_sft]\nabout: a\nabout: b\n", "about stands twice"),
        ("notebooks: [02_sft]\naxes:\n- RATE: [1.0]\n  RATE: [2.0]\n", "RATE stands twice"),
        ("notebooks: [01_data_construction]\naxes: [{SLEEP: [.nan]}]", "SLEEP = nan is not a finite number"),
        ({"notebooks": BOTH, "axes": [{"SEED": [0, -1]}]}, "SEED = -1 must be at least 0"),
        ({"notebooks": BOTH, "cores": 0}, "cores is 0, expected a number of at least 1"),
        ({"notebooks": BOTH, "timeout": {"03_grpo": 5}}, "timeout of 03_grpo: not among its notebooks"),
        ({"notebooks": BOTH[:1], "axes": [{"a": {"b": {"notebooks": BOTH}}}]}, "must also stand in the grid's own"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said(toy, told, message):
    with pytest.raises(GridError, match=r"grid.yaml.*") as error:
        grid(toy, told)
    assert message in str(error.value)


def test_a_parent_run_is_never_just_the_newest(toy):
    with pytest.raises(GridError, match=r"02_sft needs DATA_RUN \(a run of 01_data_construction\): put that notebook"):
        plan_sweep(grid(toy, {"notebooks": ["02_sft"]}))
    [job] = plan_sweep(
        grid(toy, {"notebooks": ["02_sft"], "parameters": {"02_sft": {"DATA_RUN": "none"}}})
    ).jobs.values()
    assert job.takes == ()


def test_a_grid_file_that_is_not_there_is_named():
    with pytest.raises(GridError, match="there is no grid file absent"):
        read_grid("absent.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_grids_fit_the_notebooks(path, tmp_path):
    plan = plan_sweep(read_grid(path), tmp_path)
    assert plan.jobs
    assert plan.grid.about
