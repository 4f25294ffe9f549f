"""Traces for other trainers, and back: ms-swift, VLM-R1, trl, and a `datasets` folder with its card.

    export_traces("traces.jsonl", "out/swift.jsonl", "swift")
    import_traces("out/swift.jsonl", "swift", "again/traces.jsonl")

| format | written | read by |
|---|---|---|
| swift | JSON lines: messages with `<image>`, images | ms-swift, "Custom dataset" (https://swift.readthedocs.io) |
| swift-reranker | JSON lines: positive_messages, negative_messages and their images | ms-swift, "Reranker" |
| vlm-r1 | JSON lines: image, conversations; the answer holds the right ids | VLM-R1's `grpo_jsonl.py`, for RL |
| trl | JSON lines: prompt, completion, images | `SFTTrainer`, images cast to `datasets.Image` |
| datasets | a folder of parquet with the images in it, and README.md | `datasets.load_dataset(folder)` |

Image paths are relative to the written file (VLM-R1: `--image_folders` that folder). Our own fields stand beside each
format's, where trainers ignore them, so that what is read back equals what was written. Records of others lack them:
their question and ranking are read from their texts.
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.table import embed_table_storage

from mmr5_lab.files import read_lines, replacing, write_lines, write_text
from mmr5_lab.images import plain_file
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import PROMPT_VERSION, asked_question, build_messages, content_text
from mmr5_lab.traces.construction import read_traces, rejected_path, swift_messages
from mmr5_lab.traces.quality import dataset_card

FORMATS = ("swift", "swift-reranker", "vlm-r1", "trl", "datasets")
SHARD = 200  # traces a parquet file
# a URL, or base64 text: PNG, JPEG, GIF, WebP, or very long
_NO_PATH = re.compile(r"data:|[a-zA-Z][a-zA-Z0-9+.-]+://|iVBORw0KGgo|/9j/4|R0lGOD|UklGR|[A-Za-z0-9+/=\s]{400}")
OWN = ("query_id", "doc_name", "query", "candidates", "positive_ids", "teacher", "refined", "prompt_version")


def export_traces(path: str | Path, out: str | Path, form: str) -> Path:
    """Write a file of traces as `form` (one of `FORMATS`) to the file, or for "datasets" the folder, `out`.

    Raises ValueError for an unknown format, a file without traces, and like `traces.read_traces`.
    """
    path, out = Path(path), Path(out)
    traces = read_traces(path)
    if not traces:
        raise ValueError(f"{path} holds no traces: nothing to export")
    if form == "datasets":
        rows = [_shaped(form, trace, [str(path.parent / image) for image in trace["images"]]) for trace in traces]
        data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
        out.mkdir(parents=True, exist_ok=True)
        count = -(-len(data) // SHARD)
        for k in range(count):  # one shard's images at a time are in memory
            shard = data.shard(count, k, contiguous=True).with_format("arrow")
            shard = shard.map(embed_table_storage, batched=True, keep_in_memory=True)
            shard.to_parquet(out / f"train-{k:05}-of-{count:05}.parquet")
        write_text(out / "README.md", dataset_card(traces, read_traces(rejected_path(path)), path.stem))
        return out
    write_lines(out, (_shaped(form, trace, _moved(trace["images"], path.parent, out.parent)) for trace in traces))
    return out


def import_traces(source: str | Path, form: str, out: str | Path) -> Path:
    """Read a file (or folder) of `form` into the file of traces `out`; return its path.

    Prompts are built anew from the question. What a record does not say, such as its gold pages, is left empty. Images
    may be paths or dictionaries with `path` or `bytes`; bytes are written to files beside `out`.

    Raises ValueError, naming the record, for one without question, images or reasoning, one with more or fewer
    `<image>` tags than images (none at all stand for all of them, as in ms-swift), one whose answer is not a
    permutation of 1..n in the form asked for, and an image in another form.
    """
    _check(form)
    source, out = Path(source), Path(out)
    records = _parquet_rows(source) if form == "datasets" else read_lines(source)
    folder = source if form == "datasets" else source.parent
    traces = []
    for number, record in enumerate(records, 1):
        try:
            traces.append({"query_id": f"import:q{number}"} | _trace(form, record, folder, out.parent))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}, record {number}: {error}") from None
    write_lines(out, traces)
    return out


def _check(form: str) -> None:
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}: choose one of {', '.join(FORMATS)}")


def _shaped(form: str, trace: dict[str, Any], images: list[str]) -> dict[str, Any]:
    """Return a trace as a record of a format, with our own fields beside it."""
    _check(form)
    own = {name: trace[name] for name in OWN}
    prompt, completion = trace["messages"][1]["content"], trace["messages"][-1]["content"]
    if form == "swift":
        return {"messages": trace["messages"], "images": images} | own
    if form == "swift-reranker":  # a page is a document by itself; the reasoning about all of them stands beside
        record: dict[str, Any] = {"messages": [{"role": "user", "content": trace["query"]}]}
        for kind, wanted in (("positive", True), ("negative", False)):
            pages = [[image] for place, image in enumerate(images, 1) if (place in trace["positive_ids"]) is wanted]
            record[f"{kind}_messages"] = [[{"role": "assistant", "content": "<image>"}] for _ in pages]
            record[f"{kind}_images"] = pages
        return record | {"completion": completion} | own
    if form == "vlm-r1":  # rewards the gold pages' ids; the reasoning stands beside them
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": str(trace["positive_ids"])}]
        return {"id": trace["query_id"], "image": images, "conversations": turns, "completion": completion} | own
    answer = [{"role": "assistant", "content": [{"type": "text", "text": completion}]}]
    return {"prompt": build_messages(trace["query"], len(images)), "completion": answer, "images": images} | own


def _trace(form: str, record: dict[str, Any], source: Path, out: Path) -> dict[str, Any]:
    """A record of another form as a trace; images are looked for below `source` and named, or written, below `out`."""
    images, prompt, completion = _parts(form, record)
    asked = prompt if form == "swift-reranker" else asked_question(prompt)
    query, count = record.get("query") or asked, len(images)
    if not (images and query and isinstance(query, str)):
        raise ValueError(f"no images or no question to be found in it as {form}")
    if prompt.count("<image>") not in (0, count):
        raise ValueError(f"it has {prompt.count('<image>')} <image> tags and {count} images")
    ranking = parse_ranking(completion, count)
    if ranking.faults:
        written, faults = list(ranking.answer or ()), ", ".join(sorted(ranking.faults))
        raise ValueError(
            f"its answer {written} is not reasoning and a permutation of 1 to {count} in the form asked for ({faults})"
        )
    own = {name: record[name] for name in OWN if record.get(name) is not None}
    if len(own.get("candidates", images)) != count or not set(own.get("positive_ids", ())) <= set(range(1, count + 1)):
        raise ValueError(f"its candidates or positive_ids do not belong to {count} images")
    return {
        "messages": swift_messages(build_messages(query, count), completion),
        "images": [_image_file(image, f"image {place}", source, out) for place, image in enumerate(images, 1)],
        "doc_name": "", "query": query, "candidates": list(range(count)), "positive_ids": [],
        "teacher": "unknown", "refined": False, "prompt_version": PROMPT_VERSION,
    } | own  # fmt: skip


def _parts(form: str, record: dict[str, Any]) -> tuple[list[Any], str, str]:
    """Images, prompt and completion of a record; [] and "" where it does not have them as the format does."""
    try:
        if form == "swift-reranker":
            pages = {True: iter(record["positive_images"]), False: iter(record["negative_images"])}
            count = len(record["positive_images"]) + len(record["negative_images"])
            gold = record.get("positive_ids") or range(1, len(record["positive_images"]) + 1)
            images = [next(pages[place in gold])[0] for place in range(1, count + 1)]
            prompt, completion = record["messages"][-1]["content"], record.get("completion") or ""
        elif form == "vlm-r1":
            turns = {turn["from"]: turn["value"] for turn in record["conversations"]}
            images, prompt, completion = record["image"], turns["human"], record.get("completion") or turns["gpt"]
        else:
            messages = record["messages"] if form == "swift" else [*record["prompt"], *record["completion"]]
            texts = {message["role"]: content_text(message["content"], "<image>") for message in messages}
            images, prompt, completion = record["images"], texts["user"], texts["assistant"]
        return images if isinstance(images, list) else [images], str(prompt), str(completion)
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration):
        return [], "", ""


def _image_file(image: Any, where: str, source: Path, out: Path) -> str:
    """An image's path relative to `out`; one that is given by its bytes is written there."""
    if isinstance(image, Mapping) and image.get("bytes"):
        data = image["bytes"]
        data, kind = plain_file(base64.b64decode(data, validate=True) if isinstance(data, str) else data, where)
        name = f"pages/{hashlib.sha256(data).hexdigest()[:32]}.{kind}"
        if not (out / name).exists():
            with replacing(out / name) as new:
                new.write_bytes(data)
        return name
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str) or not path or _NO_PATH.match(path):
        raise ValueError(
            f"{where} is {image!r:.60}; expected the path of a file, or a dictionary with path or bytes"
            " (save as a file what is behind a URL or in base64 text)"
        )
    return _moved([path], source, out)[0]


def _parquet_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a datasets folder, with their images as dictionaries of path and bytes."""
    files = sorted(str(path) for path in folder.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no parquet files: is it a datasets folder?")
    data = datasets.Dataset.from_parquet(files)
    assert isinstance(data, datasets.Dataset)
    yield from data.cast_column("images", datasets.List(datasets.Image(decode=False)))


def _moved(images: Iterable[str], source: Path, out: Path) -> list[str]:
    """Paths relative to one folder, as paths relative to another; absolute ones stay."""
    return [i if os.path.isabs(i) else Path(os.path.relpath(source / i, out)).as_posix() for i in images]
