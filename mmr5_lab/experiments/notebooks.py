"""Run a notebook under papermill: parameters checked, one folder a run, finished runs reused.

papermill only warns about unknown parameters and can leave a dead kernel's cells marked as completed. Here an
unknown parameter or a wrong type is an error before anything starts, and a run counts as done only when its
`results.json` is there.
"""

import ast
import itertools
import logging
import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

# jsonschema, which the next ones import, would take a second to learn a syntax of URLs that no notebook has
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

import nbformat
import papermill
import yaml
from filelock import FileLock, Timeout
from jupyter_core.paths import jupyter_runtime_dir
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm
from traitlets.config import Config

from mmr5_lab.experiments.runs import (
    CHAIN,
    FOLDER,
    inside_project,
    lock_of,
    project_root,
    read_run,
    run_hash,
    with_newest,
)
from mmr5_lab.files import PROGRESS, read_progress, replacing, results

WIDGET = "application/vnd.jupyter.widget-view+json"

logger = logging.getLogger(__name__)
logging.getLogger("papermill").setLevel(logging.ERROR)  # its warnings are errors of ours


class NotebookError(ValueError):
    """Parameters that a notebook does not have, or of a wrong type."""


class NotebookFailedError(RuntimeError):
    """A notebook that did not reach its end; the message names the cell's error and the executed notebook."""


class RunBusyError(RuntimeError):
    """A run that another process is making."""


def default_parameters(notebook: Path) -> dict[str, Any]:
    """Names and default values of a notebook's `parameters` cell.

    Raises FileNotFoundError, or NotebookError for a default that is not a plain value.
    """
    if not notebook.is_file():
        raise FileNotFoundError(f"there is no notebook {notebook}")
    return dict(_defaults_at(notebook, notebook.stat().st_mtime_ns))


@lru_cache(maxsize=64)
def _defaults_at(notebook: Path, _changed: int) -> dict[str, Any]:
    defaults = {}
    for name, found in papermill.inspect_notebook(str(notebook)).items():
        try:
            defaults[name] = ast.literal_eval(found["default"])
        except (ValueError, SyntaxError):
            raise NotebookError(
                f"{notebook.name}: the default of {name}, {found['default']}, is not a plain value"
            ) from None
    return defaults


