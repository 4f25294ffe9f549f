"""Can a ranking be trusted? Other orders of the same candidates, and pages blanked, swapped and taken away.

    orders = order_audit(reranker, corpus, run, folder, shuffles=5)
    position_bias(orders, corpus)                            # is a place in the prompt liked?
    order_effects(orders, corpus)                            # by question: does the top page change?
    compare({"one order": order_runs(orders), "consensus": …}, corpus)     # what does fusing the orders gain?

    probes = probe(reranker, corpus, run, folder)
    faithfulness(probe_effects(probes, corpus))              # does the text follow the page, the answer the text?

Rankings are made with `rerank_run.rerank_run`, so they are kept as they come and resumed.
"""

import io
import random
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.rankings import Rankings
from mmr5_lab.evaluation.errors import records
from mmr5_lab.evaluation.metrics import bootstrap_interval, per_question
from mmr5_lab.images import open_page
from mmr5_lab.prompting.answers import reasoning_by_image
from mmr5_lab.prompting.verdicts import verdict
from mmr5_lab.reranking.ranking import Ranker
from mmr5_lab.reranking.strategies import fused, places_of_turn, stability
from mmr5_lab.reranking.whole_runs import rerank_run

AS_SHOWN = "as shown"
PROBES = ("blank", "swap", "remove")


