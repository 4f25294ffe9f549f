"""Send finished runs of a sweep to an experiment tracker: trackio (local, offline), mlflow, tensorboard or wandb.

    run_sweep(plan, workers, Tracked("trackio"))

Each run is logged once, with its parameters and the numbers of its results, by accelerate's trackers. Where mlflow and
wandb send theirs is for their own settings (MLFLOW_TRACKING_URI, `wandb offline`).
"""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from mmr5_lab.experiments.history import flat, settings_of
from mmr5_lab.experiments.runs import Run, read_run
from mmr5_lab.experiments.scheduler import Sweep
from mmr5_lab.training.monitoring import PROJECT, check_tracker


class Tracked:
    """Log a sweep's runs as they finish; `scheduler.run_sweep` calls it with the sweep.

    Raises ValueError for a tracker that is not known or not installed.
    """

    def __init__(self, tracker: str):
        check_tracker(tracker)
        self.tracker = tracker
        self._logged: set[Path] = set()

    def __call__(self, sweep: Sweep) -> None:
        for folder, state in sweep.states.items():
            if state.state == "done" and folder not in self._logged:
                self._logged.add(folder)
                self._log(read_run(folder))

    def _log(self, run: Run) -> None:
        """Log one run: the parameters of its whole lineage as configuration, the numbers of its results as one step."""
        name = f"{run.folder.parent.name} {run.folder.name}"
        options: dict[str, dict[str, Any]] = {
            "trackio": {"run_name": PROJECT, "name": name, "space_id": None, "resume": "allow"},
            "tensorboard": {"run_name": "tensorboard", "logging_dir": run.folder},
            "wandb": {"run_name": PROJECT, "name": name, "id": run.folder.name, "resume": "allow"},
            "mlflow": {"experiment_name": PROJECT, "run_name": name},
        }
        numbers = {name: float(v) for name, v in flat(run.results or {}).items() if type(v) in (int, float)}
        PartialState()  # the trackers ask it whether they are the main process
        log: Any = LOGGER_TYPE_TO_CLASS[self.tracker](**options[self.tracker])
        log.start()
        log.store_init_configuration({key: str(value) for key, value in settings_of(run).items()})
        log.log(numbers, step=0)
        log.finish()
