"""Grid files: many runs of a notebook, or of a chain of notebooks, from one YAML file.

    grid = read_grid("notebooks/sweeps/learning_rate_and_rank.yaml")
    plan = plan_sweep(grid)         # everything is checked here; nothing has started
    print(as_text(plan))

`scheduler.run_sweep` carries a plan out. A grid file says:

    about: what the sweep is for
    notebooks: [01_data_construction, 02_sft]   # in this order; each takes the earlier ones' runs
    profile: notebooks/profiles/mini.yaml       # parameters to start from; may be left out
    parameters:                                 # of all runs, over the profile
      02_sft: {EPOCHS: 1.0}
    axes:                                       # every value of one with every value of the others
      - 02_sft.LEARNING_RATE: [1.0e-3, 2.0e-3]
      - 02_sft.LORA_RANK: [8, 32]               # several names in one axis go together, value by value
        02_sft.LORA_ALPHA: [16, 64]
      - SEED: [0, 1, 2]                         # without a notebook: of each that has such a parameter
      - start:                                  # cases with names; "notebooks" and "skip" may stand in each
          base: {02_sft.MODEL: data/mini/base}
          7B: {02_sft.MODEL: Qwen/Qwen2.5-VL-7B-Instruct, skip: needs a GPU}
    without:                                    # combinations that are left out
      - {02_sft.LORA_RANK: 8, SEED: [1, 2]}
    cores: 1                                    # of each run; also {02_sft: 2}
    memory: 3                                   # GB of each run; one that takes more is ended
    timeout: 60                                 # minutes
    gpus: 0                                     # of each run, on Ray

Work that several combinations share (the same notebook, parameters and parents) is done once.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmr5_lab.experiments.history import runs_table
from mmr5_lab.experiments.notebooks import is_done, run_folder
from mmr5_lab.experiments.parameters import (
    NotebookError,
    checked_parameters,
    default_parameters,
    read_profile,
    read_yaml,
)
from mmr5_lab.experiments.runs import CHAIN, inside_project, parents, project_root, source_of

KEYS = ("about", "notebooks", "profile", "parameters", "axes", "without", "cores", "memory", "timeout", "gpus")
LIMITS = {"cores": 1, "memory": 0, "timeout": 0, "gpus": 0}  # 0: no limit, none asked for
NOT_TAKEN = "none"  # for a parent run that a notebook does without


class GridError(ValueError):
    """A grid file that cannot be carried out; the message names file, place and what to do."""


@dataclass(frozen=True)
class Point:
    """One combination: names and values of the axes as written, the notebooks it takes, and why it is skipped ("")."""

    labels: dict[str, Any]
    settings: dict[str, Any]
    notebooks: tuple[str, ...]
    skip: str = ""

    @property
    def name(self) -> str:
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.labels.items()) or "single run"


@dataclass(frozen=True)
class Grid:
    """A grid file that was read and checked."""

    path: Path
    about: str
    notebooks: tuple[str, ...]
    parameters: dict[str, dict[str, Any]]  # of each notebook, profile and grid together
    points: tuple[Point, ...]
    limits: dict[str, dict[str, float]]  # cores, memory (GB), timeout (minutes), gpus -> notebook -> value


@dataclass(frozen=True)
class Job:
    """One run to be made: a notebook with all its parameters, and the folders of the runs that it takes."""

    notebook: str
    parameters: dict[str, Any] = field(repr=False)
    folder: Path
    takes: tuple[Path, ...]
    limits: dict[str, float] = field(repr=False)
    done: bool  # finished before

    def work(self) -> dict[str, Any]:
        """Return the arguments of `worker.work`, which JSON can hold."""
        return {
            "notebook": self.notebook, "parameters": self.parameters, "folder": str(self.folder),
            "cores": int(self.limits["cores"]), "minutes": self.limits["timeout"],
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All jobs of a grid, parents first, by their folders."""

    grid: Grid
    root: Path
    jobs: dict[Path, Job]


