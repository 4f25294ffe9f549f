"""Data for both stages of training: reasoning traces for SFT, ranking prompts for GRPO.

A trace is one JSON line with `messages` and `images`, which ms-swift reads as it is
(https://swift.readthedocs.io, "Custom dataset"), plus our own fields:

    {"messages": [{"role": "system", …}, {"role": "user", …<image>…}, {"role": "assistant", …}],
     "images": [paths relative to the file], "query_id": …, "doc_name": …, "query": …, "candidates": [0-based pages],
     "positive_ids": [1-based], "teacher": …, "refined": false, "prompt_version": …}

Construction follows arXiv 2506.12364: questions whose top-n candidates hold at least one positive, candidates shuffled,
one `Image i: …` line a page by a teacher that knows the label, the answer with the positives first.
"""

import hashlib
import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from tqdm.auto import tqdm

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError, page_id
from mmr5_lab.corpus.rankings import Rankings
from mmr5_lab.files import appending, json_lines, replacing, report_progress, write_lines
from mmr5_lab.images import open_page
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import (
    PROMPT_VERSION,
    build_messages,
    completion_text,
    content_text,
    neutralise,
    shuffled,
)
from mmr5_lab.reranking.ranking import count_kinds
from mmr5_lab.traces.quality import MAX_WORDS, faults_of, near_duplicates
from mmr5_lab.traces.teachers import Teacher, TeacherError, think_lines

LONGEST_NAME = 100  # characters of a page's file name; longer ones are shortened to their beginning and a hash
_PAGE_FILES = threading.Lock()
_KEYS = {"messages", "images", "query_id", "query", "candidates", "prompt_version"}  # what every trace has
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # of broken text layers that a teacher quotes


@dataclass(frozen=True)
class Candidates:
    """The pages shown for one question: `pages` 0-based in prompt order, `positive_ids` 1-based places in it."""

    question: pd.Series
    pages: list[int]
    positive_ids: list[int]


def training_candidates(
    corpus: Corpus, run: Rankings, num_candidates: int = 5, seed: int = 0, shuffles: int = 1
) -> list[Candidates]:
    """Return the questions with a gold page among their first `num_candidates` pages, these pages shuffled.

    A shuffle depends on `seed`, the question and its turn alone, so adding questions does not move the others.
    shuffles: turns of each question, all questions before any comes again; an order that is drawn twice is taken once.
        0: the retriever's order stays (the paper's text and its code disagree on which was used)

    Raises ValueError for a question of the run that the corpus does not have, or where nothing remains.
    """
    rows = corpus.by_id
    if unknown := [question_id for question_id in run.pages if question_id not in rows]:
        raise ValueError(f"{corpus.folder} has no question {unknown[0]!r}: the run belongs to another corpus")
    distinct: dict[tuple[str, tuple[int, ...]], Candidates] = {}
    for turn, (question_id, ranked) in itertools.product(range(max(1, shuffles)), run.pages.items()):
        question, pages = rows[question_id], ranked[:num_candidates]
        if shuffles:
            pages = shuffled(pages, seed, question_id, turn)
        candidates = labelled(question, pages)
        if candidates.positive_ids:
            distinct.setdefault(_key(question_id, pages), candidates)
    if not distinct:
        raise ValueError(f"no question has a positive among its first {num_candidates} candidates: nothing to train on")
    return list(distinct.values())


def within_quota(candidates: list[Candidates], count: int, per_domain: int = 0) -> list[Candidates]:
    """Return at most `count` of them, in their order.

    per_domain: how many of each domain at most, all domains filled evenly (the paper: 1,200 of each training subset);
        0: the first `count`, whatever their domains
    """
    if not per_domain:
        return candidates[:count]
    domains = pd.Series([c.question["domain"] for c in candidates])
    turn = domains.groupby(domains).cumcount()
    chosen = turn[turn < per_domain].sort_values(kind="stable").index[:count]
    return [candidates[i] for i in sorted(chosen)]


def labelled(question: pd.Series, pages: list[int]) -> Candidates:
    """Return these pages of a question, in this order, with the places of the gold ones."""
    return Candidates(question, pages, [i for i, page in enumerate(pages, 1) if page in question["gold_pages"]])


def answer_ids(candidates: Candidates) -> list[int]:
    """Return a trace's answer: 1-based places of the gold pages, then the other places, both in prompt order."""
    places = range(1, len(candidates.pages) + 1)
    return sorted(places, key=lambda place: place not in candidates.positive_ids)


