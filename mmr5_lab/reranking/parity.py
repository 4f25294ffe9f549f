"""Compare a model here with the same model on a server: serving stacks differ silently."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import read_trec
from mmr5_lab.models.memory import text_tokens
from mmr5_lab.reranking.inputs import prompts_of
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.pages import Pages, Pair
from mmr5_lab.reranking.ranking import MODES, Ranking, RemoteError
from mmr5_lab.reranking.remote import RemoteReranker
from mmr5_lab.reranking.whole_runs import pair_of
from mmr5_lab.retrieval.retrieve import retrieve

CLOSE = 1e-3  # scores (log-probabilities, probabilities) that are further apart part


def parity(
    model: str,
    server: str,
    *,
    served_as: str | None = None,
    corpus: str | Path = "data/mini/corpus",
    run: str | Path | None = None,
    questions: int = 20,
    candidates: int = 5,
    max_pixels: int | None = None,
    max_new_tokens: int = 512,
) -> str:
    """Rank some questions here and through a server in each mode; print a line for each, and return the outcome.

    served_as: the model's name on the server; None: `model`
    run: TREC file with candidates; None: BM25's. Questions are taken evenly from it

    Raises RuntimeError where token counts, texts or scores part, or requests fail; a mode that the server cannot do is
    named and left out.
    """
    part = load_corpus(corpus)
    pages = (read_trec(run, part) if run else retrieve(part, top_k=candidates)).pages
    chosen = list(pages)[:: max(1, len(pages) // questions)][:questions]
    pairs = [pair_of(part, part.by_id[question], pages[question][:candidates]) for question in chosen]
    there = RemoteReranker(server, served_as or model, max_pixels=max_pixels, max_new_tokens=max_new_tokens)
    here = Reranker.from_pretrained(model, max_pixels=max_pixels, max_new_tokens=max_new_tokens)
    parted = [] if _same_counts(pairs, here, there) else ["token counts"]
    for mode in MODES:
        try:
            both = list(zip(here.rank_many(pairs, mode), there.rank_many(pairs, mode), strict=True))
        except RemoteError as error:
            lacking = next(iter(error.failures.values())).startswith("lacking: ")
            print(f"{mode}: {'not compared' if lacking else 'failed'}: {error}", flush=True)
            parted += [] if lacking else [mode]
            continue
        same, line = _scores(both) if both[0][0].scores else _texts(both, here.processor.tokenizer)
        orders = sum(a.order == b.order for a, b in both)
        print(f"{mode}: {orders} of {len(both)} orders alike, {line}", flush=True)
        parted += [] if same else [mode]
    if parted:
        raise RuntimeError(
            f"the server parts from the model in: {', '.join(parted)}. What differs most often: the dtype, the chat"
            " template, and the pixels of a page (max_pixels)"
        )
    return f"{len(pairs)} questions: the server ranks as the model does here"


def _same_counts(pairs: Sequence[Pair], here: Reranker, there: RemoteReranker) -> bool:
    prompts = prompts_of(pairs, Pages(pairs), "reason", here.model, here.processor, here.max_new_tokens)
    counted = [(prompt, there.prompt_tokens(*pair)) for prompt, pair in zip(prompts, pairs, strict=True)]
    odd = [(i, prompt, tokens) for i, (prompt, tokens) in enumerate(counted) if tokens != prompt.tokens]
    line = f"prompts: {len(pairs) - len(odd)} of {len(pairs)} have as many tokens"
    for i, prompt, tokens in odd[:1]:
        shown = prompt.tokens - text_tokens(here.processor, prompt.text)
        line += f"; pair {i}: {prompt.tokens} here, {shown} of them for its {len(prompt.pages)} pages, {tokens} there"
    print(line, flush=True)
    return not odd


def _texts(both: Sequence[tuple[Ranking, Ranking]], tokenizer) -> tuple[bool, str]:
    odd = [(i, (a.text, b.text)) for i, (a, b) in enumerate(both) if a.text != b.text]
    line = f"{len(both) - len(odd)} texts alike"
    for i, texts in odd[:1]:
        place = _first_difference(*texts)
        token = _first_difference(*(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts))
        a, b = (text[max(0, place - 20) : place + 20] for text in texts)
        line += f"; pair {i} parts at token {token}, character {place}: {a!r} here, {b!r} there"
    return not odd, line


def _scores(both: Sequence[tuple[Ranking, Ranking]]) -> tuple[bool, str]:
    most, where = max(
        (abs(a - b), f"pair {i}, page {k}: {a:.4f} here, {b:.4f} there")
        for i, (x, y) in enumerate(both)
        for k, (a, b) in enumerate(zip(x.scores or (), y.scores or (), strict=True))
    )
    return most <= CLOSE, f"scores at most {most:.1e} apart ({where})"


def _first_difference(here: Sequence, there: Sequence) -> int:
    return next(k for k, (a, b) in enumerate(zip_longest(here, there)) if a != b)
