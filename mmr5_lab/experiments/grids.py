"""Grid files: many runs of a notebook, or of a chain of notebooks, from one YAML file.

    grid = read_grid("notebooks/sweeps/learning_rate.yaml")
    plan = plan_sweep(grid)         # everything is checked here; nothing has started
    print(as_text(plan))

`schedule.run_sweep` carries a plan out. A grid file says:

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmr5_lab.experiments.history import past_seconds
from mmr5_lab.experiments.notebooks import (
    NotebookError,
    checked_parameters,
    default_parameters,
    is_done,
    parents,
    read_profile,
    run_folder,
)
from mmr5_lab.experiments.runs import CHAIN, inside_project, project_root

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


@dataclass(frozen=True)
class Plan:
    """All jobs of a grid, parents first, and the jobs' folders of each point: notebook -> folder."""

    grid: Grid
    root: Path
    jobs: dict[Path, Job]
    folders: tuple[dict[str, Path], ...]  # one a point of the grid; {} for one that is skipped


def read_grid(path: str | Path) -> Grid:
    """Read and check a grid file (see above). Raises GridError, NotebookError or FileNotFoundError."""
    path = Path(path)
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GridError(f"there is no grid file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GridError(f"{path} is not YAML: {error}") from None
    if not isinstance(told, dict):
        raise GridError(f"{path} must map names to values, of which it may have {', '.join(KEYS)}")
    if unknown := [key for key in told if key not in KEYS]:
        raise GridError(f"{path}: unknown {', '.join(map(repr, unknown))}; a grid has {', '.join(KEYS)}")
    try:
        return _grid(path, told)
    except NotebookError as error:
        raise GridError(f"{path}: {error}") from None


def _grid(path: Path, told: Mapping[str, Any]) -> Grid:
    notebooks = _notebooks(told.get("notebooks"), "notebooks")
    defaults = {name: default_parameters(_source(name)) for name in notebooks}
    profile = read_profile(project_root() / told["profile"]) if told.get("profile") else {}
    parameters = {name: dict(profile.get(name, {})) for name in notebooks}
    for name, given in _mapping(told.get("parameters"), "parameters").items():
        if name not in parameters:
            raise NotebookError(f"parameters of {name}, which is not among its notebooks: {', '.join(notebooks)}")
        parameters[name] |= _mapping(given, f"parameters of {name}")
    for name, given in parameters.items():
        checked_parameters(_source(name), given)

    axes = [_axis(axis, notebooks) for axis in _list(told.get("axes"), "axes")]
    names = [name for axis in axes for name in axis[0].labels]
    if twice := {name for name in names if names.count(name) > 1}:
        raise NotebookError(f"{', '.join(sorted(twice))} stands in two axes")
    without = [_mapping(one, "without") for one in _list(told.get("without"), "without")]
    for condition in without:
        if unknown := set(condition) - set(names):
            raise NotebookError(
                f"without {', '.join(sorted(unknown))}: no axis has that name; axes are {', '.join(names) or 'none'}"
            )
    points = []
    for combination in itertools.product(*axes):
        point = _joined(combination, notebooks)
        if not any(_fits(point, condition) for condition in without):
            _settings_of(point, defaults, parameters)  # raises for what the notebooks do not have
            points.append(point)
    if not points:
        raise NotebookError("no combination is left: `without` leaves out all of them")
    limits = {name: _limit(told.get(name, standard), name, notebooks) for name, standard in LIMITS.items()}
    return Grid(path, str(told.get("about", "")), notebooks, parameters, tuple(points), limits)


def _axis(axis: Any, notebooks: tuple[str, ...]) -> list[Point]:
    """The values of one axis, as points that set nothing else."""
    axis = _mapping(axis, "an axis")
    if len(axis) == 1 and isinstance(next(iter(axis.values())), dict):
        [(label, cases)] = axis.items()
        return [_case(str(label), case, _mapping(told, f"{label}: {case}"), notebooks) for case, told in cases.items()]
    lengths = {name: len(values) if isinstance(values, list) else 0 for name, values in axis.items()}
    if not lengths or not all(lengths.values()):
        raise NotebookError(f"the axis {', '.join(map(str, axis))} needs a list of values, or named cases")
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise NotebookError(f"lists of one axis go together and must be of one length: {told}")
    rows = zip(*axis.values(), strict=True)
    return [Point(dict(zip(axis, row, strict=True)), dict(zip(axis, row, strict=True)), notebooks) for row in rows]


def _case(label: str, case: Any, told: Mapping[str, Any], notebooks: tuple[str, ...]) -> Point:
    settings = {name: value for name, value in told.items() if name not in ("notebooks", "skip")}
    own = _notebooks(told["notebooks"], f"{label}: {case}: notebooks") if "notebooks" in told else notebooks
    if extra := [name for name in own if name not in notebooks]:
        raise NotebookError(f"{label}: {case}: {', '.join(extra)} must also stand in the grid's own notebooks")
    return Point({label: case}, settings, own, str(told.get("skip", "")))


def _joined(values: Sequence[Point], notebooks: tuple[str, ...]) -> Point:
    labels: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for value in values:
        if twice := set(settings) & set(value.settings):
            raise NotebookError(f"{', '.join(sorted(map(str, twice)))} is set by two axes")
        labels |= value.labels
        settings |= value.settings
        notebooks = tuple(name for name in notebooks if name in value.notebooks)
    return Point(labels, settings, notebooks, "; ".join(dict.fromkeys(v.skip for v in values if v.skip)))


def _fits(point: Point, condition: Mapping[str, Any]) -> bool:
    return all(point.labels[k] in (v if isinstance(v, list) else [v]) for k, v in condition.items())


def _settings_of(
    point: Point, defaults: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What a point sets, notebook by notebook, checked against all notebooks of the grid, also those it leaves out."""
    given: dict[str, dict[str, Any]] = {name: {} for name in defaults}
    for name, value in point.settings.items():
        notebook, _, parameter = str(name).rpartition(".")
        if notebook and notebook not in defaults:
            raise NotebookError(f"{name}: {notebook} is not among its notebooks: {', '.join(defaults)}")
        having = [notebook] if notebook else [n for n, has in defaults.items() if parameter in has]
        if not having:
            raise NotebookError(f"none of {', '.join(defaults)} has a parameter {name}")
        for one in having:
            if parameter in given[one]:
                raise NotebookError(f"{parameter} of {one} is set by two axes")
            given[one][parameter] = value
    for one, values in given.items():
        checked_parameters(_source(one), values)
    return {one: {**parameters[one], **given[one]} for one in point.notebooks}


def plan_sweep(grid: Grid, root: str | Path = "runs") -> Plan:
    """All runs of a grid, each once, with the folders that they are or will be in.

    Raises GridError where a notebook takes a run of one that the grid does not have: the newest run, which an empty
    parameter means in JupyterLab, would be another one tomorrow.
    """
    defaults = {name: default_parameters(_source(name)) for name in grid.notebooks}
    jobs: dict[Path, Job] = {}
    folders = []
    for point in grid.points:
        made: dict[str, Path] = {}
        for name, given in ({} if point.skip else _settings_of(point, defaults, grid.parameters)).items():
            taken = {
                parameter: parent for parent, parameter in parents(_source(name)).items() if parameter not in given
            }
            if missing := {parameter: parent for parameter, parent in taken.items() if parent not in made}:
                told = " and ".join(f"{parameter} (a run of {parent})" for parameter, parent in missing.items())
                raise GridError(
                    f"{grid.path}: {name} needs {told}: put that notebook before it, name a run folder, or write "
                    f"{NOT_TAKEN} where it does without"
                )
            given = given | {parameter: str(inside_project(made[parent])) for parameter, parent in taken.items()}
            folder = made[name] = run_folder(name, given, root)
            if folder not in jobs:
                limits = {limit: values[name] for limit, values in grid.limits.items()}
                takes = tuple(made[parent] for parent in taken.values())
                jobs[folder] = Job(
                    name, checked_parameters(_source(name), given), folder, takes, limits, is_done(folder)
                )
        folders.append(made)
    return Plan(grid, project_root() / root, jobs, tuple(folders))


def estimates(plan: Plan) -> dict[Path, float | None]:
    """Seconds that each job may take: those of the finished run of its notebook whose parameters are most alike."""
    past = past_seconds(plan.root, plan.grid.notebooks)
    return {folder: _alike(job, past.get(job.notebook, [])) for folder, job in plan.jobs.items()}


def _alike(job: Job, past: Sequence[tuple[dict[str, Any], float]]) -> float | None:
    if not past:
        return None
    return max(past, key=lambda run: sum(run[0].get(k) == v for k, v in job.parameters.items()))[1]


def time_left(jobs: Iterable[Job], seconds: Mapping[Path, float | None], cores: float) -> tuple[float, bool]:
    """Seconds for jobs that are not done, and whether that counts all of them (some may be unknown).

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
    """What a plan comes to: runs by notebook, reuse, time, and what is skipped and why."""
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
    left, known = time_left([job for job in plan.jobs.values() if not job.done], seconds, cores)
    about = f"{'about' if known else 'at least'} {in_words(left)}" if known or left else "unknown"
    lines.append(f"time: {about} on {cores:g} core{'s' * (cores != 1)}")
    lines += [f"skipped: {point.name}: {point.skip}" for point in skipped]
    return "\n".join(lines)


def in_words(seconds: float) -> str:
    """
    >>> in_words(8), in_words(200), in_words(9000)
    ('8 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _source(name: str) -> Path:
    return project_root() / "notebooks" / f"{name}.ipynb"


def _notebooks(told: Any, where: str) -> tuple[str, ...]:
    names = _list(told, where)
    if not names:
        raise NotebookError(f"{where} must list what to run, such as [{', '.join(CHAIN)}]")
    for name in names:
        if not isinstance(name, str) or not _source(name).is_file():
            there = ", ".join(sorted(path.stem for path in _source("x").parent.glob("*.ipynb")))
            raise NotebookError(f"{where}: there is no notebook {name!r}; there are {there}")
    return tuple(names)


def _limit(told: Any, name: str, notebooks: Iterable[str]) -> dict[str, float]:
    by_notebook = told if isinstance(told, dict) else dict.fromkeys(notebooks, told)
    if unknown := set(by_notebook) - set(notebooks):
        raise NotebookError(f"{name} of {', '.join(map(str, unknown))}: not among its notebooks")
    least = 1 if name == "cores" else 0
    for value in by_notebook.values():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
            raise NotebookError(f"{name} is {value!r}, expected a number of at least {least}")
    return {notebook: by_notebook.get(notebook, LIMITS[name]) for notebook in notebooks}


def _mapping(told: Any, where: str) -> dict[Any, Any]:
    if told is None:
        return {}
    if not isinstance(told, dict):
        raise NotebookError(f"{where} must map names to values, but is {told!r}")
    return told


def _list(told: Any, where: str) -> list[Any]:
    if told is None:
        return []
    if not isinstance(told, list):
        raise NotebookError(f"{where} must be a list, but is {told!r}")
    return told
