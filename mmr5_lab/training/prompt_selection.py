"""The prompts that GRPO learns from: the first ones, as many of every image size, or those of a medium pass rate.

A group whose completions all earn the same reward teaches nothing. With a pass rate p the G completions of a prompt are
all right or all wrong with probability p^G + (1 - p)^G: at p = .9 and G = 4 that is .66.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.files import appending, read_lines, report_progress
from mmr5_lab.images import page_size
from mmr5_lab.prompting.prompts import shuffled
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.rewards import rank_reward
from mmr5_lab.traces.construction import Candidates, labelled

SELECTIONS = ("all", "balanced", "pass_rate")
CHUNK = 16  # prompts sampled together, and anew if the process is killed among them


def select_prompts(
    candidates: Sequence[Candidates],
    corpus: Corpus,
    how: str,
    count: int,
    folder: str | Path,
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    samples: int = 4,
    temperature: float = 1.0,
    sample_top_k: int = 0,
    max_completion: int = 2048,
    max_pixels: int = 0,
    seed: int = 0,
) -> list[Candidates]:
    """Return at most `count` of the prompts, in their order.

    how: "all" takes the first; "balanced" takes equally many of each image size as long as there are any (arXiv
        2506.12364 balances its 3,000 prompts so); "pass_rate" takes them in balanced order and keeps those that `model`
        (with `adapter`) answers rightly in some of `samples` completions and wrongly in others, until there are enough
    folder: keeps `pass_rates.<process>.jsonl`, from which an interrupted selection resumes

    With several processes each samples its share. Raises ValueError for another `how` and where no prompt remains.
    """
    if how not in SELECTIONS:
        raise ValueError(f"there is no selection {how!r}: choose one of {', '.join(SELECTIONS)}")
    if how == "all":
        return list(candidates[:count])
    order = balanced(image_sizes(corpus, candidates))
    if how == "balanced":
        return [candidates[i] for i in sorted(order[:count])]
    device = str(PartialState().device)
    ranker = Reranker.from_pretrained(
        model,
        adapter,
        device=device,
        max_pixels=max_pixels or None,
        temperature=temperature,
        max_new_tokens=max_completion,
    )
    # As GRPO will sample. The penalty is the model's own default otherwise, 1.05 for Qwen2.5-VL.
    ranker.generation |= {"top_k": sample_top_k, "repetition_penalty": 1.0}
    rates = pass_rates(ranker, corpus, [candidates[i] for i in order], Path(folder), samples, count, seed)
    kept = set(rates.loc[rates["passes"].between(1, samples - 1), "query_id"].head(count))
    if not kept:
        raise ValueError(
            f"of {len(rates)} prompts the model answers none rightly in some of {samples} completions and wrongly in"
            " others, so GRPO has nothing to learn from: train SFT for longer (all wrong) or take harder prompts (all"
            " right)"
        )
    return [c for c in candidates if c.question["question_id"] in kept]


def image_sizes(corpus: Corpus, candidates: Sequence[Candidates]) -> list[float]:
    """Return the mean pixels of each prompt's pages."""
    shown = {(c.question["doc_name"], page) for c in candidates for page in c.pages}
    pixels = {(name, page): math.prod(page_size(corpus.page_bytes(name, page))) for name, page in shown}
    return [sum(pixels[c.question["doc_name"], page] for page in c.pages) / len(c.pages) for c in candidates]


def balanced(sizes: Sequence[float]) -> list[int]:
    """Return all indices, one of each size bin (2^b to 2^(b+1) pixels) in turn: any beginning of them is balanced."""
    bins = pd.Series(np.floor(np.log2(sizes)))
    turn = bins.groupby(bins).cumcount()
    return pd.DataFrame({"turn": turn, "bin": bins}).sort_values(["turn", "bin"], kind="stable").index.tolist()


def pass_rates(
    ranker: Reranker,
    corpus: Corpus,
    candidates: Sequence[Candidates],
    folder: Path,
    samples: int = 4,
    enough: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how often a sampled answer puts the right pages first.

    Columns: query_id, passes (of `samples`), pages (in this order). Stops when `enough` prompts have passed in part;
    None: goes through all. The samples of a chunk depend on `seed` and its prompts alone.
    """
    process = PartialState()
    path = folder / f"pass_rates.{process.process_index}.jsonl"
    done = {row["query_id"]: row for row in gather_object(read_lines(path))}
    chunks = [candidates[i : i + CHUNK] for i in range(0, len(candidates), CHUNK)]
    rows: list[dict] = []
    bar = tqdm(total=len(candidates), desc="pass rates", disable=not process.is_main_process)
    with appending(path) as append:
        for start in range(0, len(chunks), process.num_processes):
            own_rows: list[dict] = []
            if (number := start + process.process_index) < len(chunks):
                own_rows = _sampled(ranker, corpus, chunks[number], samples, seed + number, done)
                for row in own_rows:
                    if row["query_id"] not in done:
                        append(row)
            rows += gather_object(own_rows)
            bar.update(len(rows) - bar.n)
            if process.is_main_process:
                report_progress(folder, "pass rates", len(rows), len(candidates))
            if enough is not None and sum(0 < row["passes"] < samples for row in rows) >= enough:
                break
    bar.close()
    return pd.DataFrame(rows)


def _sampled(ranker, corpus: Corpus, chunk, samples: int, seed: int, done: dict[str, dict]) -> list[dict]:
    """Return a chunk's rows of `pass_rates`: all those that are done, or all anew, since they are drawn together."""
    ids = [c.question["question_id"] for c in chunk]
    if all(question_id in done for question_id in ids):
        return [done[question_id] for question_id in ids]
    shown = [labelled(c.question, shuffled(c.pages, seed, c.question["question_id"], 0)) for c in chunk]
    pairs = [
        (c.question["question"], [corpus.page_bytes(c.question["doc_name"], page) for page in c.pages]) for c in shown
    ]
    ranker.seed = seed
    rankings = ranker.rank_many([pair for pair in pairs for _ in range(samples)], batch_size=CHUNK)
    rows = []
    for k, c in enumerate(shown):
        texts = [ranking.text for ranking in rankings[k * samples : (k + 1) * samples]]
        earned = rank_reward(texts, [c.positive_ids] * samples, [len(c.pages)] * samples)
        rows.append({"query_id": ids[k], "passes": sum(reward > 1 - 1e-9 for reward in earned), "pages": c.pages})
    return rows
