"""Run folders: what a notebook was run with and what came out, found again by a hash.

`runs/<notebook>/<hash>/` holds `manifest.json` (parameters, versions, hashes of code, data and prompts), whatever the
notebook writes, the executed notebook and its HTML, and `results.json`, written at the end: its presence means done.

    run = open_run("02_sft", globals())         # in a notebook, right after its parameters cell
    run.finish({"steps": 120, "loss": 0.3})
"""

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmr5_lab.experiments.fingerprint import RUN_FOLDER, cache_revisions, code_hash, data_hashes
from mmr5_lab.experiments.parameters import NotebookError, checked_values, default_parameters
from mmr5_lab.files import read_object, write_json, write_text
from mmr5_lab.prompting.prompts import PROMPT_VERSION

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "papermill", "bm25s")
CHAIN = {  # notebook, in order -> the parameter by which later ones name its run ("": none does)
    "01_data_construction": "DATA_RUN",
    "02_sft": "SFT_RUN",
    "03_grpo": "GRPO_RUN",
    "04_inference": "INFERENCE_RUN",
    "05_evaluation": "",
    "06_error_analysis": "",
}
RUN_OF_SYSTEM = {"SFT": "SFT_RUN", "SFT + RL": "GRPO_RUN", "RL only": "GRPO_RUN"}  # that notebook 04 reranks with
FOLDER = "RUN"  # the one parameter that says where, not what: left out of the hash
OPEN = ".open"  # the file in a run folder whose lock the process holds that has the run open
DAMAGED = ".damaged"  # in the names of folders that were set aside
PATIENCE = 10.0  # seconds for a kernel whose parent was killed to end
_opened: dict[Path, FileLock] = {}  # the runs that this process has open


class RunError(ValueError):
    """A run folder that holds other work than is to be done in it."""


class RunBusyError(RuntimeError):
    """A run that another process is making."""


@dataclass(frozen=True)
class Run:
    """A run folder: what it was run with and what came out."""

    folder: Path
    manifest: dict[str, Any]  # {} where there is none or it cannot be read
    results: dict[str, Any] | None = None  # None: not finished, or cannot be read
    fault: str = ""  # why its results cannot be trusted; "" where they can, or there are none yet

    @property
    def parameters(self) -> dict[str, Any]:
        """Its parameters, with the folders of the runs that it took."""
        return self.manifest.get("parameters", {})

    @property
    def root(self) -> Path:
        """The folder of all runs, for what they share: that of this run, or `runs` for one that lies elsewhere."""
        return self.folder.parents[1] if RUN_FOLDER.search(self.folder.as_posix()) else Path("runs")

    @property
    def notebook(self) -> str:
        return self.manifest.get("notebook", self.folder.parent.name)

    @property
    def done(self) -> bool:
        return self.results is not None and not self.fault

    @property
    def state(self) -> str:
        """ "done", "damaged" (results that cannot be trusted), "failed", or "unfinished" (running, or stopped)."""
        if self.done:
            return "done"
        return "damaged" if self.fault else "failed" if (self.folder / "failed.txt").exists() else "unfinished"

    def finish(self, results: dict[str, Any]) -> None:
        """Write `results.json`, which marks the run as done. Values must be JSON; NaN is refused."""
        text = json.dumps(results, indent=2, allow_nan=False) + "\n"
        write_json(self.folder / "manifest.json", self.manifest, indent=2)  # `open_run` left that of a finished run
        write_text(self.folder / "results.json", text)
        if lock := _opened.pop(self.folder.resolve(), None):
            lock.release()


def read_run(folder: str | Path) -> Run:
    """Return a run folder's manifest and results, and what is wrong with them. Raises nothing for what is in there."""
    folder = Path(folder)
    manifest, no_manifest = read_object(folder / "manifest.json")
    results, no_results = read_object(folder / "results.json")
    fault = ""
    if no_results != "is missing":  # so it counts as finished: can it be trusted?
        if no_results:
            fault = f"results.json {no_results}"
        elif no_manifest:
            fault = f"manifest.json {no_manifest}"
        elif DAMAGED in folder.name:
            fault = "it was set aside"
    return Run(folder, manifest or {}, results, fault)


