"""The ledger of runs: what stands in `runs/`, read anew each time from the run folders themselves.

There is no index that could fall behind: manifests and results are written whole, so any number of processes may
write runs while others read.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from mmr5_lab.runs import Record, read_run


def read_runs(root: str | Path = "runs", notebook: str = "*") -> Iterator[Record]:
    """The runs under a folder, of one notebook or of all."""
    for manifest in sorted(Path(root).glob(f"{notebook}/*/manifest.json")):
        yield read_run(manifest.parent)


def seconds_taken(record: Record) -> float | None:
    """From the opening of a finished run to its results (the last opening, where it was gone on with)."""
    try:
        started = datetime.fromisoformat(record.manifest["started"]).timestamp()
        return max(0.0, (record.folder / "results.json").stat().st_mtime - started)
    except (KeyError, TypeError, ValueError, OSError):
        return None


def past_seconds(root: str | Path, notebooks: Iterable[str]) -> dict[str, list[tuple[dict[str, Any], float]]]:
    """Parameters and seconds of each notebook's finished runs."""
    past: dict[str, list[tuple[dict[str, Any], float]]] = {name: [] for name in notebooks}
    for name, runs in past.items():
        for record in read_runs(root, name):
            seconds = seconds_taken(record)
            if record.done and seconds is not None:
                runs.append((record.manifest.get("parameters", {}), seconds))
    return past
