"""Runs of a sweep reach a tracker with their parameters and figures, once."""

import pytest

from mmr5_lab.experiments.grids import plan_sweep, read_grid
from mmr5_lab.experiments.scheduler import Processes, run_sweep
from mmr5_lab.experiments.trackers import Tracked

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)


def test_runs_are_logged_once_with_parameters_and_figures(toy):
    (toy / "grid.yaml").write_text("notebooks: [01_data_construction]\naxes: [{X: [3]}]\n")
    tracked = Tracked("tensorboard")
    sweep = run_sweep(plan_sweep(read_grid("grid.yaml")), Processes(1), tracked)
    [folder] = sweep.states
    tracked(sweep)
    [log] = {path.parent for path in (folder / "tensorboard").glob("events*")}
    events = event_accumulator.EventAccumulator(str(log)).Reload()
    assert [event.value for event in events.Scalars("square")] == [9.0]
    assert any("01_data_construction.X: '3'" in path.read_text() for path in folder.rglob("hparams.yml"))


def test_a_tracker_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no tracker 'excel': choose one of trackio, tensor"):
        Tracked("excel")