def lock_of(folder: Path) -> Path:
    """Return the file whose lock a process holds while it makes a run; it stays where it is if the folder moves."""
    place = folder.parents[1] / ".locks" / f"{folder.parent.name}.{folder.name}"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def project_root(start: Path | None = None) -> Path:
    """Return the checkout that holds `notebooks/` and `mmr5_lab/`, at or above `start` (the working folder).

    Raises FileNotFoundError outside of one.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "notebooks").is_dir() and (folder / "mmr5_lab").is_dir():
            return folder
    raise FileNotFoundError(f"{start} is not inside a checkout of MM-R5 Lab: run this from the folder with notebooks/")


def enter_project() -> Path:
    """Make the project's root the working folder and return it, so that a notebook finds the same files wherever
    JupyterLab or papermill starts its kernel; notebooks can import from `notebooks/` (`exercises`).

    Raises FileNotFoundError outside of a checkout.
    """
    root = project_root()
    os.chdir(root)
    if str(root / "notebooks") not in sys.path:
        sys.path.append(str(root / "notebooks"))
    return root


def source_of(notebook: str) -> Path:
    """Return the file of a notebook of the project."""
    return project_root() / "notebooks" / f"{notebook}.ipynb"


def inside_project(path: str | Path) -> Path:
    """Return `path` relative to the project's root where it lies in there: the same in any checkout."""
    root, path = project_root(), Path(path).resolve()
    return path.relative_to(root) if path.is_relative_to(root) else path


def parents(notebook: Path) -> dict[str, str]:
    """Return the earlier notebooks that a notebook takes runs of: name -> its parameter for that run."""
    defaults = default_parameters(notebook)
    return {name: parameter for name, parameter in CHAIN.items() if parameter in defaults}