def order_audit(
    reranker: Ranker,
    corpus: Corpus,
    run: Rankings,
    folder: str | Path,
    *,
    shuffles: int = 5,
    seed: int = 0,
    mode: str = "reason",
    batch_size: int = 16,
    settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Rerank each question's candidates in `shuffles` orders: the given one (turn 0), then drawn ones.

    Returns the rows of `rerank_run` for every order, and "turn". An order depends on `seed` and the question alone.
    Raises ValueError for fewer than two orders, and as `rerank_run`.
    """
    if shuffles < 2:
        raise ValueError(f"shuffles is {shuffles}: an audit needs at least two orders of the candidates")
    frames = []
    for turn in range(shuffles):
        places = {q: places_of_turn(len(pages), turn, seed, q) for q, pages in run.pages.items()}
        order = Rankings({q: [run.pages[q][k] for k in at] for q, at in places.items()})
        asked = {"seed": seed, **(settings or {})}
        frame = rerank_run(
            reranker, corpus, order, folder, f"order-{turn}", mode=mode, batch_size=batch_size, settings=asked
        )
        frames.append(frame.assign(turn=turn))
    return pd.concat(frames, ignore_index=True)


def position_bias(orders: pd.DataFrame, corpus: Corpus, samples: int = 2000) -> pd.DataFrame:
    """Is the page at some place of the prompt ranked first more often, and found less often when it is right?

    One row a place (from 1). "first": share of rankings whose first page was shown there, with "first low" and "first
    high" (95 %, documents resampled); "even": the share without any liking; "shown": rankings with that place. "found":
    of the rankings with a gold page there, the share that puts it first, with "found low", "found high", "gold" (how
    many). Only drawn orders count: in the retriever's own, early places hold the easier pages. Intervals are NaN where
    all questions are of one document.
    """
    drawn = orders[orders["turn"] > 0]
    documents = np.array([corpus.by_id[question]["doc_name"] for question in drawn["question_id"]])
    gold = [set(corpus.by_id[question]["gold_pages"]) for question in drawn["question_id"]]
    candidates, tops = [list(pages) for pages in drawn["candidates"]], [pages[0] for pages in drawn["pages"]]
    sizes = np.array([len(pages) for pages in candidates])
    rows = {}
    for place in range(1, sizes.max() + 1):
        there = [pages[place - 1] if len(pages) >= place else None for pages in candidates]
        shown = sizes >= place
        right = np.array([page in its for page, its in zip(there, gold, strict=True)])
        first = np.array([page == top for page, top in zip(there, tops, strict=True)], dtype=float)
        row = {"even": (1 / sizes[shown]).mean(), "shown": int(shown.sum()), "gold": int(right.sum())}
        for name, part in (("first", shown), ("found", right)):
            mean, low, high = _mean(first[part], documents[part], samples)
            row |= {name: mean, f"{name} low": low, f"{name} high": high}
        rows[place] = row
    columns = ["first", "first low", "first high", "even", "shown", "found", "found low", "found high", "gold"]
    return pd.DataFrame.from_dict(rows, orient="index")[columns].rename_axis("place")


def order_effects(orders: pd.DataFrame, corpus: Corpus) -> pd.DataFrame:
    """One row a question: how much the order of its candidates decides.

    Columns: question_id, doc_name, domain, type; "orders"; "tops" (different pages ranked first); "changed" (share of
    the drawn orders whose first page is not that of the given one); "stability" (mean Kendall tau); "R@1" (mean over
    the orders); "consensus R@1" (of `consensus`).
    """
    part = corpus.with_questions(orders["question_id"])
    single = [per_question(run, part, [1])["R@1"] for run in order_runs(orders)]
    merged = consensus(orders)
    figures = per_question(dict(zip(merged["question_id"], merged["pages"], strict=True)), part, [1])
    frame = figures[["question_id", "doc_name", "domain", "type"]].copy()
    turns = {q: group.sort_values("turn") for q, group in orders.groupby("question_id")}
    tops = {q: [pages[0] for pages in group["pages"]] for q, group in turns.items()}
    frame["orders"] = [len(tops[q]) for q in frame["question_id"]]
    frame["tops"] = [len(set(tops[q])) for q in frame["question_id"]]
    frame["changed"] = [float(np.mean([top != tops[q][0] for top in tops[q][1:]])) for q in frame["question_id"]]
    frame["stability"] = [stability(_places(turns[q])) for q in frame["question_id"]]
    frame["R@1"] = np.mean(single, axis=0)
    frame["consensus R@1"] = figures["R@1"]
    return frame


def order_runs(orders: pd.DataFrame) -> list[dict[str, list[int]]]:
    """One run an order, as `compare.compare` takes several seeds of a system."""
    return [dict(zip(turn["question_id"], map(list, turn["pages"]), strict=True)) for _, turn in orders.groupby("turn")]


def consensus(orders: pd.DataFrame) -> pd.DataFrame:
    """The orders of each question fused (Borda), and what they cost together.

    Columns: question_id, candidates (in the given order), pages, tokens, seconds (sums), turn 0's other rows are lost.
    """
    rows = []
    for question, group in orders.groupby("question_id", sort=False):
        turns = group.sort_values("turn")
        candidates = list(turns["candidates"].iloc[0])
        order, _ = fused(_places(turns))
        rows.append({
            "question_id": question, "candidates": candidates, "pages": [candidates[k] for k in order],
            "tokens": turns["tokens"].sum(), "seconds": turns["seconds"].sum(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def probe(
    reranker: Ranker,
    corpus: Corpus,
    run: Rankings,
    folder: str | Path,
    *,
    seed: int = 0,
    mode: str = "reason",
    batch_size: int = 16,
    settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Rerank each question as it is shown and under three changes that a faithful reranker must react to, or not.

    - "blank": its gold pages are white paper;
    - "swap": its first gold candidate changes places with another, drawn by `seed` and question;
    - "remove": its gold pages are not among the candidates.

    Returns the rows of `rerank_run`, and "probe" (`AS_SHOWN` or one of `PROBES`) and "target" (that first gold page).
    Questions without a gold and another candidate are left out: nothing can be probed there. Raises ValueError where
    none remains, and as `rerank_run`.
    """
    gold = {q: [page for page in pages if page in corpus.by_id[q]["gold_pages"]] for q, pages in run.pages.items()}
    asked = {q: list(pages) for q, pages in run.pages.items() if 0 < len(gold[q]) < len(pages)}
    if not asked:
        raise ValueError("no question has both a right and a wrong candidate: there is nothing to probe")
    swapped, removed = {}, {}
    for question, pages in asked.items():
        other = random.Random(f"{seed} {question}").choice([page for page in pages if page not in gold[question]])
        exchange = {gold[question][0]: other, other: gold[question][0]}
        swapped[question] = [exchange.get(page, page) for page in pages]
        removed[question] = [page for page in pages if page not in gold[question]]

    def paper(question: pd.Series, page: int) -> bytes:
        data = corpus.page_bytes(question["doc_name"], page)
        return blank_page(data) if page in question["gold_pages"] else data

    candidates = {AS_SHOWN: asked, "blank": asked, "swap": swapped, "remove": removed}
    frames = []
    for name, pages_of in candidates.items():
        frame = rerank_run(
            reranker,
            corpus,
            Rankings(pages_of),
            folder,
            f"probe-{name.replace(' ', '-')}",
            mode=mode,
            batch_size=batch_size,
            settings={"seed": seed, "probe": name, **(settings or {})},
            page_bytes=paper if name == "blank" else None,
        )
        frames.append(frame.assign(probe=name, target=[gold[q][0] for q in frame["question_id"]]))
    return pd.concat(frames, ignore_index=True)


def probe_effects(probes: pd.DataFrame, corpus: Corpus) -> pd.DataFrame:
    """What each probe did to each question; one row a question and probe, `AS_SHOWN` included.

    Columns: question_id, doc_name, domain, probe, and as 0, 1 or NaN where it cannot be said:

    - "top page stays": the page ranked first is the one of `AS_SHOWN`;
    - "right page first": the target is ranked first;
    - "called relevant": the text calls the target relevant (`trace_quality.verdict`, which reads words, not
      meaning);
    - "calls some relevant": the text calls any page relevant;
    - "answer follows text": the page ranked first is one that the text calls relevant; NaN where it calls none.

    And from 0 to 1, against `AS_SHOWN`: "its text stays", the share of the words about the target that are the same
    (`difflib`'s ratio), and "other text stays", the mean of that over the other pages; NaN where neither says anything.
    """
    rows = []
    for question, group in probes.groupby("question_id", sort=False):
        probed = {record["probe"]: record for record in records(group)}
        before = _said(probed[AS_SHOWN])
        for name, record in probed.items():
            said, target, first = _said(record), record["target"], record["pages"][0]
            called = {page: verdict(text) for page, text in said.items()}
            relevant = [page for page, says in called.items() if says]
            here = target in list(record["candidates"])
            others = [_alike(before.get(p, ""), said.get(p, "")) for p in record["candidates"] if p != target]
            rows.append({
                "question_id": question, "doc_name": corpus.by_id[question]["doc_name"],
                "domain": corpus.by_id[question]["domain"], "probe": name,
                "top page stays": float(first == probed[AS_SHOWN]["pages"][0]),
                "right page first": float(first == target) if here else np.nan,
                "called relevant": _number(called.get(target)) if here else np.nan,
                "calls some relevant": float(bool(relevant)) if called else np.nan,
                "answer follows text": float(first in relevant) if relevant else np.nan,
                "its text stays": _alike(before.get(target, ""), said.get(target, "")) if here else np.nan,
                "other text stays": _mean_known(others),
            })  # fmt: skip
    return pd.DataFrame(rows)


def faithfulness(effects: pd.DataFrame, samples: int = 2000) -> pd.DataFrame:
    """Means of `probe_effects`, one row a probe and measure: probe, measure, mean, low, high (95 %), questions.

    questions: those where it can be said. What a faithful reranker does: under "blank" the page is no longer called
    relevant nor ranked first, and the text of the others stays; under "swap" nothing changes; under "remove" no page is
    called relevant; and always the answer follows the text.
    """
    measures = [name for name in effects if name not in ("question_id", "doc_name", "domain", "probe")]
    rows = []
    for name in (AS_SHOWN, *PROBES):
        part = effects[effects["probe"] == name]
        for measure in measures:
            known = part[part[measure].notna()]
            if len(known) and not (name == AS_SHOWN and measure.endswith("stays")):
                mean, low, high = _mean(known[measure].to_numpy(), known["doc_name"].to_numpy(), samples)
                rows.append({"probe": name, "measure": measure, "mean": mean, "low": low, "high": high,
                             "questions": len(known)})  # fmt: skip
    return pd.DataFrame(rows)


def blank_page(data: bytes) -> bytes:
    """White paper of an image's size, as a PNG file."""
    file = io.BytesIO()
    Image.new("RGB", open_page(data).size, "white").save(file, "PNG")
    return file.getvalue()


def _said(record: Mapping[str, Any]) -> dict[int, str]:
    """What the reasoning says of each page."""
    candidates = list(record["candidates"])
    shown = record.get("shown")
    images = candidates if shown is None else [candidates[k] for k in shown]
    return {images[i - 1]: text for i, text in reasoning_by_image(record["think"] or "", len(images)).items()}


def _places(turns: pd.DataFrame) -> list[list[int]]:
    """Each turn's order, as places in the candidates of the first turn."""
    candidates = list(turns["candidates"].iloc[0])
    return [[candidates.index(page) for page in pages] for pages in turns["pages"]]


def _alike(before: str, after: str) -> float:
    """Share of words that two texts have in common, in order; NaN for two empty ones."""
    if not before and not after:
        return np.nan
    return SequenceMatcher(None, before.split(), after.split(), autojunk=False).ratio()


def _number(known: bool | None) -> float:
    return np.nan if known is None else float(known)


def _mean_known(values: Iterable[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def _mean(values: np.ndarray, documents: Sequence[str] | np.ndarray, samples: int) -> tuple[float, float, float]:
    """Mean and its interval over documents; NaN without values, and an interval of NaN for a single document."""
    if not len(values):
        return np.nan, np.nan, np.nan
    if len(set(documents)) < 2:
        return float(np.mean(values)), np.nan, np.nan
    return (float(np.mean(values)), *bootstrap_interval(values, documents, samples))
