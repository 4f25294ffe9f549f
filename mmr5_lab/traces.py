"""Data for both stages of training: reasoning traces for SFT, ranking prompts for GRPO.

A trace is one JSON line with `messages` and `images`, which ms-swift reads as it is
(https://swift.readthedocs.io, "Custom dataset"), plus our own fields:

    {"messages": [{"role": "system", …}, {"role": "user", …<image>…}, {"role": "assistant", …}],
     "images": ["pages/doc_p0003.png", …], "query_id": …, "doc_name": …, "query": …, "candidates": [0-based pages],
     "positive_ids": [1-based], "teacher": …, "refined": false, "prompt_version": …}

Image paths are relative to the file. Construction follows arXiv 2506.12364: questions whose top-n candidates
hold at least one positive, candidates shuffled, one `Image i: …` line a page by a teacher that knows the
label, the answer with the positives first and the rest in candidate order.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from tqdm.auto import tqdm

from mmr5_lab.corpus import Corpus, page_id
from mmr5_lab.prompts import PROMPT_VERSION, build_messages, completion_text
from mmr5_lab.retrieve import Run
from mmr5_lab.runs import read_lines
from mmr5_lab.teachers import Teacher


@dataclass(frozen=True)
class Candidates:
    """The pages shown for one question: `pages` 0-based in prompt order, `positive_ids` 1-based places in it."""

    question: pd.Series
    pages: list[int]
    positive_ids: list[int]


def training_candidates(
    corpus: Corpus, run: Run, num_candidates: int = 5, seed: int = 0, shuffles: int = 1
) -> list[Candidates]:
    """Questions with at least one positive among their first `num_candidates` pages, these pages shuffled.

    A shuffle depends on `seed`, the question and its turn alone, so adding questions does not move the others. With
    `shuffles` > 1 each question has that many turns, all questions before any comes again; an order that is drawn
    twice is taken once. With 0 the retriever's order stays: the paper's text and its code disagree on which was used.

    Raises ValueError for a question of the run that the corpus does not have, or where nothing remains.
    """
    rows = corpus.by_id
    unknown = [question_id for question_id in run.pages if question_id not in rows]
    if unknown:
        raise ValueError(
            f"the run has question {unknown[0]!r}, which {corpus.folder} does not: it belongs to another corpus"
        )
    chosen: dict[tuple[str, tuple[int, ...]], Candidates] = {}  # by question and order, each once
    for turn, (question_id, ranked) in itertools.product(range(max(1, shuffles)), run.pages.items()):
        question, pages = rows[question_id], ranked[:num_candidates]
        if shuffles:
            pages = random.Random(f"{seed} {question_id} {turn}").sample(pages, len(pages))
        positive_ids = [i for i, page in enumerate(pages, 1) if page in question["gold_pages"]]
        if positive_ids:
            chosen.setdefault((question_id, tuple(pages)), Candidates(question, pages, positive_ids))
    if not chosen:
        raise ValueError(f"no question has a positive among its first {num_candidates} candidates: nothing to train on")
    return list(chosen.values())


def make_traces(
    corpus: Corpus, candidates: list[Candidates], teacher: Teacher, path: str | Path, refined: bool = False
) -> Path:
    """Write one trace for each of `candidates` to `path` (JSON lines), page images beside it; returns the path.

    Running again asks the teacher only for what is missing: finished lines stay, a half-written last line (the
    process was killed) is dropped. Raises ValueError, naming the line, where a finished line is not a trace.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(trace["query_id"], tuple(trace["candidates"])) for trace in read_traces(path)}
    missing = [c for c in candidates if (c.question["question_id"], tuple(c.pages)) not in done]
    with path.open("a", encoding="utf-8") as file:
        for chosen in tqdm(missing, desc="traces", initial=len(done), total=len(candidates), disable=not missing):
            trace = _trace(corpus, chosen, teacher, path.parent, refined)
            file.write(json.dumps(trace, ensure_ascii=False) + "\n")
            file.flush()
    return path