def read_grid(path: str | Path) -> Grid:
    """Read and check a grid file (see above). Raises GridError for anything in it that cannot be carried out."""
    path = Path(path)
    try:
        content = read_yaml(path, "grid file")
        if not isinstance(content, dict):
            raise NotebookError(f"it must map names to values, of which it may have {', '.join(KEYS)}")
        if unknown := [key for key in content if key not in KEYS]:
            raise NotebookError(f"unknown {', '.join(map(repr, unknown))}; a grid has {', '.join(KEYS)}")
        return _grid(path, content)
    except NotebookError as error:
        raise GridError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _grid(path: Path, content: Mapping[str, Any]) -> Grid:
    notebooks = _notebooks(content.get("notebooks"), "notebooks")
    profile = read_profile(project_root() / content["profile"]) if content.get("profile") else {}
    parameters = {name: dict(profile.get(name, {})) for name in notebooks}
    for name, values in _mapping(content.get("parameters"), "parameters").items():
        if name not in parameters:
            raise NotebookError(f"parameters of {name}, which is not among its notebooks: {', '.join(notebooks)}")
        parameters[name] |= _mapping(values, f"parameters of {name}")
    for name, values in parameters.items():
        checked_parameters(source_of(name), values)

    axes = [_axis(axis, notebooks) for axis in _list(content.get("axes"), "axes")]
    names = [name for axis in axes for name in axis[0].labels]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise NotebookError(f"{', '.join(sorted(repeated))} stands in two axes")
    without = [_mapping(one, "without") for one in _list(content.get("without"), "without")]
    if unknown := {name for condition in without for name in condition} - set(names):
        raise NotebookError(
            f"without {', '.join(sorted(unknown))}: no axis has that name; axes are {', '.join(names) or 'none'}"
        )
    points = [_joined(combination, notebooks) for combination in itertools.product(*axes)]
    points = [point for point in points if not any(_matches(point, condition) for condition in without)]
    if not points:
        raise NotebookError("no combination is left: `without` leaves out all of them")
    limits = {name: _limit(content.get(name, standard), name, notebooks) for name, standard in LIMITS.items()}
    grid = Grid(path, str(content.get("about", "")), notebooks, parameters, tuple(points), limits)
    for point in points:
        _settings_of(point, grid)  # raises for what the notebooks do not have
    return grid


def _axis(axis: Any, notebooks: tuple[str, ...]) -> list[Point]:
    """The values of one axis, as points that set nothing else."""
    axis = _mapping(axis, "an axis")
    if len(axis) == 1 and isinstance(next(iter(axis.values())), dict):
        [(label, cases)] = axis.items()
        return [_case(str(label), name, _mapping(case, f"{label}: {name}"), notebooks) for name, case in cases.items()]
    lengths = {name: len(values) if isinstance(values, list) else 0 for name, values in axis.items()}
    if not lengths or not all(lengths.values()):
        raise NotebookError(f"the axis {', '.join(map(str, axis))} needs a list of values, or named cases")
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise NotebookError(f"lists of one axis go together and must be of one length: {counts}")
    rows = (dict(zip(axis, row, strict=True)) for row in zip(*axis.values(), strict=True))
    return [Point(row, row, notebooks) for row in rows]


def _case(label: str, name: Any, case: Mapping[str, Any], notebooks: tuple[str, ...]) -> Point:
    settings = {key: value for key, value in case.items() if key not in ("notebooks", "skip")}
    own = _notebooks(case["notebooks"], f"{label}: {name}: notebooks") if "notebooks" in case else notebooks
    if extra := [notebook for notebook in own if notebook not in notebooks]:
        raise NotebookError(f"{label}: {name}: {', '.join(extra)} must also stand in the grid's own notebooks")
    return Point({label: name}, settings, own, str(case.get("skip", "")))


def _joined(values: Sequence[Point], notebooks: tuple[str, ...]) -> Point:
    labels: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for value in values:
        if repeated := set(settings) & set(value.settings):
            raise NotebookError(f"{', '.join(sorted(map(str, repeated)))} is set by two axes")
        labels |= value.labels
        settings |= value.settings
        notebooks = tuple(name for name in notebooks if name in value.notebooks)
    return Point(labels, settings, notebooks, "; ".join(dict.fromkeys(v.skip for v in values if v.skip)))


def _matches(point: Point, condition: Mapping[str, Any]) -> bool:
    return all(point.labels[k] in (v if isinstance(v, list) else [v]) for k, v in condition.items())


def _settings_of(point: Point, grid: Grid) -> dict[str, dict[str, Any]]:
    """What a point sets, notebook by notebook, checked against all notebooks of the grid, also those it leaves out."""
    settings: dict[str, dict[str, Any]] = {name: {} for name in grid.notebooks}
    for name, value in point.settings.items():
        notebook, _, parameter = str(name).rpartition(".")
        if notebook and notebook not in settings:
            raise NotebookError(f"{name}: {notebook} is not among its notebooks: {', '.join(settings)}")
        having = [notebook] if notebook else [n for n in settings if parameter in default_parameters(source_of(n))]
        if not having:
            raise NotebookError(f"none of {', '.join(settings)} has a parameter {name}")
        for one in having:
            if parameter in settings[one]:
                raise NotebookError(f"{parameter} of {one} is set by two axes")
            settings[one][parameter] = value
    for one, values in settings.items():
        checked_parameters(source_of(one), values)
    return {one: {**grid.parameters[one], **settings[one]} for one in point.notebooks}


