"""Run a notebook under papermill: parameters checked, one folder a run, finished runs reused.

papermill only warns about unknown parameters and can leave a dead kernel's cells marked as completed. Here an
unknown parameter or a wrong type is an error before anything starts, and a run counts as done only when its
`results.json` is there.
"""

import itertools
import logging
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# jsonschema, which the next ones import, would take a second to learn a syntax of URLs that no notebook has
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

import nbformat
import papermill
from filelock import FileLock, Timeout
from jupyter_core.paths import jupyter_runtime_dir
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm
from traitlets.config import Config

from mmr5_lab.experiments.fingerprint import cache_revisions
from mmr5_lab.experiments.parameters import NotebookError, checked_parameters, read_profile
from mmr5_lab.experiments.runs import (
    CHAIN,
    DAMAGED,
    FOLDER,
    RunBusyError,
    inside_project,
    lock_of,
    parents,
    project_root,
    read_run,
    run_hash,
    source_of,
    with_newest,
)
from mmr5_lab.files import PROGRESS, read_progress, results, write_text

WIDGET = "application/vnd.jupyter.widget-view+json"

logger = logging.getLogger(__name__)
logging.getLogger("papermill").setLevel(logging.ERROR)  # its warnings are errors of ours


class NotebookFailedError(RuntimeError):
    """A notebook that did not reach its end; the message names the cell's error and the executed notebook."""


def run_folder(name: str, parameters: Mapping[str, Any], root: str | Path = "runs") -> Path:
    """Return the folder of the run of `notebooks/<name>.ipynb` with `parameters`.

    Earlier runs that are not named are the newest in `root`. Raises NotebookError for bad parameters, FileNotFoundError
    where there is no such run.
    """
    named = _named_parameters(name, parameters, root)
    return project_root() / root / name / run_hash(name, named)


def _named_parameters(name: str, parameters: Mapping[str, Any], root: str | Path) -> dict[str, Any]:
    checked = checked_parameters(source_of(name), parameters)
    if checked.get(FOLDER):
        raise NotebookError(f"{name}: {FOLDER} cannot be set here: a run's folder follows from its parameters")
    return with_newest(checked, project_root() / root)


def is_done(folder: Path) -> bool:
    """Return whether the run that this folder is named after is finished there: its results are whole, its manifest
    agrees."""
    run = read_run(folder)
    return run.done and run.manifest.get("hash") == folder.name


def run_notebook(name: str, parameters: Mapping[str, Any], root: str | Path = "runs") -> Path:
    """Run `notebooks/<name>.ipynb` with `parameters` and return its run folder (see `make_run`).

    Raises as `run_folder` does, before anything starts.
    """
    named = _named_parameters(name, parameters, root)
    cache_revisions(named, project_root())
    folder = project_root() / root / name / run_hash(name, named)
    make_run(name, named, folder)
    return folder


def make_run(name: str, parameters: Mapping[str, Any], folder: Path) -> None:
    """Run `notebooks/<name>.ipynb` with `parameters`, all of them, in its `run_folder`; nothing if that is finished.

    The folder also gets the executed notebook and its HTML. A folder that cannot be trusted (damaged results, or the
    manifest of another run) is set aside under a name with ".damaged", and the run is made again. Raises RunBusyError
    when another process makes this run, NotebookFailedError when a cell fails, the kernel dies or the notebook ends
    without results; what it wrote stays (with the message in `failed.txt`), and running again goes on from there.
    """
    try:
        with FileLock(lock_of(folder), timeout=0):  # the system lets go of it if we are killed
            if is_done(folder):
                logger.info("%s: finished before, in %s", name, folder)
            else:
                _set_aside(folder)
                _execute(source_of(name), parameters, folder)
            _write_html(folder)
    except Timeout:
        raise RunBusyError(f"{name}: another process is making {folder}") from None


def _execute(source: Path, parameters: Mapping[str, Any], folder: Path) -> None:
    """Run a notebook to its end in `folder`, or leave word in there of why that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    executed, failed = folder / "notebook.ipynb", folder / "failed.txt"
    failed.unlink(missing_ok=True)
    try:
        with _follow(source.stem, folder):
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
    """Rename a folder that cannot be trusted; a whole one without results is gone on with."""
    run = read_run(folder)
    reason = run.fault
    if not reason and run.manifest and run.manifest.get("hash") != folder.name:
        reason = "its manifest is that of another run"  # the code was edited between its start and its opening
    if not reason:
        return
    places = (folder.with_name(f"{folder.name}{DAMAGED}{k or ''}") for k in itertools.count())
    place = folder.rename(next(place for place in places if not place.exists()))
    logger.warning("%s: %s; it is kept as %s and made again", folder, reason, place.name)


def _write_html(folder: Path) -> None:
    """The executed notebook as HTML, where that is still missing (a run may be finished from JupyterLab, without)."""
    executed, html = folder / "notebook.ipynb", folder / "notebook.html"
    if html.exists() or not executed.exists():
        return
    try:
        write_text(html, notebook_html(without_widgets(nbformat.read(executed, as_version=4)), "classic"))
    except (OSError, nbformat.reader.NotJSONError) as error:
        logger.warning("%s is finished, but its HTML could not be written: %s", folder, error)


def notebook_html(notebook: nbformat.NotebookNode, template: str, **options: bool) -> str:
    """Return a notebook as HTML that holds its images, also those below `notebooks/` that it links to."""
    exporter = HTMLExporter(template_name=template, embed_images=True, **options)
    place = {"metadata": {"path": str(project_root() / "notebooks")}}
    return exporter.from_notebook_node(notebook, resources=place)[0]


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


def with_parents(name: str, values: Mapping[str, Any], folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return parameters of a notebook with the folders of the earlier notebooks' runs that it takes."""
    taken = {parameter: str(inside_project(folders[parent])) for parent, parameter in parents(source_of(name)).items()}
    return {**values, **taken}


def chain_run(notebook: str, profile: Path, root: str | Path) -> tuple[dict[str, Any], Path]:
    """Return the parameters and the run folder that a notebook has in the chain of a profile (`mmr5 demo --profile`).

    Raises NotebookError for bad parameters, FileNotFoundError where a notebook before it has not been run.
    """
    values = read_profile(profile)
    folders: dict[str, Path] = {}
    for name in CHAIN:
        parameters = checked_parameters(source_of(name), with_parents(name, values.get(name, {}), folders))
        cache_revisions(parameters, project_root())
        folders[name] = run_folder(name, parameters, root)
        if name == notebook:
            break
        results(folders[name])  # or say that it is to be run first
    return parameters, folders[notebook]


@contextmanager
def _follow(name: str, folder: Path) -> Iterator[None]:
    """Within it, a bar follows the progress file that training and reranking write into the run folder."""
    (folder / PROGRESS).unlink(missing_ok=True)
    over = threading.Event()
    every = 1.0 if sys.stderr.isatty() else 30.0  # seconds; a log file gets few lines

    def show() -> None:
        while not over.wait(every):
            if progress := read_progress(folder):
                bar.total, bar.n = progress["total"], progress["done"]
                bar.set_postfix_str(f"{progress['what']} {progress['done']}/{progress['total']}", refresh=False)
            bar.refresh()

    with tqdm(desc=name, bar_format="{desc:<24} {percentage:3.0f}% |{bar:30}| {elapsed} {postfix}") as bar:
        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
            bar.total = bar.n = bar.total or 1
        finally:
            over.set()
            thread.join()
