"""Can a ranking be trusted? Other orders of the same candidates, and tests with perturbed pages.

    orders = order_audit(reranker, corpus, candidates, folder, shuffles=5)
    position_bias(orders, corpus)                            # is a place in the prompt preferred?
    order_effects(orders)                                    # by question: does the top page change?
    compare({"one order": order_runs(orders), "consensus": …}, corpus)     # what does fusing the orders gain?

    perturbed = perturbation_test(reranker, corpus, candidates, folder)
    faithfulness(perturbation_effects(perturbed, corpus))    # does the text follow the page, the answer the text?

Rankings are made with `reranking.whole_runs.rerank_run`, so each is kept when it is finished, and resumed.
"""

import io
import random
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.rankings import Rankings
from mmr5_lab.evaluation.errors import pages_by_question, records
from mmr5_lab.evaluation.significance import bootstrap_interval
from mmr5_lab.images import open_page
from mmr5_lab.prompting.reasons import reasoning_by_image
from mmr5_lab.prompting.verdicts import verdict
from mmr5_lab.reranking.ranking import Ranker
from mmr5_lab.reranking.strategies import fused, places_of_turn, stability
from mmr5_lab.reranking.whole_runs import rerank_run

AS_SHOWN = "as shown"
PERTURBATIONS = ("blank", "swap", "remove")