def checked_parameters(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults overridden by `given`. Raises NotebookError, for names or types that differ."""
    defaults = default_parameters(notebook)
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise NotebookError(
            f"{notebook.name} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(defaults))}"
        )
    for name, value in given.items():
        default = defaults[name]
        fits = isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)
        widened = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        if not (fits or widened):
            told = f"{name} = {value!r} is a {type(value).__name__}, expected {type(default).__name__}"
            if isinstance(default, float) and isinstance(value, str) and re.fullmatch(r"-?\d+e[+-]?\d+", value):
                told += " (YAML takes 1e-3 for a text: write 1.0e-3)"
            raise NotebookError(f"{notebook.name}: {told}")
    whole = {name: float(v) if isinstance(defaults[name], float) else v for name, v in given.items()}  # 2 is 2.0
    return {**defaults, **whole}


def parents(notebook: Path) -> dict[str, str]:
    """The earlier notebooks that a notebook takes runs of: name -> its parameter for that run."""
    defaults = default_parameters(notebook)
    return {name: parameter for name, parameter in CHAIN.items() if parameter in defaults}


def read_profile(path: Path) -> dict[str, dict[str, Any]]:
    """A profile file: notebook name -> parameters. Raises NotebookError where it is not that."""
    if not path.is_file():
        raise NotebookError(f"there is no profile {path}")
    try:
        profile = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise NotebookError(f"{path} is not YAML: {error}") from None
    if not isinstance(profile, dict) or not all(isinstance(part, dict) for part in profile.values()):
        raise NotebookError(f"{path} must map notebook names to parameters")
    return profile


def run_folder(name: str, parameters: Mapping[str, Any], root: str | Path = "runs") -> Path:
    """Where the run of `notebooks/<name>.ipynb` with `parameters` is kept.

    Earlier runs that are not named are the newest in `root`. Raises NotebookError for bad parameters, FileNotFoundError
    where there is no such run.
    """
    project = project_root()
    checked = checked_parameters(project / "notebooks" / f"{name}.ipynb", parameters)
    return project / root / name / run_hash(name, with_newest(checked, project / root))


def is_done(folder: Path) -> bool:
    """Whether the run that this folder is named after is finished there: its results are whole, its manifest agrees."""
    record = read_run(folder)
    return record.done and record.manifest.get("hash") == folder.name


def run_notebook(name: str, parameters: Mapping[str, Any], root: str | Path = "runs") -> Path:
    """Run `notebooks/<name>.ipynb` with `parameters` and return its run folder (see `make_run`).

    Raises as `run_folder` does, before anything starts.
    """
    project = project_root()
    checked = checked_parameters(project / "notebooks" / f"{name}.ipynb", parameters)
    named = with_newest(checked, project / root)
    folder = run_folder(name, named, root)
    make_run(name, named, folder)
    return folder


def make_run(name: str, parameters: Mapping[str, Any], folder: Path) -> None:
    """Run `notebooks/<name>.ipynb` with `parameters`, all of them, in its `run_folder`; nothing if that is finished.

    The folder also gets the executed notebook and its HTML. Results that cannot be trusted (`is_done`) are set aside,
    in a folder of that name with ".damaged", and made again. Raises RunBusyError when another process is at this
    run, NotebookFailedError when a cell fails, the kernel dies or the notebook ends without results; what it wrote
    stays (with the message in `failed.txt`), and running again goes on from there.
    """
    try:
        with FileLock(lock_of(folder), timeout=0):  # let go by the system if we are killed
            if is_done(folder):
                logger.info("%s: finished before, in %s", name, folder)
            else:
                _set_aside(folder)
                _execute(project_root() / "notebooks" / f"{name}.ipynb", parameters, folder)
            _write_html(folder)
    except Timeout:
        raise RunBusyError(f"{name}: another process is making {folder}") from None


def _execute(source: Path, parameters: Mapping[str, Any], folder: Path) -> None:
    """Run a notebook to its end in `folder`, or leave word in there of why that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    executed, failed = folder / "notebook.ipynb", folder / "failed.txt"
    failed.unlink(missing_ok=True)
    try:
        with Follower(source.stem, folder):
            papermill.execute_notebook(
                str(source), str(executed), parameters={**parameters, FOLDER: str(inside_project(folder))},
                kernel_name="python3", cwd=str(project_root()), progress_bar=False, log_output=False,
                start_timeout=300, config=_kernel_config(),
            )  # fmt: skip
        reason = "" if is_done(folder) else "it ended without results.json, or its code changed while it ran"
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        reason = "its kernel died: it was killed (out of memory?) or crashed"
    if reason:
        with suppress(OSError):  # the disk may be full
            failed.write_text(reason + "\n", encoding="utf-8")
        raise NotebookFailedError(f"{source.stem}: {reason}\nsee {executed}")
    for checkpoint in folder.glob("checkpoints/checkpoint-*"):  # what else is in there is part of the result
        shutil.rmtree(checkpoint, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    """Rename a folder whose results cannot be trusted; one without results is gone on with."""
    if not (folder / "results.json").exists():
        return
    places = (folder.with_name(f"{folder.name}.damaged{k or ''}") for k in itertools.count())
    place = folder.rename(next(place for place in places if not place.exists()))
    logger.warning(
        "%s: %s; it is kept as %s and made again",
        folder, read_run(place).fault or "its manifest is that of another run", place.name,
    )  # fmt: skip


def _write_html(folder: Path) -> None:
    """The executed notebook as HTML, where that is still missing (a run may be finished from JupyterLab, without)."""
    executed, html = folder / "notebook.ipynb", folder / "notebook.html"
    if html.exists() or not executed.exists():
        return
    try:
        page = as_html(nbformat.read(executed, as_version=4))
        with replacing(html) as new:
            new.write_text(page, encoding="utf-8")
    except (OSError, nbformat.reader.NotJSONError) as error:
        logger.warning("%s is finished, but its HTML could not be written: %s", html.parent, error)


def as_html(notebook: nbformat.NotebookNode) -> str:
    """A notebook as an HTML page."""
    exporter = HTMLExporter(template_name="classic", embed_images=True)
    return exporter.from_notebook_node(without_widgets(notebook))[0]


def without_widgets(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without live widgets: no kernel answers in its HTML, and to draw them a script would be loaded."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", ())]
    notebook.metadata.pop("widgets", None)
    return notebook


def _kernel_config() -> Config:
    """The kernel listens on sockets of its own: of TCP ports, kernels that start at once can take the same ones.

    A path to a socket holds about 100 characters; where the runtime folder's is too long, TCP it is.
    """
    folder = jupyter_runtime_dir()
    if os.name != "posix" or len(folder) > 70:
        return Config()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/mmr5-{uuid.uuid4().hex[:12]}"}})


def chain_run(notebook: str, profile: Path, root: str | Path) -> tuple[dict[str, Any], Path]:
    """Parameters and run folder that a notebook has in the chain of a profile (`mmr5 demo --profile`).

    Raises NotebookError for bad parameters, FileNotFoundError where a notebook before it has not been run.
    """
    project, chosen = project_root(), read_profile(profile)
    folders: dict[str, Path] = {}
    for name in CHAIN:
        source = project / "notebooks" / f"{name}.ipynb"
        taken = {parameter: str(inside_project(folders[before])) for before, parameter in parents(source).items()}
        parameters = checked_parameters(source, {**chosen.get(name, {}), **taken})
        folders[name] = run_folder(name, parameters, root)
        if name == notebook:
            break
        results(folders[name])  # or say that it is to be run first
    return parameters, folders[notebook]


class Follower:
    """A bar that follows the progress file which training and reranking write into the run folder."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.stop = name, folder, threading.Event()

    def __enter__(self):
        (self.folder / PROGRESS).unlink(missing_ok=True)
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def __exit__(self, error, *_):
        self.finished = error is None
        self.stop.set()
        self.thread.join()

    def _follow(self) -> None:
        with tqdm(desc=self.name, bar_format="{desc:<24} {percentage:3.0f}% |{bar:30}| {elapsed} {postfix}") as bar:
            while not self.stop.wait(1.0 if sys.stderr.isatty() else 30.0):  # a log file gets few lines
                self._show(bar)
            self._show(bar)
            if self.finished:
                bar.total = bar.n = bar.total or 1

    def _show(self, bar: tqdm) -> None:
        progress = read_progress(self.folder)
        if progress is None:
            bar.refresh()
            return
        bar.total, bar.n = progress["total"], progress["done"]
        bar.set_postfix_str(f"{progress['what']} {progress['done']}/{progress['total']}")
