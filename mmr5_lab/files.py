"""JSON lines, files replaced as a whole, progress files, and what a folder was made with."""

import codecs
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


def json_lines(path: str | Path, drop_half: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file, line n", object) for each line of a JSON-lines file that is not blank.

    The file is UTF-8, with or without a byte-order mark and a line break at its end.
    drop_half: leave out, with a warning, a last line that was not written to its end

    Raises ValueError, naming the line, for what is not a JSON object, and for a file in UTF-16.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if number == 1:
                _refuse_utf16(path, line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                if drop_half and not line.endswith(b"\n"):
                    logger.warning("%s was not written to its end and is left out: %.60r", where, line)
                    return
                raise ValueError(f"{where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where} is not a JSON object; expected one object a line")
            yield where, row


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file that may still be appended to (`json_lines`); [] where there is none yet."""
    return [row for _, row in json_lines(path, drop_half=True)] if Path(path).exists() else []


def write_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file, in the place of an older one once it is complete."""
    with replacing(Path(path)) as new, new.open("wb") as file:
        file.writelines(map(json_line, rows))


def json_line(value: Any, indent: int | None = None) -> bytes:
    """Return a JSON value in UTF-8 with a line break at its end: a line of a JSON-lines file."""
    try:
        return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate, as broken PDFs and models write it, exists in JSON but not in UTF-8
        return (json.dumps(value, indent=indent) + "\n").encode()


def _refuse_utf16(path: str | Path, start: bytes) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start[:4]:
        raise ValueError(f"{path} is in UTF-16 (or no text): save it as UTF-8")


@contextmanager
def sole_writer(path: Path, lock: Path) -> Iterator[None]:
    """Within it no other process writes `path`: the writer holds the file `lock`, which ends with its process.

    Raises RuntimeError where another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(lock, timeout=0).acquire()
    except Timeout:
        raise RuntimeError(f"another process is writing {path}: wait for it, or choose another place") from None
    with held:
        yield


@contextmanager
def appending(path: str | Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Within it, a function that appends one row to a JSON-lines file: in one write, whole or not at all.

    A half-written last line (the process was killed, the disk was full) is cut off first, with a warning. Raises
    RuntimeError where another process has the file open for this (`sole_writer`), ValueError for a file in UTF-16.
    """
    path = Path(path)
    with sole_writer(path, path.with_name(f".{path.name}.lock")), path.open("a+b", buffering=0) as file:
        data = path.read_bytes()
        _refuse_utf16(path, data)
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            try:
                json.loads(data[whole:])
                file.write(b"\n")
            except ValueError:
                logger.warning("%s ended in the middle of a line, which is dropped and made again", path)
                file.truncate(whole)

        def append(row: Mapping[str, Any]) -> None:
            line = json_line(row)
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
    """Within it, a path to write to, which takes the place of `path` if the block ends well and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def read_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return a JSON file's object, or None and why there is none."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None, "is missing"
    except (OSError, ValueError) as error:
        return None, f"cannot be read ({error})"
    return (read, "") if isinstance(read, dict) else (None, "is not a JSON object")


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write a JSON file, in the place of an older one once it is complete."""
    with replacing(Path(path)) as new:
        new.write_bytes(json_line(value, indent))


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file in UTF-8, in the place of an older one once it is complete; returns its path."""
    with replacing(Path(path)) as new:
        new.write_text(text, encoding="utf-8")
    return Path(path)


def fingerprint(*values: Any) -> str:
    """Return sixteen hexadecimal digits that stand for JSON values, in this order (others count as their text)."""
    lines = [json.dumps(value, sort_keys=True, default=str) + "\n" for value in values]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def check_settings(path: str | Path, settings: Mapping[str, Any], remedy: str = "choose another folder") -> None:
    """Keep what a folder's work is made with in the JSON file `path`, or compare it with what is kept there.

    settings: JSON values (others count as their text), nested as you like; None and an absent key are equal. A
        `fingerprint` stands for what is large, such as data.
    remedy: the end of the message: what to do about a difference

    Raises ValueError that names each difference, and where the file cannot be read.
    """
    path, now = Path(path), json.loads(json.dumps(settings, default=str))
    before, why = read_object(path)
    if why == "is missing":
        write_json(path, now, indent=1)
        return
    if before is None:
        raise ValueError(f"{path} {why}, so what {path.parent} was made with is unknown: {remedy}")
    if changes := list(_changes(before, now)):
        raise ValueError(f"{path.parent} was made with other settings ({'; '.join(changes)}): {remedy}")


def _changes(before: dict[str, Any], now: dict[str, Any], within: str = "") -> Iterator[str]:
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{within}{key}.")
        elif old != new and not (old != old and new != new):  # NaN is not equal to itself
            yield f"{within}{key} {old!r:.80}, now {new!r:.80}"


PROGRESS = "progress.json"


def report_progress(folder: str | Path, what: str, done: int, total: int) -> None:
    """Write into a run folder how far its long work has come, for whoever shows a progress bar."""
    write_json(Path(folder) / PROGRESS, {"what": what, "done": done, "total": total})


def read_progress(folder: str | Path) -> dict[str, Any] | None:
    """Return what `report_progress` wrote last: what, done, total; None where there is nothing yet."""
    return read_object(Path(folder) / PROGRESS)[0]


def results(folder: str | Path) -> dict[str, Any]:
    """Return the results of a finished run. Raises FileNotFoundError where it is not finished."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a finished run (no results.json): run its notebook to the end first")
    return json.loads(path.read_text())
