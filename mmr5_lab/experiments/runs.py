"""Run folders: what a notebook was run with and what came out, found again by a hash.

`runs/<notebook>/<hash>/` holds `manifest.json` (parameters, versions, hashes of code, data and prompts), whatever the
notebook writes, the executed notebook and its HTML, and `results.json`, written at the end: its presence means done.

    run = open_run("02_sft", globals())         # in a notebook, right after its parameters cell
    run.finish({"steps": 120, "loss": 0.3})
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr5_lab.experiments.fingerprint import code_hash, data_hashes
from mmr5_lab.files import read_object, replacing
from mmr5_lab.prompting.prompts import PROMPT_VERSION

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Run:
    """An open run folder and the parameters it was opened with."""

    folder: Path
    parameters: dict[str, Any]

    def finish(self, results: dict[str, Any]) -> None:
        """Write `results.json`, which marks the run as done. Values must be JSON; NaN is refused."""
        with replacing(self.folder / "results.json") as new:
            new.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Record:
    """What a run folder says of itself."""

    folder: Path
    manifest: dict[str, Any]  # {} where there is none or it cannot be read
    results: dict[str, Any] | None  # None: not finished, or cannot be read
    fault: str  # why its results cannot be trusted; "" where they can, or there are none yet

    @property
    def done(self) -> bool:
        return self.results is not None and not self.fault


def read_run(folder: str | Path) -> Record:
    """Manifest and results of a run folder, and what is wrong with them. Raises nothing for what is in there."""
    folder = Path(folder)
    manifest, no_manifest = read_object(folder / "manifest.json")
    results, no_results = read_object(folder / "results.json")
    fault = ""
    if no_results != "is missing":  # so it counts as finished: can it be trusted?
        if no_results:
            fault = f"results.json {no_results}"
        elif no_manifest:
            fault = f"manifest.json {no_manifest}"
    return Record(folder, manifest or {}, results, fault)


def lock_of(folder: Path) -> Path:
    """The file whose lock a process holds while it makes a run: beside the notebooks' folders, which hold runs only."""
    place = folder.parents[1] / ".locks" / f"{folder.parent.name}.{folder.name}"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def project_root(start: Path | None = None) -> Path:
    """The checkout that holds `notebooks/` and `mmr5_lab/`, at or above `start` (the working folder).

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


def inside_project(path: str | Path) -> Path:
    """`path` relative to the project's root where it lies in there (so that it means the same in any checkout)."""
    root, path = project_root(), Path(path).resolve()
    return path.relative_to(root) if path.is_relative_to(root) else path


def parameters_of(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook's parameters: its names in capitals that hold plain values, sorted."""
    plain = (str, int, float, bool, list, type(None))
    return {k: namespace[k] for k in sorted(namespace) if k.isupper() and isinstance(namespace[k], plain)}


def with_newest(parameters: Mapping[str, Any], root: str | Path = "runs") -> dict[str, Any]:
    """The parameters, with the newest run's folder for each earlier run (`CHAIN`) whose parameter is empty.

    Those that are not taken stay empty: of SFT where there is a MODEL to start from, of systems that are not asked for.
    Raises FileNotFoundError where there is no such run.
    """
    idle = {"SFT_RUN"} if parameters.get("MODEL") else set()
    if "SYSTEMS" in parameters:
        idle |= set(RUN_OF_SYSTEM.values()) - {RUN_OF_SYSTEM.get(system) for system in parameters["SYSTEMS"]}
    return dict(parameters) | {
        name: str(inside_project(latest(notebook, root)))
        for notebook, name in CHAIN.items()
        if parameters.get(name) == "" and name not in idle
    }


def run_hash(notebook: str, parameters: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a notebook's work: parameters, code, data and the prompt texts.

    Code is what the notebook can reach, data what its parameters name (`fingerprint`). Parent runs are parameters
    (paths that hold their own hash), so a changed parent changes its children.
    """
    named = _named(parameters)
    code, data = _depends_on(notebook, named)
    content = json.dumps([notebook, named, code, data, PROMPT_VERSION], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _depends_on(notebook: str, named: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    root = project_root()
    return code_hash(root / "notebooks" / f"{notebook}.ipynb"), data_hashes(named, root)


def _named(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key != FOLDER}


def open_run(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Make (or open again) the run folder for a notebook's parameters and write its manifest.

    `namespace` is the notebook's `globals()`. The parameter RUN, where it is set, is the folder to use. Earlier runs
    that are not named are the newest ones (`with_newest`): take them from the run's parameters.
    """
    parameters = with_newest(parameters_of(namespace))
    name = run_hash(notebook, parameters)
    folder = Path(parameters.get(FOLDER) or Path("runs") / notebook / name)
    folder.mkdir(parents=True, exist_ok=True)
    code, data = _depends_on(notebook, _named(parameters))
    manifest = {
        "notebook": notebook,
        "hash": name,
        "parameters": _named(parameters),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "code": code,
        "data": data,
        "commit": _commit(),
        "prompts": PROMPT_VERSION,
    }
    with replacing(folder / "manifest.json") as new:
        new.write_text(json.dumps(manifest, indent=2) + "\n")
    return Run(folder, parameters)


def latest(notebook: str, root: str | Path = "runs", holding: str = "results.json") -> Path:
    """The newest finished run of a notebook that holds such a file: one finished in JupyterLab has no "notebook.ipynb".

    Raises FileNotFoundError where there is none.
    """
    results = sorted(Path(root).glob(f"{notebook}/*/results.json"), key=lambda path: path.stat().st_mtime)
    done = [path.parent for path in results if (path.parent / holding).is_file()]
    if not done:
        raise FileNotFoundError(f"no finished run of {notebook} in {root}/: run notebooks/{notebook}.ipynb first")
    return done[-1]


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