def read_traces(path: str | Path) -> list[dict[str, Any]]:
    """The traces of a file, one dict a line. Raises ValueError naming the line that is not a trace."""
    traces = read_lines(Path(path))
    for number, trace in enumerate(traces, 1):
        missing = {"messages", "images", "query_id", "query", "candidates", "prompt_version"} - trace.keys()
        if missing:
            raise ValueError(f"{path}, line {number} is not a trace: it has no {', '.join(sorted(missing))}")
    return traces


def sft_dataset(path: str | Path) -> datasets.Dataset:
    """Traces as trl's `SFTTrainer` takes them: columns `prompt`, `completion` (messages) and `images`.

    The prompt is built anew by `build_messages` from the trace's query, so that training, RL and inference
    share one builder. Raises ValueError for traces that were made with other prompt texts.
    """
    rows = []
    for trace in read_traces(path):
        if trace["prompt_version"] != PROMPT_VERSION:
            raise ValueError(
                f"{path}: trace {trace['query_id']!r} was made with prompts {trace['prompt_version']},"
                f" now they are {PROMPT_VERSION}: make the traces again"
            )
        completion = trace["messages"][-1]["content"]
        rows.append({
            "prompt": build_messages(trace["query"], len(trace["images"])),
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": completion}]}],
            "images": [str(Path(path).parent / image) for image in trace["images"]],
        })  # fmt: skip
    return _with_images(rows)


def rl_dataset(corpus: Corpus, candidates: list[Candidates]) -> datasets.Dataset:
    """Prompts as trl's `GRPOTrainer` takes them: `prompt`, `images`, `positive_ids`, `num_candidates`."""
    return _with_images([
        {
            "prompt": build_messages(c.question["question"], len(c.pages)),
            "images": [{"bytes": corpus.page_bytes(c.question["doc_name"], page), "path": None} for page in c.pages],
            "positive_ids": c.positive_ids,
            "num_candidates": len(c.pages),
            "query_id": c.question["question_id"],
        }
        for c in candidates
    ])  # fmt: skip


def _with_images(rows: list[dict[str, Any]]) -> datasets.Dataset:
    data = datasets.Dataset.from_list(rows)
    return data.cast_column("images", datasets.List(datasets.Image()))


def _trace(corpus: Corpus, chosen: Candidates, teacher: Teacher, folder: Path, refined: bool) -> dict[str, Any]:
    question, positives = chosen.question, chosen.positive_ids
    if refined:
        think = teacher.refine(question, chosen.pages, positives)
    else:
        lines = [
            f"Image {i}: {teacher.explain(question, page, i in positives)}" for i, page in enumerate(chosen.pages, 1)
        ]
        think = "\n".join(lines)
    order = positives + [i for i in range(1, len(chosen.pages) + 1) if i not in positives]
    system, user = build_messages(question["question"], len(chosen.pages))
    return {
        "messages": [
            {"role": "system", "content": _swift_text(system)},
            {"role": "user", "content": _swift_text(user)},
            {"role": "assistant", "content": completion_text(think, order)},
        ],
        "images": [_page_file(corpus, question["doc_name"], page, folder) for page in chosen.pages],
        "query_id": question["question_id"],
        "doc_name": question["doc_name"],
        "query": question["question"],
        "candidates": chosen.pages,
        "positive_ids": positives,
        "teacher": teacher.name,
        "refined": refined,
        "prompt_version": PROMPT_VERSION,
    }


def _swift_text(message: dict[str, Any]) -> str:
    """A message as ms-swift writes it: one string with `<image>` where each image stands."""
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"])


def _page_file(corpus: Corpus, doc_name: str, page: int, folder: Path) -> str:
    """The page's image as a file below `folder`; returns its path relative to it."""
    data = corpus.page_bytes(doc_name, page)
    corpus.page_image(doc_name, page)  # a trace on an image that cannot be decoded would fail only in training
    suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
    relative = Path("pages") / f"{page_id(doc_name, page)}.{suffix}"
    if not (folder / relative).exists():
        (folder / "pages").mkdir(exist_ok=True)
        temporary = folder / f"{relative}.tmp"
        temporary.write_bytes(data)
        temporary.replace(folder / relative)
    return str(relative)