def parameters_of(source: Path, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return a notebook's parameters, sorted: its names in capitals that hold plain values.

    source: the notebook's file, whose `parameters` cell says which names and values are right; where there is none,
        all are. A parameter that was added in JupyterLab may not stand in the file yet, so others are taken too.

    Raises NotebookError for wrong values, and for names that papermill was given and the notebook does not have.
    """
    plain = (str, int, float, bool, list, type(None))
    named = {k: namespace[k] for k in sorted(namespace) if k.isupper() and isinstance(namespace[k], plain)}
    if not source.is_file():
        return named
    defaults = default_parameters(source)
    for cell in namespace.get("In", ()):  # what was run so far; papermill's own cell begins like this
        names = re.findall(r"(?m)^([A-Z_\d]+) = ", cell) if cell.startswith("# Parameters\n") else []
        if unknown := sorted(set(names) - set(defaults)):
            raise NotebookError(f"{source.name} has no parameter {', '.join(unknown)}; it has {', '.join(defaults)}")
    return dict(sorted((named | checked_values(source, {k: namespace[k] for k in defaults if k in namespace})).items()))


def with_newest(parameters: Mapping[str, Any], root: str | Path = "runs") -> dict[str, Any]:
    """Return the parameters, with the newest run's folder for each earlier run (`CHAIN`) whose parameter is empty.

    Those that are not taken stay empty: of SFT where there is a MODEL to start from, of data where there is a
    RETRIEVER, of systems that are not evaluated.
    Raises FileNotFoundError where there is no such run.
    """
    unused = {"SFT_RUN"} if parameters.get("MODEL") else set()
    unused |= {"DATA_RUN"} if parameters.get("RETRIEVER") else set()
    if "SYSTEMS" in parameters:
        unused |= set(RUN_OF_SYSTEM.values()) - {RUN_OF_SYSTEM.get(system) for system in parameters["SYSTEMS"]}
    return dict(parameters) | {
        name: str(inside_project(latest(notebook, root)))
        for notebook, name in CHAIN.items()
        if parameters.get(name) == "" and name not in unused
    }


def run_hash(notebook: str, parameters: Mapping[str, Any]) -> str:
    """Return twelve hexadecimal digits that name a notebook's work: parameters, code, data and the prompt texts.

    Code is what the notebook can reach, data what its parameters name (`fingerprint`). Parent runs are parameters
    (paths that hold their own hash), so a changed parent changes its children.
    """
    return _manifest(notebook, parameters)["hash"]


def _manifest(notebook: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a notebook's work, and the hash of that."""
    root = project_root()
    named = {key: value for key, value in parameters.items() if key != FOLDER}
    code, data = code_hash(source_of(notebook)), data_hashes(named, root)
    content = json.dumps([notebook, named, code, data, PROMPT_VERSION], sort_keys=True)
    name = hashlib.sha256(content.encode()).hexdigest()[:12]
    return {
        "notebook": notebook, "hash": name, "parameters": named, "code": code, "data": data, "prompts": PROMPT_VERSION,
    }  # fmt: skip


def open_run(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Make (or open again) the run folder for a notebook's parameters and write its manifest.

    `namespace` is the notebook's `globals()`. The parameter RUN, where it is set, is the folder to use. Earlier runs
    that are not named are the newest ones (`with_newest`): take them from the run's parameters.

    Raises NotebookError for bad parameters, RunError for a folder that holds other work (another notebook's, or made
    with other parameters), RunBusyError for one that another process has open.
    """
    parameters = with_newest(parameters_of(source_of(notebook), namespace))
    root = project_root()
    cache_revisions(parameters, root)
    manifest = _manifest(notebook, parameters)
    folder = root / (parameters.get(FOLDER) or Path("runs") / notebook / manifest["hash"])
    if Path.cwd() == root and folder.is_relative_to(root):
        folder = folder.relative_to(root)  # what the results name then means the same in any checkout
    _refuse_other_work(read_run(folder), manifest)  # before anything is written into it
    folder.mkdir(parents=True, exist_ok=True)
    _hold(folder)
    before = read_run(folder)  # another process may have finished it meanwhile
    _refuse_other_work(before, manifest)
    packages = {package: importlib.metadata.version(package) for package in PACKAGES}
    run = Run(
        folder,
        manifest | {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "packages": packages, "commit": _commit()},
    )
    if not before.done:  # results and manifest are replaced together, when the run is finished once more
        write_json(folder / "manifest.json", run.manifest, indent=2)
    return run


def _refuse_other_work(before: Run, manifest: Mapping[str, Any]) -> None:
    """Raise RunError where a folder holds what this run would overwrite, mix with its own or take for its own."""
    advice = f"leave {FOLDER} empty, name another folder, or move this one away"
    if before.fault:
        raise RunError(f"{before.folder} holds results that cannot be trusted ({before.fault}): {advice}")
    if not before.manifest or before.manifest.get("hash") == manifest["hash"]:
        return
    if before.notebook != manifest["notebook"]:
        raise RunError(f"{before.folder} is a run of {before.notebook}, not of {manifest['notebook']}: {advice}")
    old, new = before.parameters, manifest["parameters"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    differing = [f"{name} ({old.get(name)!r}, now {new.get(name)!r})" for name in names]
    data = before.manifest.get("data", {})
    differing += [f"the content of {name}" for name, digest in manifest["data"].items() if data.get(name) != digest]
    # Code may be mended between two attempts, so that hours of an unfinished training are gone on with.
    if before.done and not differing:
        differing = ["another version of the code"]
    if differing:
        kind = "a finished" if before.done else "an unfinished"
        raise RunError(f"{before.folder} is {kind} run made with other settings: {', '.join(differing)}; {advice}")


def _hold(folder: Path) -> None:
    """Keep other processes from opening a run until this one finishes it or ends."""
    place = folder.resolve()
    if place not in _opened:
        lock = FileLock(place / OPEN)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise RunBusyError(f"{folder} is open in another process, such as a notebook's kernel: end that") from None
        _opened[place] = lock


def latest(notebook: str, root: str | Path = "runs", holding: str = "results.json") -> Path:
    """Return the newest finished run of a notebook that holds such a file (a run finished in JupyterLab has no
    "notebook.ipynb"). A relative `root` is one of the project.

    Raises FileNotFoundError where there is none.
    """
    folder = Path(root) if Path(root).is_absolute() else project_root() / root
    results = folder.glob(f"{notebook}/[!.]*/results.json")
    for path in sorted(results, key=lambda path: path.stat().st_mtime, reverse=True):
        if (path.parent / holding).is_file() and read_run(path.parent).done:
            return path.parent
    raise FileNotFoundError(f"no finished run of {notebook} in {root}/: run notebooks/{notebook}.ipynb first")


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
