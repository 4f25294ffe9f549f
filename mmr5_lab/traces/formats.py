"""Traces for other trainers, and back: ms-swift, VLM-R1, trl, and a `datasets` folder with its card.

    export_traces("traces.jsonl", "out/swift.jsonl", "swift")
    import_traces("out/swift.jsonl", "swift", "again/traces.jsonl")

| format | written | read by |
|---|---|---|
| swift | JSON lines: messages with `<image>`, images | ms-swift, "Custom dataset" (https://swift.readthedocs.io) |
| vlm-r1 | JSON lines: image, conversations; the answer holds the right ids | VLM-R1's `grpo_jsonl.py`, for RL |
| trl | JSON lines: prompt, completion, images | `SFTTrainer`, images cast to `datasets.Image` |
| datasets | a folder of parquet with the images in it, and README.md | `datasets.load_dataset(folder)` |

Image paths are relative to the written file (VLM-R1: `--image_folders` that folder). The fields of our own stand beside
each format's, where trainers pass over them, so that what is read back equals what was written. Records of others,
without these fields, are taken over as far as they tell: question and ranking from their texts.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.table import embed_table_storage

from mmr5_lab.files import read_lines, replacing, write_lines
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import PROMPT_VERSION, asked_question, build_messages, content_text
from mmr5_lab.traces.construction import read_traces, rejected_path, swift_messages
from mmr5_lab.traces.quality import dataset_card

FORMATS = ("swift", "vlm-r1", "trl", "datasets")
SHARD = 200  # traces a parquet file
OWN = ("query_id", "doc_name", "query", "candidates", "positive_ids", "teacher", "refined", "prompt_version")


def export_traces(path: str | Path, out: str | Path, form: str) -> Path:
    """Write a file of traces as `form` (one of `FORMATS`) to the file, or for "datasets" the folder, `out`.

    Raises ValueError for an unknown format, a file without traces, and like `traces.read_traces`.
    """
    path, out = Path(path), Path(out)
    _check(form)
    traces = read_traces(path)
    if not traces:
        raise ValueError(f"{path} holds no traces: nothing to export")
    if form == "datasets":
        rows = [_trl(trace, [str(path.parent / image) for image in trace["images"]]) for trace in traces]
        data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
        out.mkdir(parents=True, exist_ok=True)
        count = -(-len(data) // SHARD)
        for k in range(count):  # one shard's images at a time are in memory
            shard = data.shard(count, k, contiguous=True).with_format("arrow")
            shard = shard.map(embed_table_storage, batched=True, keep_in_memory=True)
            shard.to_parquet(out / f"train-{k:05}-of-{count:05}.parquet")
        card = dataset_card(traces, read_traces(rejected_path(path)), path.stem)
        (out / "README.md").write_text(card, encoding="utf-8")
        return out
    shape = {"swift": _swift, "vlm-r1": _vlm_r1, "trl": _trl}[form]
    write_lines(out, (shape(trace, _moved(trace["images"], path.parent, out.parent)) for trace in traces))
    return out


def import_traces(source: str | Path, form: str, out: str | Path) -> Path:
    """Read a file (or folder) of `form` into a file of traces; returns its path.

    Prompts are built anew from the question, as everywhere here. What a record of others does not tell is left empty:
    its right ids, its document. Raises ValueError, naming the record, where a question, an answer with reasoning, or
    the images are not to be found, and for an unknown format.
    """
    source, out = Path(source), Path(out)
    _check(form)
    records = _embedded(source, out.parent) if form == "datasets" else read_lines(source)
    traces = []
    for number, record in enumerate(records, 1):
        images, question, completion = _read(form, record)
        asked = str(record.get("query") or asked_question(question) or "")
        needed = {"images": images, "question": asked, "reasoning": completion}
        lacking = [name for name, found in needed.items() if not found]
        if lacking:
            raise ValueError(f"{source}, record {number}: no {' and no '.join(lacking)} to be found in it as {form}")
        folder = out.parent if form == "datasets" else source.parent
        own = {name: record[name] for name in OWN if record.get(name) is not None}
        traces.append({
            "messages": swift_messages(build_messages(asked, len(images)), completion),
            "images": _moved(images, folder, out.parent),
            "query_id": f"import:q{number}", "doc_name": "", "query": asked, "candidates": list(range(len(images))),
            "positive_ids": [], "teacher": "unknown", "refined": False, "prompt_version": PROMPT_VERSION,
        } | own)  # fmt: skip
    write_lines(out, traces)
    return out


def _check(form: str) -> None:
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}: choose one of {', '.join(FORMATS)}")


def _own(trace: dict[str, Any]) -> dict[str, Any]:
    return {name: trace[name] for name in OWN}


def _swift(trace: dict[str, Any], images: list[str]) -> dict[str, Any]:
    return {"messages": trace["messages"], "images": images, **_own(trace)}


def _vlm_r1(trace: dict[str, Any], images: list[str]) -> dict[str, Any]:
    """What is rewarded stands in the answer: the right ids. The reasoning stays beside it."""
    return {
        "id": trace["query_id"],
        "image": images,
        "conversations": [
            {"from": "human", "value": trace["messages"][1]["content"]},
            {"from": "gpt", "value": str(trace["positive_ids"])},
        ],
        "completion": trace["messages"][-1]["content"],
        **_own(trace),
    }


def _trl(trace: dict[str, Any], images: list[str]) -> dict[str, Any]:
    completion = [{"role": "assistant", "content": [{"type": "text", "text": trace["messages"][-1]["content"]}]}]
    prompt = build_messages(trace["query"], len(images))
    return {"prompt": prompt, "completion": completion, "images": images, **_own(trace)}


def _read(form: str, record: dict[str, Any]) -> tuple[list[str], str, str]:
    """Images, question's text and completion of a record; "" and [] where they are not as the format has them."""
    try:
        if form == "swift":
            texts = {message["role"]: message["content"] for message in record["messages"]}
            images, question, completion = record["images"], texts["user"], texts["assistant"]
        elif form == "vlm-r1":
            said = {turn["from"]: turn["value"] for turn in record["conversations"]}
            images, question, completion = record["image"], said["human"], record.get("completion") or said["gpt"]
        else:
            images = record["images"]
            question, completion = (content_text(record[key][-1]["content"]) for key in ("prompt", "completion"))
    except (KeyError, IndexError, TypeError):
        return [], "", ""
    images = [images] if isinstance(images, str) else list(images)
    return images, question, completion if parse_ranking(str(completion), len(images)).think else ""


def _embedded(folder: Path, out: Path) -> Iterator[dict[str, Any]]:
    """The rows of a datasets folder, their images written below `out`, by content, each once."""
    files = sorted(str(path) for path in folder.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no parquet files: is it a datasets folder?")
    data = datasets.Dataset.from_parquet(files)
    assert isinstance(data, datasets.Dataset)
    for row in data.cast_column("images", datasets.List(datasets.Image(decode=False))):
        names = []
        for image in row["images"]:
            name = Path("pages") / Path(image["path"] or f"{hashlib.sha256(image['bytes']).hexdigest()}.png").name
            if not (out / name).exists():
                with replacing(out / name) as new:
                    new.write_bytes(image["bytes"])
            names.append(str(name))
        yield {**row, "images": names}


def _moved(images: Iterable[str], source: Path, out: Path) -> list[str]:
    """Paths relative to one folder, as paths relative to another; absolute ones stay."""
    return [i if os.path.isabs(i) else Path(os.path.relpath(source / i, out)).as_posix() for i in images]
