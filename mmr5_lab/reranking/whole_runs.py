"""Rerank a whole first-stage run: resumable, one line a question as it is finished."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.rankings import Rankings, write_trec
from mmr5_lab.files import appending, check_settings, read_lines, report_progress
from mmr5_lab.reranking.pages import Pair, TextPage
from mmr5_lab.reranking.ranking import Ranker, Ranking, RemoteError, count_kinds
from mmr5_lab.rewards import format_reward, rank_reward

CHANNELS = ("image", "text", "both")  # how a page is shown
LONGEST_TEXT = 6000  # characters of a page's text that are shown: about the tokens of its image
CHUNK = 256  # questions whose pages are read together
PageBytes = Callable[[pd.Series, int], bytes]


def rerank_run(
    reranker: Ranker,
    corpus: Corpus,
    run: Rankings,
    folder: str | Path,
    name: str,
    *,
    mode: str = "reason",
    channel: str = "image",
    batch_size: int = 16,
    trec: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    page_bytes: PageBytes | None = None,
) -> pd.DataFrame:
    """Rerank every question of a first-stage run; one row a question, in the run's order.

    channel: what is shown of a page: its "image", its "text" (at most `LONGEST_TEXT` characters), or "both"
    settings: what the rankings depend on beside the candidates (model, adapter, …), kept in `<name>.settings.json`;
        going on with others is refused
    page_bytes: image file of a question's page (its row, 0-based page), in place of the corpus's own

    Columns: question_id, candidates, order (0-based places in them), pages (best first), text, think, faults,
    valid (no fault), scores, stability, tokens, seconds, and rank_reward, format_reward where a candidate is right.

    Writes into `folder`: `<name>.jsonl` as rankings finish (running again ranks only what is missing or has other
    candidates now), `<name>.trec` (or the file `trec`), and at the end `<name>.generations.parquet`. Raises
    ValueError for questions that the corpus does not have or that have no candidates, and for other settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    questions = corpus.by_id
    unknown = [question_id for question_id in run.pages if question_id not in questions]
    if unknown:
        raise ValueError(f"{corpus.folder} has no question {unknown[0]!r} ({len(unknown)} such in the run)")
    check_settings(
        folder / f"{name}.settings.json",
        {"mode": mode, **(settings or {}), **({"channel": channel} if channel != "image" else {})},
        f"choose another name to write to, or delete {name}.*",
    )
    done = _rank_missing(reranker, corpus, run, folder / f"{name}.jsonl", mode, batch_size, channel, page_bytes)
    frame = pd.DataFrame([done[question_id] for question_id in run.pages])
    write_trec(
        Rankings(dict(zip(frame["question_id"], frame["pages"], strict=True))),
        corpus,
        trec or folder / f"{name}.trec",
        "mmr5",
    )
    frame.to_parquet(folder / f"{name}.generations.parquet", index=False)
    return frame


def _rank_missing(
    reranker: Ranker,
    corpus: Corpus,
    run: Rankings,
    log: Path,
    mode: str,
    batch_size: int,
    channel: str,
    page_bytes: PageBytes | None,
) -> dict[str, dict[str, Any]]:
    """Return the row of each question, from the log where it stands there with the same candidates."""
    questions = corpus.by_id
    failures: dict[str, str] = {}
    with appending(log) as append, tqdm(total=len(run.pages), desc=log.stem) as bar:
        done = {
            row["question_id"]: row for row in read_lines(log) if row["candidates"] == run.pages.get(row["question_id"])
        }
        missing = [question_id for question_id in run.pages if question_id not in done]
        bar.n = bar.initial = len(done)
        for start in range(0, len(missing), CHUNK):  # images of one chunk at a time are in memory
            chunk = missing[start : start + CHUNK]
            pairs = [pair_of(corpus, questions[q], run.pages[q], page_bytes, channel) for q in chunk]
            try:
                for i, ranking in reranker.rank_each(pairs, mode, batch_size):
                    row = _row(questions[chunk[i]], run.pages[chunk[i]], ranking)
                    done[chunk[i]] = row
                    append(row)
                    bar.update()
                    report_progress(log.parent, log.stem, len(done), len(run.pages))
            except RemoteError as error:  # the other chunks are asked all the same
                failures |= {chunk[i]: reason for i, reason in error.failures.items()}
                if error.fatal:  # no other request would fare better
                    break
    if failures:
        question, reason = next(iter(failures.items()))
        raise RuntimeError(
            f"{len(run.pages) - len(done)} of {len(run.pages)} questions were not answered; the first is {question}:"
            f" {reason}. By kind: {count_kinds(failures.values())}."
            f" The others are in {log}: start again to ask for the rest"
        )
    return done


def sample_answers(
    reranker: Ranker, traces: Sequence[dict[str, Any]], folder: str | Path, mode: str = "reason"
) -> pd.DataFrame:
    """Return what a model writes for the prompts of some traces: columns query_id, text, faults, valid.

    The traces' image paths are relative to `folder`.
    """
    pairs = [(trace["query"], [Path(folder) / image for image in trace["images"]]) for trace in traces]
    rankings = reranker.rank_many(pairs, mode=mode)
    return pd.DataFrame({
        "query_id": [trace["query_id"] for trace in traces],
        "text": [ranking.text for ranking in rankings],
        "faults": [sorted(ranking.faults) for ranking in rankings],
        "valid": [not ranking.faults for ranking in rankings],
    })  # fmt: skip


def pair_of(
    corpus: Corpus,
    question: pd.Series,
    pages: Sequence[int],
    page_bytes: PageBytes | None = None,
    channel: str = "image",
) -> Pair:
    if channel not in CHANNELS:
        raise ValueError(f"unknown channel {channel!r}: choose one of {', '.join(CHANNELS)}")
    if not pages:
        raise ValueError(f"question {question['question_id']!r} has no candidates in the run")
    read = page_bytes or (lambda question, page: corpus.page_bytes(question["doc_name"], page))
    if channel == "image":
        return question["question"], [read(question, page) for page in pages]
    images = [read(question, page) if channel == "both" else None for page in pages]
    texts = [corpus.page_text(question["doc_name"], page)[:LONGEST_TEXT] for page in pages]
    return question["question"], [TextPage(text, image) for text, image in zip(texts, images, strict=True)]


def _row(question: pd.Series, pages: Sequence[int], ranking: Ranking) -> dict[str, Any]:
    pages = [int(page) for page in pages]  # numpy's, where the run comes from a parquet file: JSON does not take them
    positive_ids = [i for i, page in enumerate(pages, 1) if page in question["gold_pages"]]
    # a text about some of the candidates (the last window) has no reward for all of them
    rewarded = bool(positive_ids) and bool(ranking.text) and ranking.shown is None
    row = asdict(ranking)
    return {
        "question_id": question["question_id"],
        "candidates": pages,
        "pages": [pages[k] for k in ranking.order],
        "think": row.pop("reasoning"),
        **row,
        "faults": sorted(ranking.faults),
        "valid": not ranking.faults,
        "rank_reward": rank_reward([ranking.text], [positive_ids], [len(pages)])[0] if rewarded else None,
        "format_reward": format_reward([ranking.text], [positive_ids], [len(pages)])[0] if rewarded else None,
    }