def plan_sweep(grid: Grid, root: str | Path = "runs") -> Plan:
    """Return all runs of a grid, each once, with the folders that they are or will be in.

    Raises GridError where a notebook takes a run of one that the grid does not have: an empty
    parameter means the newest run in JupyterLab, and that may be another run tomorrow.
    """
    jobs: dict[Path, Job] = {}
    for point in grid.points:
        made: dict[str, Path] = {}  # the runs of this point
        for name, values in ({} if point.skip else _settings_of(point, grid)).items():
            taken = {p: parent for parent, p in parents(source_of(name)).items() if p not in values}
            if missing := {parameter: parent for parameter, parent in taken.items() if parent not in made}:
                needed = " and ".join(f"{parameter} (a run of {parent})" for parameter, parent in missing.items())
                raise GridError(
                    f"{grid.path}: {name} needs {needed}: put that notebook before it, name a run folder, or write "
                    f"{NOT_TAKEN} where it does without"
                )
            values = {**{p: str(inside_project(made[parent])) for p, parent in taken.items()}, **values}
            folder = made[name] = run_folder(name, values, root)
            limits = {limit: of_notebook[name] for limit, of_notebook in grid.limits.items()}
            takes = tuple(made[parent] for parent in taken.values())
            job = Job(name, checked_parameters(source_of(name), values), folder, takes, limits, is_done(folder))
            jobs.setdefault(folder, job)
    return Plan(grid, project_root() / root, jobs)


def estimates(plan: Plan) -> dict[Path, float | None]:
    """Return the seconds that each job may take: those of its notebook's finished run with most parameters alike."""
    done = runs_table(plan.root, ["state=done"]).dropna(subset="seconds")

    def estimate(job: Job) -> float | None:
        past = done[done["notebook"] == job.notebook]
        alike = [sum(run.get(k) == v for k, v in job.parameters.items()) for run in past["parameters"]]
        return past["seconds"].iloc[alike.index(max(alike))] if alike else None

    return {folder: estimate(job) for folder, job in plan.jobs.items()}


def time_left(jobs: Iterable[Job], seconds: Mapping[Path, float | None], cores: float) -> tuple[float, bool]:
    """Return the seconds for jobs that are not done, and whether that counts all of them (some may be unknown).

    The longer of the longest chain and of all work spread over the cores.
    """
    ends: dict[Path, float] = {}
    work, known = 0.0, True
    for job in jobs:
        took = seconds.get(job.folder)
        known = known and took is not None
        work += (took or 0) * min(job.limits["cores"], cores)
        ends[job.folder] = (took or 0) + max((ends.get(parent, 0.0) for parent in job.takes), default=0.0)
    return max(work / cores, max(ends.values(), default=0.0)), known


def as_text(plan: Plan, cores: float = 1) -> str:
    """Return what a plan comes to: runs by notebook, reuse, time, and what is skipped and why."""
    seconds = estimates(plan)
    lines = [f"{plan.grid.path}: {plan.grid.about}" if plan.grid.about else str(plan.grid.path)]
    skipped = [point for point in plan.grid.points if point.skip]
    lines.append(
        f"{len(plan.grid.points)} combinations ({len(skipped)} skipped), {len(plan.jobs)} runs, "
        f"{sum(job.done for job in plan.jobs.values())} finished before"
    )
    for name in plan.grid.notebooks:
        mine = [job for job in plan.jobs.values() if job.notebook == name]
        took = [s for job in mine if (s := seconds[job.folder]) is not None]
        each = f"about {in_words(sum(took) / len(took))} each" if took else "time unknown: it has no finished run"
        lines.append(f"  {name:<24} {len(mine):>4} runs, {sum(job.done for job in mine):>4} finished before, {each}")
    remaining, known = time_left([job for job in plan.jobs.values() if not job.done], seconds, cores)
    about = f"{'about' if known else 'at least'} {in_words(remaining)}" if known or remaining else "unknown"
    lines.append(f"time: {about} on {cores:g} core{'s' * (cores != 1)}")
    lines += [f"skipped: {point.name}: {point.skip}" for point in skipped]
    return "\n".join(lines)


def in_words(seconds: float) -> str:
    """Return seconds in the unit that people would take.

    >>> in_words(8), in_words(200), in_words(9000)
    ('8 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _notebooks(value: Any, where: str) -> tuple[str, ...]:
    names = _list(value, where)
    if not names:
        raise NotebookError(f"{where} must list what to run, such as [{', '.join(CHAIN)}]")
    for name in names:
        if not isinstance(name, str) or not source_of(name).is_file():
            there = ", ".join(sorted(path.stem for path in source_of("x").parent.glob("*.ipynb")))
            raise NotebookError(f"{where}: there is no notebook {name!r}; there are {there}")
    return tuple(names)


def _limit(value: Any, name: str, notebooks: Iterable[str]) -> dict[str, float]:
    by_notebook = value if isinstance(value, dict) else dict.fromkeys(notebooks, value)
    if unknown := set(by_notebook) - set(notebooks):
        raise NotebookError(f"{name} of {', '.join(map(str, unknown))}: not among its notebooks")
    least = 1 if name == "cores" else 0
    for number in by_notebook.values():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number < math.inf:
            raise NotebookError(f"{name} is {number!r}, expected a number of at least {least}")
    return {notebook: by_notebook.get(notebook, LIMITS[name]) for notebook in notebooks}


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, (dict, type(None))):
        raise NotebookError(f"{where} must map names to values, but is {value!r}")
    return value or {}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, type(None))):
        raise NotebookError(f"{where} must be a list, but is {value!r}")
    return value or []
