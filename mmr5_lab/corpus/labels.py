"""Which annotations belong to which PDF. Questions whose PDF is missing or unreadable are set aside, never dropped.

`set_aside.jsonl` in the corpus folder holds them, in MMDocIR's form; they return with their PDF.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmr5_lab.corpus.annotations import annotation_records, parse_document
from mmr5_lab.corpus.documents import ANNOTATIONS
from mmr5_lab.corpus.ids import CorpusError, name_key
from mmr5_lab.files import write_lines

SET_ASIDE = "set_aside.jsonl"
REPLACED = "replaced"  # key of a question in whose place passed annotations had others: it does not return by itself


class Label(NamedTuple):
    """An annotation record, the place where it stands, and whether it was passed by the caller."""

    where: str
    record: dict[str, Any]
    passed: bool


def read_labels(annotations: str | Path | Sequence[dict[str, Any]] | None, folder: Path) -> list[Label]:
    """Return the records of `annotations`, of the corpus folder, and of those set aside there, in this order.

    Raises CorpusError, naming file and line, for one that no document could have.
    """
    labels = [Label(*located, True) for located in annotation_records(annotations)]
    for path in (folder / ANNOTATIONS, folder / SET_ASIDE):
        for where, record in annotation_records(path) if path.is_file() else ():
            if path.name == ANNOTATIONS:
                record.pop("page_indices", None)  # rows of the page file there, which is made anew
            labels.append(Label(where, record, False))
    for label in labels:
        parse_document(label.record | {"page_indices": [0, 10**6]}, label.where)
    return labels


def match_labels(labels: list[Label], names: Sequence[str]) -> tuple[dict[str, list[Label]], list[Label]]:
    """Return the labels of each document, the first of which counts, and those of no document.

    Names are compared as they are, then by `name_key`, then without their folder where that is unambiguous. Raises
    CorpusError where two of the labels that were passed are of one document.
    """
    spellings: dict[str, set[str]] = {}
    for name in names:
        for spelling in (name_key(name), "/" + _base_key(name)):
            spellings.setdefault(spelling, set()).add(name)
    matched: dict[str, list[Label]] = {name: [] for name in names}
    unmatched = []
    for label in labels:
        name = label.record["doc_name"]
        keys = (name_key(name), "/" + _base_key(name))
        candidates = [{name}] if name in matched else [spellings.get(key, set()) for key in keys]
        if not (single := [names for names in candidates if len(names) == 1]):
            unmatched.append(label)
            continue
        [match] = single[0]
        if label.passed and matched[match]:
            first, other, _ = matched[match][0]
            raise CorpusError(
                f"{label.where}: document {name!r} is annotated twice, as {other['doc_name']!r} in {first}"
            )
        matched[match].append(label)
    return matched, unmatched


def not_among(labels: Iterable[Label], questions: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return records, one a document, with the questions of `labels` that are not among `questions`."""
    records: dict[str, dict[str, Any]] = {}
    for label in labels:
        record = records.setdefault(label.record["doc_name"], label.record | {"questions": []})
        record["questions"] = without_repeats([*record["questions"], *label.record["questions"]], questions)
    return [record for record in records.values() if record["questions"]]


def without_repeats(questions: Iterable[Any], known: Iterable[Any] = ()) -> list[Any]:
    """Return each question once that is not known; it is the same if its text and pages are."""
    unique: dict[str, Any] = {}
    for question in questions:
        unique.setdefault(json.dumps([question["Q"], question["page_id"]]), question)
    for question in known:
        unique.pop(json.dumps([question["Q"], question["page_id"]]), None)
    return list(unique.values())


def write_set_aside(records: list[dict[str, Any]], folder: Path) -> None:
    """Write the records that are set aside, or remove the file where there are none."""
    if records:
        write_lines(folder / SET_ASIDE, records)
    else:
        (folder / SET_ASIDE).unlink(missing_ok=True)


def _base_key(name: str) -> str:
    return name_key(name.replace("\\", "/").rpartition("/")[2])
