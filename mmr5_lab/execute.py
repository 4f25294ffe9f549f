"""Run a notebook under papermill: parameters checked, one folder a run, finished runs reused.

papermill only warns about unknown parameters and can leave a dead kernel's cells marked as completed. Here an
unknown parameter or a wrong type is an error before anything starts, and a run counts as done only when its
`results.json` is there.
"""

import ast
import json
import logging
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import papermill
import yaml
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm

from mmr5_lab.runs import FOLDER, PROGRESS, inside_project, project_root, run_hash

CHAIN = {  # notebook, in order -> the parameter by which later ones name its run ("": none does)
    "01_data_construction": "DATA_RUN",
    "02_sft": "SFT_RUN",
    "03_grpo": "GRPO_RUN",
    "04_inference": "INFERENCE_RUN",
    "05_evaluation": "",
}

logger = logging.getLogger(__name__)
logging.getLogger("papermill").setLevel(logging.ERROR)  # its warnings are errors of ours


class NotebookError(ValueError):
    """Parameters that a notebook does not have, or of a wrong type."""


class NotebookFailedError(RuntimeError):
    """A notebook that did not reach its end; the message names the cell's error and the executed notebook."""


def default_parameters(notebook: Path) -> dict[str, Any]:
    """Names and default values of a notebook's `parameters` cell.

    Raises FileNotFoundError, or NotebookError for a default that is not a plain value.
    """
    if not notebook.is_file():
        raise FileNotFoundError(f"there is no notebook {notebook}")
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
            raise NotebookError(
                f"{notebook.name}: {name} = {value!r} is a {type(value).__name__}, expected {type(default).__name__}"
            )
    return {**defaults, **given}


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


def run_notebook(name: str, parameters: Mapping[str, Any], root: str | Path = "runs") -> Path:
    """Run `notebooks/<name>.ipynb` with `parameters` and return its run folder, at once if that run is finished.

    The folder also gets the executed notebook and its HTML. Raises NotebookError for bad parameters,
    NotebookFailedError when a cell fails or the notebook ends without results; what it wrote stays, and running
    again goes on from there.
    """
    project = project_root()
    source = project / "notebooks" / f"{name}.ipynb"
    checked = checked_parameters(source, parameters)
    folder = project / root / name / run_hash(name, checked)
    done = folder / "results.json"
    if done.is_file():
        logger.info("%s: finished before, in %s", name, folder)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / "notebook.ipynb"
    try:
        with Follower(name, folder / PROGRESS):
            papermill.execute_notebook(
                str(source), str(executed), parameters={**checked, FOLDER: str(inside_project(folder))},
                kernel_name="python3", cwd=str(project), progress_bar=False, log_output=False,
                extra_arguments=["--log-level=ERROR"],  # of the kernel, which warns about its transport
            )  # fmt: skip
    except PapermillExecutionError as error:
        raise NotebookFailedError(f"{name}: {error.ename}: {error.evalue}\nsee {executed}") from None
    if not done.is_file():
        raise NotebookFailedError(f"{name} ended without results.json; see {executed}")
    html, _ = HTMLExporter(template_name="classic", embed_images=True).from_filename(str(executed))
    (folder / "notebook.html").write_text(html, encoding="utf-8")
    for checkpoint in folder.glob("checkpoints/checkpoint-*"):  # what else is in there is part of the result
        shutil.rmtree(checkpoint, ignore_errors=True)
    return folder


class Follower:
    """A bar that follows the progress file which training and reranking write into the run folder."""

    def __init__(self, name: str, path: Path):
        self.name, self.path, self.stop = name, path, threading.Event()

    def __enter__(self):
        self.path.unlink(missing_ok=True)
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
        try:
            progress = json.loads(self.path.read_text())
        except (OSError, ValueError):
            bar.refresh()
            return
        bar.total, bar.n = progress["total"], progress["done"]
        bar.set_postfix_str(f"{progress['what']} {progress['done']}/{progress['total']}")