def make_traces(
    corpus: Corpus,
    candidates: list[Candidates],
    teacher: Teacher,
    path: str | Path,
    refined: bool = False,
    *,
    max_words: int = MAX_WORDS,
) -> Path:
    """Write one trace for each of `candidates` to `path` (JSON lines), page images beside it; return the path.

    max_words: words about a page before a trace is "too_long" (see `quality.FAULTS` for the other checks)

    Traces are appended as they are made, in the teacher's threads (`workers`, or one). At the end they are put into the
    order of `candidates`, and those with a fault, near-duplicates too, moved to `rejected_path(path)`, with `faults`.
    Running again asks the teacher only for what is missing, also after a kill.

    Raises ValueError, naming the line, where a finished line is not a trace or was made otherwise (another teacher,
    other prompts); RuntimeError at the end for pages that the teacher did not explain, or where another process is
    writing the file; BudgetError and TeacherGoneError as soon as the teacher does. What was made is kept.
    """
    path = Path(path)
    failures: list[tuple[str, str]] = []
    fatal: BaseException | None = None
    stopped = threading.Event()

    def make(chosen: Candidates) -> dict[str, Any] | None:
        return None if stopped.is_set() else _trace(corpus, chosen, teacher, path.parent, refined)

    with appending(path) as append:
        finished = [*read_traces(path), *read_traces(rejected_path(path))]
        _check_same(path, finished, teacher.name, refined)
        done = {_key(trace["query_id"], trace["candidates"]) for trace in finished}
        missing = [c for c in candidates if _key(c.question["question_id"], c.pages) not in done]
        total = len(candidates)
        bar = tqdm(total=total, initial=total - len(missing), desc="traces", disable=not missing)
        try:
            with bar, ThreadPoolExecutor(getattr(teacher, "workers", 1)) as pool:
                futures = {pool.submit(make, chosen): chosen for chosen in missing}
                try:
                    for future in as_completed(futures):
                        error = future.exception()
                        if isinstance(error, TeacherError | CorpusError):  # one page must not cost the others
                            failures.append((futures[future].question["question_id"], str(error)))
                        elif error:
                            fatal = fatal or error
                            stopped.set()
                        elif trace := future.result():
                            append(trace)
                            bar.update()
                            report_progress(path.parent, "traces", bar.n, total)
                finally:
                    stopped.set()  # requests under way are waited for: they are paid for, and their answers kept
        finally:
            _sort_out(corpus, path, candidates, max_words)
    if fatal:
        raise fatal
    if failures:
        question, reason = failures[0]
        raise RuntimeError(
            f"{len(failures)} of {total} traces were not made; the first is {question}: {reason}. By kind:"
            f" {count_kinds(why for _, why in failures)}. The others are in {path}: start again to ask for the rest"
        )
    return path


def rejected_path(path: str | Path) -> Path:
    """Return where traces with faults are kept, such as `traces.rejected.jsonl`."""
    return Path(path).with_suffix(f".rejected{Path(path).suffix}")


def read_traces(path: str | Path) -> list[dict[str, Any]]:
    """Return the traces of a file; [] where there is none. Raises ValueError, naming the line, for what is no trace."""
    traces = []
    for where, trace in json_lines(path, drop_half=True) if Path(path).exists() else ():
        if missing := _KEYS - trace.keys():
            raise ValueError(f"{where} is not a trace: it has no {', '.join(sorted(missing))}")
        traces.append(trace)
    return traces


def sft_dataset(path: str | Path, reasoning: bool = True) -> datasets.Dataset:
    """Return traces as trl's `SFTTrainer` takes them: columns `prompt`, `completion` (messages) and `images`.

    reasoning: False: an empty think block before the answer, as mode "direct" opens it
    `build_messages` and `open_page` make prompt and images, the images when a row is read, so that training, RL and
    inference share both. Raises ValueError for traces that were made with other prompt texts.
    """
    folder, rows = Path(path).parent, []
    for trace in read_traces(path):
        if trace["prompt_version"] != PROMPT_VERSION:
            raise ValueError(
                f"{path}: trace {trace['query_id']!r} was made with prompts {trace['prompt_version']},"
                f" now they are {PROMPT_VERSION}: make the traces again"
            )
        completion = trace["messages"][-1]["content"]
        if not reasoning:
            completion = completion_text("", parse_ranking(completion, len(trace["images"])).answer or ())
        rows.append({
            "prompt": build_messages(trace["query"], len(trace["images"])),
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": completion}]}],
            "images": [str(folder / image) for image in trace["images"]],
        })  # fmt: skip
    # not datasets.Image, whose decoding is another: 16-bit pages came out blank
    return datasets.Dataset.from_list(rows).with_transform(_open_images)