def order_audit(
    reranker: Ranker,
    corpus: Corpus,
    run: Rankings,
    folder: str | Path,
    *,
    shuffles: int = 5,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Rerank each question's candidates in `shuffles` orders: as they are in `run` (turn 0), then drawn ones.

    options: as `rerank_run`'s (settings, mode, batch_size)

    Returns the rows of `rerank_run` for every order, and "turn". An order depends on `seed` and the question alone.
    Raises ValueError for fewer than two orders, and as `rerank_run`.
    """
    if shuffles < 2:
        raise ValueError(f"shuffles is {shuffles}: an audit needs at least two orders of the candidates")
    options["settings"] = {"seed": seed, **options.get("settings", {})}
    frames = []
    for turn in range(shuffles):
        shown = {q: [pages[k] for k in places_of_turn(len(pages), turn, seed, q)] for q, pages in run.pages.items()}
        frame = rerank_run(reranker, corpus, Rankings(shown), folder, f"order-{turn}", **options)
        frames.append(frame.assign(turn=turn))
    return pd.concat(frames, ignore_index=True)


def position_bias(orders: pd.DataFrame, corpus: Corpus, samples: int = 2000) -> pd.DataFrame:
    """Measure whether a place in the prompt is ranked first more often, and found less often when it is right.

    One row a place (from 1). "first": share of rankings whose first page was shown there, with "first low" and "first
    high" (95 %, documents resampled); "even": the share without any preference; "shown": rankings with that place.
    "found": of the rankings with a gold page there, the share that puts it first, with "found low", "found high",
    "gold" (how many). Only drawn orders count: in the retriever's own, early places hold the easier pages. Intervals
    are NaN where all questions are of one document. Raises ValueError without drawn orders.
    """
    rows = []
    for q, shown, pages, turn in orders[["question_id", "candidates", "pages", "turn"]].itertuples(index=False):
        question = corpus.by_id[q]
        rows += [
            (place, float(page == pages[0]), page in question["gold_pages"], 1 / len(shown), question["doc_name"])
            for place, page in enumerate(shown, 1)
            if turn > 0
        ]
    if not rows:
        raise ValueError("there are no drawn orders (turn 1 and up): make some with order_audit")
    pages = pd.DataFrame(rows, columns=["place", "first", "is_gold", "even", "doc_name"])
    table = {}
    for place, part in pages.groupby("place"):
        gold = part[part["is_gold"]]
        row = table[place] = {"even": part["even"].mean(), "shown": len(part), "gold": len(gold)}
        for name, some in (("first", part), ("found", gold)):
            ends = (name, f"{name} low", f"{name} high")
            row.update(zip(ends, _mean(some["first"], some["doc_name"], samples), strict=True))
    columns = ["first", "first low", "first high", "even", "shown", "found", "found low", "found high", "gold"]
    return pd.DataFrame.from_dict(table, orient="index")[columns].rename_axis("place")


def order_effects(orders: pd.DataFrame) -> pd.DataFrame:
    """Measure, question by question, how much the order of its candidates decides.

    Index: question_id; columns: "changed" (share of the drawn orders whose first page is not that of turn 0) and
    "stability" (mean Kendall tau of all orders).
    """
    rows = {}
    for question, turns in orders.sort_values("turn").groupby("question_id", sort=False):
        first, *others = (pages[0] for pages in turns["pages"])
        changed = float(np.mean([page != first for page in others]))
        rows[question] = {"changed": changed, "stability": stability(_places(turns))}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("question_id")


def order_runs(orders: pd.DataFrame) -> list[dict[str, list[int]]]:
    """Return the rankings of each order, as `comparison.compare` takes several seeds of a system."""
    return [pages_by_question(turn) for _, turn in orders.groupby("turn")]


def consensus(orders: pd.DataFrame) -> pd.DataFrame:
    """Fuse the orders of each question (Borda count) and add up what they cost.

    Columns: question_id, candidates (as in turn 0), pages, tokens, seconds (sums).
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


def perturbation_test(
    reranker: Ranker, corpus: Corpus, run: Rankings, folder: str | Path, *, seed: int = 0, **options: Any
) -> pd.DataFrame:
    """Rerank each question as it is shown and under three changes that a faithful reranker must react to, or not.

    - "blank": its gold pages are white paper;
    - "swap": its first gold candidate changes places with another, drawn by `seed` and question;
    - "remove": its gold pages are not among the candidates.

    options: as `rerank_run`'s (settings, mode, batch_size)

    Returns the rows of `rerank_run`, and "perturbation" (`AS_SHOWN` or one of `PERTURBATIONS`) and "target" (that
    first gold page). Questions without a gold and another candidate are left out: nothing can be tested there. Raises
    ValueError where none remains, and as `rerank_run`.
    """
    gold = {q: [page for page in pages if page in corpus.by_id[q]["gold_pages"]] for q, pages in run.pages.items()}
    shown = {q: list(pages) for q, pages in run.pages.items() if 0 < len(gold[q]) < len(pages)}
    if not shown:
        raise ValueError("no question has both a right and a wrong candidate: there is nothing to test")
    swapped, removed = {}, {}
    for question, pages in shown.items():
        removed[question] = [page for page in pages if page not in gold[question]]
        other = random.Random(f"{seed} {question}").choice(removed[question])
        exchange = {gold[question][0]: other, other: gold[question][0]}
        swapped[question] = [exchange.get(page, page) for page in pages]

    def blanked(question: pd.Series, page: int) -> bytes:
        data = corpus.page_bytes(question["doc_name"], page)
        return blank_page(data) if page in question["gold_pages"] else data

    frames = []
    for name, candidates in {AS_SHOWN: shown, "blank": shown, "swap": swapped, "remove": removed}.items():
        settings = {"seed": seed, "perturbation": name, **options.get("settings", {})}
        shown_as = {"page_bytes": blanked} if name == "blank" else {}
        file = f"perturbed-{name.replace(' ', '-')}"
        all_options = {**options, **shown_as, "settings": settings}
        frame = rerank_run(reranker, corpus, Rankings(candidates), folder, file, **all_options)
        frames.append(frame.assign(perturbation=name, target=[gold[q][0] for q in frame["question_id"]]))
    return pd.concat(frames, ignore_index=True)


def perturbation_effects(perturbed: pd.DataFrame, corpus: Corpus) -> pd.DataFrame:
    """Measure what each perturbation did; one row a question and perturbation, `AS_SHOWN` included.

    Columns: question_id, doc_name, domain, perturbation, and as 0, 1 or NaN where it cannot be said:

    - "top page stays": the page ranked first is the one of `AS_SHOWN`;
    - "right page first": the target is ranked first;
    - "called relevant": the text calls the target relevant (`verdicts.verdict`, which reads words, not meaning);
    - "calls some relevant": the text calls any page relevant;
    - "answer follows text": the page ranked first is one that the text calls relevant; NaN where it calls none.

    And from 0 to 1, against `AS_SHOWN`: "its text stays", the share of the words about the target that are the same
    (`difflib`'s ratio), and "other text stays", the mean of that over the other pages; NaN where neither says anything.
    """
    rows = []
    for question, group in perturbed.groupby("question_id", sort=False):
        by_name = {record["perturbation"]: record for record in records(group)}
        before, first_before = _reasons(by_name[AS_SHOWN]), by_name[AS_SHOWN]["pages"][0]
        for name, record in by_name.items():
            reasons, target, first = _reasons(record), record["target"], record["pages"][0]
            called = {page: verdict(text) for page, text in reasons.items()}
            relevant = [page for page, says in called.items() if says]
            alike = {page: _alike(before.get(page, ""), reasons.get(page, "")) for page in record["candidates"]}
            there, of_target, its_text = target in alike, called.get(target), alike.pop(target, np.nan)
            rows.append({
                "question_id": question, "doc_name": corpus.by_id[question]["doc_name"],
                "domain": corpus.by_id[question]["domain"], "perturbation": name,
                "top page stays": float(first == first_before),
                "right page first": float(first == target) if there else np.nan,
                "called relevant": np.nan if of_target is None or not there else float(of_target),
                "calls some relevant": float(bool(relevant)) if called else np.nan,
                "answer follows text": float(first in relevant) if relevant else np.nan,
                "its text stays": its_text,
                "other text stays": pd.Series(alike, dtype=float).mean(),  # leaves NaN out
            })  # fmt: skip
    return pd.DataFrame(rows)


def faithfulness(effects: pd.DataFrame, samples: int = 2000) -> pd.DataFrame:
    """Average `perturbation_effects`: columns perturbation, measure, mean, low, high (95 %), questions.

    questions: those where it can be said. What a faithful reranker does: under "blank" the page is no longer called
    relevant nor ranked first, and the text of the others stays; under "swap" nothing changes; under "remove" no page is
    called relevant; and always the answer follows the text.
    """
    rows = []
    for name, part in effects.groupby(pd.Categorical(effects["perturbation"], [AS_SHOWN, *PERTURBATIONS])):
        for measure in effects.columns.drop(["question_id", "doc_name", "domain", "perturbation"]):
            known = part[part[measure].notna()]
            if len(known) and not (name == AS_SHOWN and measure.endswith("stays")):
                figures = (name, measure, *_mean(known[measure], known["doc_name"], samples), len(known))
                rows.append(figures)
    return pd.DataFrame(rows, columns=["perturbation", "measure", "mean", "low", "high", "questions"])


def blank_page(data: bytes) -> bytes:
    """Return white paper of an image's size, as a PNG file."""
    file = io.BytesIO()
    Image.new("RGB", open_page(data).size, "white").save(file, "PNG")
    return file.getvalue()


def _reasons(record: Mapping[str, Any]) -> dict[int, str]:
    """What the reasoning says of each page."""
    shown = record.get("shown")
    images = [record["candidates"][k] for k in (range(len(record["candidates"])) if shown is None else shown)]
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


def _mean(values: pd.Series, documents: pd.Series, samples: int) -> tuple[float, float, float]:
    """Mean and its interval over documents; NaN where there are no values."""
    if values.empty:
        return np.nan, np.nan, np.nan
    return (float(values.mean()), *bootstrap_interval(values, documents, samples))
