"""JSON-lines files that are appended to as work gets done, and survive whatever ends it.

with appending("rows.jsonl") as append:
    done = read_lines("rows.jsonl")
    append({"n": 1})
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file that is appended to as work gets done; [] where there is none yet.

    A half-written last line (still being written, or the process was killed) is left out. Raises ValueError, naming
    the line, for any other line that is not a JSON object.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.decode().split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object")
        rows.append(row)
    return rows


@contextmanager
def sole_writer(path: Path, lock: Path) -> Iterator[None]:
    """Within it no other process writes `path`; who does holds `lock`, until it ends or is killed.

    Raises RuntimeError where another one does.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise RuntimeError(f"another process is writing {path}: wait for it, or choose another place") from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def appending(path: str | Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends one row to a JSON-lines file: in one write, whole or not at all.

    A half-written last line (the process was killed, the disk was full) is cut off first, to be made again. Raises
    RuntimeError where another process has the file open for this (`sole_writer`).
    """
    path = Path(path)
    with sole_writer(path, path.with_name(f".{path.name}.lock")), path.open("a+b", buffering=0) as file:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s ended in the middle of a line, which is dropped and made again", path)
            file.truncate(whole)

        def append(row: Mapping[str, Any]) -> None:
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(line) != len(line):
                    raise OSError(f"{path}: the disk is full")
            except OSError:
                file.truncate(size)
                raise

        yield append


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` if the block ends well and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


PROGRESS = "progress.json"


def read_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A JSON file's object, and why there is none."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None, "is missing"
    except (OSError, ValueError) as error:
        return None, f"cannot be read ({error})"
    return (read, "") if isinstance(read, dict) else (None, "is not a JSON object")


def report_progress(folder: str | Path, what: str, done: int, total: int) -> None:
    """Leave word in a run folder of how far its long work has come, for whoever shows a progress bar."""
    with replacing(Path(folder) / PROGRESS) as new:
        new.write_text(json.dumps({"what": what, "done": done, "total": total}))


def read_progress(folder: str | Path) -> dict[str, Any] | None:
    """What `report_progress` left last: what, done, total; None where nothing is told yet."""
    return read_object(Path(folder) / PROGRESS)[0]


def results(folder: str | Path) -> dict[str, Any]:
    """The results of a finished run. Raises FileNotFoundError, saying what to run, where it is not finished."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a finished run (no results.json): run its notebook to the end first")
    return json.loads(path.read_text())