def _open_images(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if "images" not in rows:  # only other columns are read
        return rows
    return rows | {"images": [[open_page(image) for image in images] for images in rows["images"]]}


class PromptReader:
    """Makes trl's examples of rows of prompts when they are drawn; with a `seed` every `epoch` has its own orders."""

    def __init__(self, corpus: Corpus, seed: int | None):
        self.corpus, self.seed, self.epoch = corpus, seed, 0

    def __getstate__(self) -> tuple[str, int | None]:
        """What datasets tells one reader from another by; it never makes one of it."""
        return str(self.corpus.folder), self.seed

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images: dict[tuple[str, int], Any] = {}  # a prompt stands in a batch once for each of its completions
        examples = []
        for question_id, pages in zip(rows["query_id"], rows["pages"], strict=True):
            question = self.corpus.by_id[question_id]
            doc_name = question["doc_name"]
            if self.seed is not None:
                pages = shuffled(pages, self.seed, question_id, self.epoch)
            for page in pages:
                if (doc_name, page) not in images:
                    images[doc_name, page] = self.corpus.page_image(doc_name, page)
            examples.append({
                "prompt": build_messages(question["question"], len(pages)),
                "images": [images[doc_name, page] for page in pages],
                "positive_ids": labelled(question, pages).positive_ids,
                "num_candidates": len(pages),
                "query_id": question_id,
                "candidates": pages,
            })  # fmt: skip
        return {name: [example[name] for example in examples] for name in examples[0]}


def rl_dataset(corpus: Corpus, candidates: list[Candidates], seed: int | None = None) -> datasets.Dataset:
    """Return prompts as trl's `GRPOTrainer` takes them, made by a `PromptReader` as they are drawn.

    Columns: `prompt` (messages), `images`, `positive_ids`, `num_candidates`, `query_id`, `candidates` (0-based pages in
    the prompt's order). seed: of the orders, new ones each epoch; None: the candidates' order stays
    """
    rows = [{"query_id": c.question["question_id"], "pages": c.pages} for c in candidates]
    return datasets.Dataset.from_list(rows).with_transform(PromptReader(corpus, seed))


def _key(query_id: str, pages: list[int]) -> tuple[str, tuple[int, ...]]:
    return query_id, tuple(pages)


def _check_same(path: Path, made: list[dict[str, Any]], teacher: str, refined: bool) -> None:
    """Refuse to go on with a file that was begun otherwise."""
    ways = {"teacher": teacher, "refined": refined, "prompt_version": PROMPT_VERSION}
    for trace in made:
        other = [f"{key} {trace.get(key)!r}, now {value!r}" for key, value in ways.items() if trace.get(key) != value]
        if other:
            raise ValueError(f"{path} holds traces made otherwise ({'; '.join(other)}): choose another file to write")


def _sort_out(corpus: Corpus, path: Path, candidates: list[Candidates], max_words: int) -> None:
    """Put the traces of both files in order, each into the one where it belongs; those of no candidates come last."""
    rejected = rejected_path(path)
    order = {_key(c.question["question_id"], c.pages): place for place, c in enumerate(candidates)}
    made = {_key(t["query_id"], t["candidates"]): t for t in [*read_traces(path), *read_traces(rejected)]}
    sound, faulty = [], []
    for _, trace in sorted(made.items(), key=lambda item: order.get(item[0], len(order))):
        trace = {name: value for name, value in trace.items() if name not in ("faults", "repeats")}
        texts = [corpus.page_text(trace["doc_name"], page) for page in trace["candidates"]]
        faults = faults_of(trace, texts, max_words)
        faulty.append(trace | {"faults": faults}) if faults else sound.append(trace)
    again = near_duplicates(sound)
    faulty += [sound[k] | {"faults": ["near_duplicate"], "repeats": sound[j]["query_id"]} for k, j in again.items()]
    if faulty or rejected.exists():
        write_lines(path, [*sound, *faulty])  # first all in one file, so that a kill loses none
        write_lines(rejected, faulty)
    write_lines(path, [trace for k, trace in enumerate(sound) if k not in again])


def _trace(corpus: Corpus, chosen: Candidates, teacher: Teacher, folder: Path, refined: bool) -> dict[str, Any]:
    question, positives = chosen.question, chosen.positive_ids
    images = [_page_file(corpus, question["doc_name"], page, folder) for page in chosen.pages]
    explain = teacher.refine if refined else partial(think_lines, teacher)
    think = _CONTROL.sub("", neutralise(explain(question, chosen.pages, positives)))
    prompt = build_messages(question["question"], len(chosen.pages))
    return {
        "messages": swift_messages(prompt, completion_text(think, answer_ids(chosen))),
        "images": images,
        "query_id": question["question_id"],
        "doc_name": question["doc_name"],
        "query": question["question"],
        "candidates": chosen.pages,
        "positive_ids": positives,
        "teacher": teacher.name,
        "refined": refined,
        "prompt_version": PROMPT_VERSION,
    }


def swift_messages(messages: list[dict[str, Any]], completion: str) -> list[dict[str, str]]:
    """Return chat messages and a completion as ms-swift has them: strings, with `<image>` where an image stands."""
    prompt = [{"role": message["role"], "content": content_text(message["content"], "<image>")} for message in messages]
    return [*prompt, {"role": "assistant", "content": completion}]


def _page_file(corpus: Corpus, doc_name: str, page: int, folder: Path) -> str:
    """Write the page's image below `folder`, once; return its path relative to it."""
    name = page_id(doc_name, page)
    if len(name) > LONGEST_NAME:  # percent signs triple a name, and file systems take 255 bytes
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    with _PAGE_FILES:
        for kind in ("jpeg", "png"):
            if (folder / f"pages/{name}.{kind}").exists():
                return f"pages/{name}.{kind}"
        data, kind = corpus.page_file(doc_name, page)
        with replacing(folder / f"pages/{name}.{kind}") as new:
            new.write_bytes(data)
    return f"pages/{name}.{kind}"
