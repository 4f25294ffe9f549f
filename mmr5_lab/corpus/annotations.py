"""MMDocIR's annotation file: one document with its questions a line, parsed and checked."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmr5_lab.corpus.ids import CorpusError, question_id
from mmr5_lab.files import json_lines

_DOCUMENT_KEYS = {"doc_name", "domain", "page_indices", "questions", "split"}


_QUESTION_KEYS = {"Q", "A", "page_id", "type", "layout_mapping"}


def read_annotations(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file, line n", record) for each line that is not blank. Raises CorpusError like `json_lines`."""
    try:
        yield from json_lines(path)
    except ValueError as error:
        raise CorpusError(str(error)) from error


def name_and_domain(record: dict[str, Any], where: str) -> tuple[str, str]:
    for key in ("doc_name", "domain"):
        if not isinstance(record.get(key), str):
            raise CorpusError(f"{where}: {key} is missing or not a text")
    return record["doc_name"], record["domain"]


def parse_document(record: dict[str, Any], where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for `Corpus.documents` and its rows for `Corpus.questions`; `where` begins error messages."""
    name, domain = name_and_domain(record, where)
    if not isinstance(record.get("questions"), list):
        raise CorpusError(f"{where}: questions is missing or not a list")
    first, last = record["page_indices"]
    num_pages = last - first + 1
    if first < 0 or num_pages < 1:
        raise CorpusError(f"{where}: page_indices {[first, last]} of {name!r} is not a range of rows")
    document = {
        "doc_name": name, "domain": domain, "split": record.get("split", "eval"),
        "num_pages": num_pages, "first_row": first,
        "extra": {key: value for key, value in record.items() if key not in _DOCUMENT_KEYS},
    }  # fmt: skip
    questions = []
    for number, question in enumerate(record["questions"]):
        what = f"{where}: question {number} of {name!r}"
        if not isinstance(question, dict) or not isinstance(question.get("Q"), str):
            raise CorpusError(f"{what} has no text Q")
        gold = question.get("page_id")
        if not isinstance(gold, list) or not gold or not all(type(page) is int for page in gold):
            raise CorpusError(f"{what}: page_id is not a list of page numbers with at least one entry")
        for page in gold:
            if not 0 <= page < num_pages:
                raise CorpusError(f"{what}: gold page {page} does not exist; pages are 0 to {num_pages - 1}")
        questions.append(
            {
                "question_id": question_id(name, number), "doc_name": name, "domain": domain,
                "split": document["split"], "type": _parse_type(question.get("type"), what),
                "question": question["Q"], "answer": str(question.get("A", "")),
                "gold_pages": list(dict.fromkeys(gold)), "boxes": question.get("layout_mapping") or [],
                "extra": {key: value for key, value in question.items() if key not in _QUESTION_KEYS},
            }
        )  # fmt: skip
    return document, questions


def _parse_type(value: Any, what: str) -> tuple[str, ...]:
    """MMDocIR writes a type as one word (`text-only`), or as the text of a Python list, maybe empty."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise CorpusError(f"{what}: type {value!r} is neither a word nor a list of words") from error
    if isinstance(value, str):
        value = [value] if value else []
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)):
        raise CorpusError(f"{what}: type {value!r} is neither a word nor a list of words")
    return tuple(value or ())


def is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value)


def annotation_records(
    annotations: str | Path | Sequence[dict[str, Any]] | None,
) -> dict[str, dict[str, Any]]:
    """Annotation records by document name."""
    if annotations is None:
        return {}
    if isinstance(annotations, str | Path):
        path = Path(annotations)
        if not path.is_file():
            raise CorpusError(f"the annotation file {path} does not exist")
        pairs = list(read_annotations(path))
    else:
        pairs = [(f"annotation {number}", record) for number, record in enumerate(annotations)]
    records: dict[str, dict[str, Any]] = {}
    for where, record in pairs:
        name, _ = name_and_domain(record, where)
        if name in records:
            raise CorpusError(f"{where}: document {name!r} is annotated twice")
        records[name] = record
    return records
