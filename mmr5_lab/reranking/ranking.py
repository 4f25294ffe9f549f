"""What every reranker takes and gives."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mmr5_lab.images import Page
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.reranking.pages import Pages, Pair, Sizes, TextPage

MODES = ("reason", "direct", "score", "pointwise")
SERVER_MODES = (*MODES, "rerank")  # "rerank": of a server with the interface /v1/rerank
ANSWER_START = "<think></think><answer>["  # what modes "direct" and "score" put into the model's mouth
CONTENT_FREE = "N/A"  # the query against which "score" is calibrated


@dataclass(frozen=True)
class Ranking:
    """What a reranker says about one query's n candidates.

    order: 0-based permutation of range(n), best first
    reasoning: the text inside <think>, or None
    text: the completion as written ("" in modes "score" and "pointwise")
    faults: what was wrong with it, named as in `prompting.answers.parse_ranking`
    scores: one a candidate, in candidate order, higher is better, or None: log-probabilities of the ids ("score"),
        probabilities of "True" ("pointwise"), points ("consensus")
    tokens, seconds: completion tokens, and this query's share of its batch's time
    shown: the candidates that "Image 1", "Image 2", … of the reasoning are (0-based); None: all, in their order
    stability: how alike the orders were that a consensus was made of (mean Kendall tau, -1 to 1), or None
    """

    order: list[int]
    reasoning: str | None
    text: str
    faults: frozenset[str]
    scores: list[float] | None
    tokens: int
    seconds: float
    shown: list[int] | None = None
    stability: float | None = None


def written_ranking(text: str, n: int, tokens: int, cut: bool = False, thinking: bool = True) -> Ranking:
    """Return what a model's text says about n candidates; without `thinking`, that there is none is no fault."""
    parsed = parse_ranking(text, n)
    faults = (parsed.faults | ({"truncated"} if cut else set())) - (set() if thinking else {"no_think"})
    return Ranking(list(parsed.order), parsed.think or None, text, faults, None, tokens, 0.0)


def scored_ranking(scores: list[float]) -> Ranking:
    """Return the ranking of candidates with these scores; ties stand in candidate order."""
    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    return Ranking(order, None, "", frozenset(), scores, 1, 0.0)


def relevance(ranking: Ranking, mode: str) -> list[float]:
    """Return a score for each page, in the pages' order and falling along the ranking.

    In mode "score" the chance that the answer begins with the page's id among the candidates, in mode "pointwise" the
    probability of "True", in mode "rerank" what the server gave; in the others 1 / rank, for the model gives no numbers
    there. All but the server's are in 0 to 1.
    """
    if ranking.scores is None or mode not in ("score", "pointwise", "rerank"):
        scores = [0.0] * len(ranking.order)
        for rank, page in enumerate(ranking.order, 1):
            scores[page] = 1 / rank
        return scores
    if mode != "score":
        return ranking.scores
    highest = max(ranking.scores)
    weights = [math.exp(score - highest) for score in ranking.scores]
    return [weight / math.fsum(weights) for weight in weights]


def check_decoding(temperature: float, max_new_tokens: int) -> None:
    """Raise ValueError for settings with which nothing can be decoded."""
    if not 0 <= temperature < math.inf:  # false for nan, too
        raise ValueError(f"temperature is {temperature}: 0 decodes greedily, a value above 0 samples")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: an answer needs at least one token")


class RemoteError(RuntimeError):
    """Requests to a server failed for good.

    failures: index of the pair -> what happened, in the form "kind: more"
    fatal: every other request would fail too (`chat.RequestError`)
    """

    def __init__(self, failures: dict[int, str], total: int, fatal: bool = False):
        self.failures, self.fatal = failures, fatal
        index, reason = min(failures.items())
        super().__init__(
            f"{len(failures)} of {total} requests failed; the first is pair {index}: {reason}."
            f" By kind: {count_kinds(failures.values())}. What was answered is kept: start again to ask for the rest"
        )


def count_kinds(failures: Iterable[str]) -> str:
    """Return how often each kind of failure occurs, such as "3 cut, 1 BadRequestError 400"."""
    kinds = Counter(failure.partition(":")[0] for failure in failures)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


class Ranker:
    """What ranks pages: a loaded model, a server (`remote`), or a strategy over either (`strategies`)."""

    _sizes: Sizes | None = None  # of pages that could be decoded, where a ranker remembers them

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """Like `rank_many`, but yields (index, ranking) as they are finished, in any order."""
        raise NotImplementedError

    def check(self, pairs: Sequence[Pair]) -> None:
        """Raises ValueError, naming pair and page, for pages that cannot be ranked, before any work is done."""
        Pages(pairs, self._sizes)

    def rank(self, query: str, pages: Sequence[Page | TextPage], mode: str = "reason") -> Ranking:
        """Rank the pages (paths, image bytes, PIL images, or a `TextPage` each) of one query.

        Raises ValueError for an empty query, no pages, a page that is not an image, more than the model's context
        holds, or an unknown mode.
        """
        return self.rank_many([(query, pages)], mode=mode)[0]

    def rank_many(self, pairs: Iterable[Pair], mode: str = "reason", batch_size: int = 16) -> list[Ranking]:
        """Rank many (query, pages) pairs; results in their order. Raises as `rank`, naming the pair.

        What was ranked before an error is lost: use `rank_each`, or `rerank_run`, where that would matter.
        """
        pairs = list(pairs)
        rankings = dict(self.rank_each(pairs, mode=mode, batch_size=batch_size))
        return [rankings[i] for i in range(len(pairs))]
