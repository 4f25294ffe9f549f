"""Open a ranker by options: a model here or on a server, a strategy around it; and rerank a TREC file with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.rankings import Rankings, RankingsError, read_trec
from mmr5_lab.reranking.ranking import Ranker
from mmr5_lab.reranking.strategies import Consensus, Windows
from mmr5_lab.reranking.whole_runs import rerank_run


def open_ranker(
    model: str,
    *,
    adapter: str | None = None,
    server: str | None = None,
    max_pixels: int | None = None,
    max_new_tokens: int = 2048,
    window: int | None = None,
    stride: int | None = None,
    shuffles: int | None = None,
) -> Ranker:
    """Return a ranker.

    model: folder or hub name; with `server` (address of an OpenAI-compatible one) its name there
    window, stride: pages shown at once, and places that a window moves (None: half a window); see `Windows`
    shuffles: of a `Consensus`

    Raises ValueError for options that do not go together, and as the rankers do.
    """
    if stride and not window:
        raise ValueError("a stride says how far a window moves: give a window too")
    if server and adapter:
        raise ValueError("a server has its adapter loaded already: leave out the adapter, or the server")
    ranker: Ranker
    if server:
        from mmr5_lab.reranking.remote import RemoteReranker  # loads no PyTorch

        ranker = RemoteReranker(server, model, max_pixels=max_pixels, max_new_tokens=max_new_tokens)
    else:
        from mmr5_lab.reranking.local import Reranker

        ranker = Reranker.from_pretrained(model, adapter, max_pixels=max_pixels, max_new_tokens=max_new_tokens)
    if window:
        ranker = Windows(ranker, window, stride or max(1, window // 2))
    return Consensus(ranker, shuffles) if shuffles else ranker


def rerank_to_file(
    corpus: str | Path,
    run: str | Path,
    out: str | Path,
    *,
    split: str | None,
    candidates: int,
    mode: str,
    channel: str,
    batch_size: int,
    shard: tuple[int, int] = (1, 1),
    **ranker: Any,
) -> str:
    """Rerank the first `candidates` pages of a TREC file to the file `out`, and return the outcome as a line of text.

    shard: which of how many parts of the questions; the parts' files, joined in order, are the whole run's
    ranker: the options of `open_ranker`

    Raises ValueError for a batch that does not fit into memory, before weights are loaded, and as `rerank_run` does.
    """
    if not ranker["model"]:
        raise RankingsError("which model is to rerank? Name it with --model")
    part, out = load_corpus(corpus, split), Path(out)
    pages = list(read_trec(run, part).pages.items())
    start, end = (len(pages) * k // shard[1] for k in (shard[0] - 1, shard[0]))
    first = Rankings({question: ranked[:candidates] for question, ranked in pages[start:end]})
    if pages and not first.pages:
        raise RankingsError(f"{run} has {len(pages)} questions: too few for {shard[1]} parts")
    if not ranker["server"] and mode == "reason" and channel == "image":
        print(_checked_memory(part, first, batch_size, ranker), flush=True)
    server = None
    if ranker["server"]:
        from mmr5_lab.models.chat import check_address  # loads openai

        server = check_address(ranker["server"])  # without the user or key that it may hold
    written = rerank_run(
        open_ranker(**ranker), part, first, out.parent, out.stem, mode=mode, channel=channel, batch_size=batch_size,
        trec=out, settings=ranker | {"server": server},
    )  # fmt: skip
    return f"{out}: {len(written)} questions, {written['valid'].mean():.1%} of the answers without a fault"


def _checked_memory(corpus: Corpus, run: Rankings, batch_size: int, ranker: Mapping[str, Any]) -> str:
    """What a batch takes; the question with most candidates stands for all. Raises ValueError where it does not fit."""
    from mmr5_lab.models.memory import plan  # loads PyTorch

    question = max(run.pages, key=lambda q: len(run.pages[q]), default=None)
    if question is None:
        return "no questions"
    document, pages = corpus.by_id[question]["doc_name"], run.pages[question][: ranker["window"]]
    sizes = [(image.height, image.width) for image in (corpus.page_image(document, page) for page in pages)]
    limits = {name: ranker[name] for name in ("max_new_tokens", "max_pixels")}
    budget = plan(ranker["model"], sizes, batch_size=batch_size, **limits)
    budget.check()
    return str(budget)
