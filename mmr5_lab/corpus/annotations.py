"""MMDocIR's annotation file: one document with its questions a line, parsed and checked."""

import ast
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmr5_lab.corpus.ids import CorpusError, question_id
from mmr5_lab.files import json_lines

_DOCUMENT_KEYS = {"doc_name", "domain", "page_indices", "questions", "split"}
_PATIENCE = 10  # seconds
_QUESTION_KEYS = {"Q", "A", "page_id", "type", "layout_mapping"}


def read_annotations(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file, line n", record) of each line that is not blank. Raises CorpusError for what is not JSON."""
    try:
        yield from json_lines(path)
    except ValueError as error:
        raise CorpusError(str(error)) from error


def annotation_records(annotations: str | Path | Sequence[dict[str, Any]] | None) -> list[tuple[str, dict[str, Any]]]:
    """Return the place of each annotation record, for messages, and the record.

    Raises CorpusError for a file that does not exist and a record without name or domain.
    """
    if isinstance(annotations, str | Path):
        if not Path(annotations).is_file():
            raise CorpusError(f"the annotation file {annotations} does not exist")
        records = list(read_annotations(Path(annotations)))
    else:
        records = [(f"annotation {number}", record) for number, record in enumerate(annotations or [])]
    for where, record in records:
        name_and_domain(record, where)
    return records


@contextmanager
def annotations_lock(path: Path) -> Iterator[None]:
    """Within it, no other process changes an annotation file. Raises CorpusError where one does for ten seconds."""
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=_PATIENCE):
            yield
    except Timeout:
        raise CorpusError(f"another process is changing {path}, such as mmr5 ingest: try again when it ends") from None


def name_and_domain(record: dict[str, Any], where: str) -> tuple[str, str]:
    for key in ("doc_name", "domain"):
        if not isinstance(record.get(key), str):
            raise CorpusError(f"{where}: {key} is missing or not a text: {json.dumps(record.get(key)):.60}")
    return record["doc_name"], record["domain"]


def parse_document(record: dict[str, Any], where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a row for `Corpus.documents` and its rows for `Corpus.questions`; `where` begins error messages.

    Raises CorpusError, naming question, value and likely cause, for what does not fit.
    """
    name, domain = name_and_domain(record, where)
    if not isinstance(record.get("questions"), list):
        raise CorpusError(f"{where}: questions is missing or not a list, for {name!r}")
    rows: Any = record.get("page_indices")
    if not is_pair(rows) or not 0 <= rows[0] <= rows[1]:
        raise CorpusError(
            f"{where}: page_indices is not [first row, last row] for {name!r}, but {json.dumps(rows):.60}"
        )
    first, num_pages = rows[0], rows[1] - rows[0] + 1
    _check_text(record, f"{where}: the record of {name!r}")
    document = {
        "doc_name": name, "domain": domain, "split": record.get("split", "eval"),
        "num_pages": num_pages, "first_row": first,
        "extra": {key: value for key, value in record.items() if key not in _DOCUMENT_KEYS},
    }  # fmt: skip
    questions = []
    for number, question in enumerate(record["questions"]):
        what = f"{where}: question {number} of {name!r}"
        if not isinstance(question, dict) or not isinstance(question.get("Q"), str):
            raise CorpusError(f"{what} has no text Q: {json.dumps(question):.80}")
        answer = question.get("A")
        questions.append(
            {
                "question_id": question_id(name, number), "doc_name": name, "domain": domain,
                "split": document["split"], "type": _parse_type(question.get("type"), what),
                "question": question["Q"], "answer": "" if answer is None else str(answer),
                "gold_pages": _parse_gold(question.get("page_id"), num_pages, what, question["Q"]),
                "boxes": question.get("layout_mapping") or [],
                "extra": {key: value for key, value in question.items() if key not in _QUESTION_KEYS},
            }
        )  # fmt: skip
    return document, questions


def _parse_gold(value: Any, num_pages: int, what: str, text: str) -> list[int]:
    """Return the gold pages, each once. Texts and fractions are refused: nobody knows where they count from."""
    if not isinstance(value, list) or not value or not all(type(page) is int for page in value):
        raise CorpusError(
            f"{what}: page_id is not a list of page numbers with at least one entry, but {json.dumps(value):.60} "
            f"({text[:60]!r}); write integers that count from 0, such as [0, 4]"
        )
    for page in value:
        if not 0 <= page < num_pages:
            cause = "; are its pages counted from 1?" if page == num_pages and 0 not in value else ""
            raise CorpusError(
                f"{what}: gold page {page} does not exist; pages are 0 to {num_pages - 1} ({text[:60]!r}){cause}"
            )
    return list(dict.fromkeys(value))


def _parse_type(value: Any, what: str) -> tuple[str, ...]:
    """MMDocIR writes a type as one word (`text-only`), or as the text of a Python list, maybe empty."""
    try:
        listed = isinstance(value, str) and value.lstrip().startswith("[")
        parsed = ast.literal_eval(value) if listed else [value] if isinstance(value, str) and value else value or []
        if not all(isinstance(kind, str) for kind in parsed):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise CorpusError(f"{what}: type {value!r} is neither a word nor a list of words") from None
    return tuple(parsed)


def _check_text(record: dict[str, Any], what: str) -> None:
    """Raise CorpusError for half a surrogate pair, which JSON can hold and no file that is written later."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        before = error.object[max(0, error.start - 30) : error.start]
        half = error.object[error.start]
        raise CorpusError(f"{what} has half a character ({half!r}) after {before!r}: delete what was cut") from None


def is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value)
