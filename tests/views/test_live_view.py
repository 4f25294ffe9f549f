"""The live view of a sweep: one place that is updated, names escaped, the whole in words too."""

import json

from IPython.core.interactiveshell import InteractiveShell

from mmr5_lab.experiments.grids import plan_sweep, read_grid
from mmr5_lab.experiments.notebooks import run_notebook
from mmr5_lab.experiments.scheduler import State, Sweep
from mmr5_lab.files import results
from mmr5_lab.views.live_view import LiveView, as_html


def sweep_of(toy, **states) -> Sweep:
    (toy / "grid.yaml").write_text(f"notebooks: [01_data_construction]\naxes: [{{X: {list(range(len(states)))}}}]\n")
    plan = plan_sweep(read_grid("grid.yaml"))
    found = {}
    for job, (state, message) in zip(plan.jobs.values(), states.items(), strict=True):
        found[job.folder] = State(job, state, message, seconds=7.4)
    return Sweep(plan, found, 2, dict.fromkeys(found, 60.0))


def test_what_runs_comes_first_and_reasons_are_escaped(toy):
    sweep = sweep_of(toy, done="", waiting="", failed="ValueError: <b>", running="")
    running = next(folder for folder, state in sweep.states.items() if state.state == "running")
    running.mkdir(parents=True)
    (running / "progress.json").write_text(json.dumps({"what": "SFT step", "done": 3, "total": 40}))
    page = as_html(sweep)
    assert "2/4 runs, 1 running, 1 failed, about 53 s left" in page  # 60 s, and 60 s less 7.4, on two cores: the longer
    assert '<meter min="0" max="4" value="2">2 of 4</meter>' in page
    assert "SFT step 3/40" in page
    assert "ValueError: &lt;b&gt;" in page
    states = ["running", "failed", "done", "waiting"]
    assert sorted(states, key=page.rindex) == states


def test_the_view_is_updated_in_place(toy, capsys):
    InteractiveShell.instance()
    view = LiveView()
    shown = []
    view._handle.update = lambda page: shown.append(page.data)
    view(sweep_of(toy, running=""))
    view(sweep_of(toy, running=""))  # within a second: not again
    view(sweep_of(toy, done=""))  # but the end is shown
    assert ["1/1 runs" in page for page in shown] == [False, True]


def test_notebook_08_runs_top_to_bottom(tmp_path):
    given = {"CANDIDATES": [5], "MAX_TRACES": 5, "ROOT": str(tmp_path / "runs")}
    folder = run_notebook("08_sweep", given, tmp_path)
    found = results(folder)
    assert (found["runs"], found["failed"]) == (2, 0)
    assert 0.5 < found["ceiling"] < 1
    page = (folder / "notebook.html").read_text()
    assert "2/2 runs" in page
    assert "No description has been provided" not in page
