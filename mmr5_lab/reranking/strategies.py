"""Strategies over any ranker and mode: sliding windows for many candidates, consensus over shuffles.

    wide = Windows(reranker, size=5, stride=3)
    wide.rank("Which page?", forty_pages)
    Consensus(wide, shuffles=5).rank_many(pairs, mode="direct")

Each is a ranker itself, so they combine, and `rerank_run` takes them as it takes a model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from scipy.stats import kendalltau

from mmr5_lab.prompting.prompts import shuffled
from mmr5_lab.reranking.pages import Pair
from mmr5_lab.reranking.ranking import Ranker, Ranking, RemoteError


class Strategy(Ranker):
    """A ranker over another one, which checks the pages."""

    ranker: Ranker

    def check(self, pairs: Sequence[Pair]) -> None:
        """Raise ValueError for pages that the ranker beneath cannot rank."""
        self.ranker.check(pairs)

    def _rank_turn(
        self,
        pairs: Sequence[Pair],
        due: Sequence[int],
        places: Sequence[Sequence[int]],
        mode: str,
        batch_size: int,
        failures: dict[int, str],
    ) -> Iterator[tuple[int, Ranking]]:
        """Show the pairs `due` their pages at `places`; yield (place in `due`, ranking).

        A pair that fails on a server is noted in `failures`; the others go on.
        """
        shown = [(pairs[i][0], [pairs[i][1][k] for k in some]) for i, some in zip(due, places, strict=True)]
        try:
            yield from self.ranker.rank_each(shown, mode, batch_size)
        except RemoteError as error:
            failures |= {due[j]: reason for j, reason in error.failures.items()}
            if error.fatal:
                raise RemoteError(failures, len(failures), fatal=True) from None


class Windows(Strategy):
    """Ranks more candidates than a model is shown at once: windows from the back to the front.

    As RankGPT does (arXiv 2304.09542, section 3.2): the last `size` candidates are ranked, then the window moves
    `stride` places to the front, so that the best `size - stride` of each window go on into the next. One pass puts
    the best of them in front; what is further down is ordered only roughly.

    A ranking's reasoning, text and ids are those of the last window, the one that decided the top; faults are of
    all windows, tokens and seconds their sums.

    Raises ValueError for a stride below 1 or above the size.
    """

    def __init__(self, ranker: Ranker, size: int = 10, stride: int = 5):
        if not 1 <= stride <= size:
            raise ValueError(f"stride {stride} is not within 1 to the window's size {size}")
        self.ranker, self.size, self.stride = ranker, size, stride

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """Windows of the same turn go through the ranker together."""
        self.check(pairs)  # all pages, before the first window
        orders = [list(range(len(pages))) for _, pages in pairs]
        starts = [window_starts(len(pages), self.size, self.stride) for _, pages in pairs]
        rankings: list[list[Ranking]] = [[] for _ in pairs]
        failures: dict[int, str] = {}
        for turn in range(max(map(len, starts), default=0)):
            due = [i for i, places in enumerate(starts) if turn < len(places) and i not in failures]
            places = [orders[i][starts[i][turn] : starts[i][turn] + self.size] for i in due]
            for j, ranking in self._rank_turn(pairs, due, places, mode, batch_size, failures):
                i, start = due[j], starts[due[j]][turn]
                orders[i][start : start + self.size] = [places[j][k] for k in ranking.order]
                rankings[i].append(ranking)
                if turn == len(starts[i]) - 1:
                    scores = ranking.scores if turn == 0 else None  # scores of different windows do not compare
                    last = replace(ranking, order=orders[i], scores=scores, shown=places[j])
                    yield i, _with_costs(last, rankings[i])
        if failures:
            raise RemoteError(failures, len(pairs))


def window_starts(n: int, size: int, stride: int) -> list[int]:
    """Return where the windows over n candidates begin, from the last candidates to the first.

    >>> window_starts(20, 10, 5)
    [10, 5, 0]
    """
    return [*range(n - size, 0, -stride), 0]


class Consensus(Strategy):
    """Ranks several shuffles of the candidates and fuses the orders, which averages out a liking for places.

    Permutation self-consistency (arXiv 2310.07712), with sums of ranks (Borda: n - rank points a shuffle) instead of
    its Kemeny optimum.

    The first shuffle keeps the candidates' order. A ranking's `scores` are the points, `stability` is the mean Kendall
    tau between its orders (1: always the same), its reasoning and text are those of the first shuffle.

    Raises ValueError for fewer than one shuffle.
    """

    def __init__(self, ranker: Ranker, shuffles: int = 5, seed: int = 0):
        if shuffles < 1:
            raise ValueError(f"shuffles is {shuffles}: it must be at least 1")
        self.ranker, self.shuffles, self.seed = ranker, shuffles, seed

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """All queries' first shuffles go through the ranker together, then their second, and so on."""
        self.check(pairs)
        rankings: list[list[Ranking]] = [[] for _ in pairs]
        orders: list[list[list[int]]] = [[] for _ in pairs]
        failures: dict[int, str] = {}
        for turn in range(self.shuffles):
            due = [i for i in range(len(pairs)) if i not in failures]
            places = [places_of_turn(len(pairs[i][1]), turn, self.seed, pairs[i][0]) for i in due]
            for j, ranking in self._rank_turn(pairs, due, places, mode, batch_size, failures):
                i = due[j]
                rankings[i].append(ranking)
                orders[i].append([places[j][k] for k in ranking.order])
                if turn == self.shuffles - 1:
                    order, points = fused(orders[i])
                    first = replace(rankings[i][0], order=order, scores=points, stability=stability(orders[i]))
                    yield i, _with_costs(first, rankings[i])
        if failures:
            raise RemoteError(failures, len(pairs))


def _with_costs(ranking: Ranking, turns: Sequence[Ranking]) -> Ranking:
    """Return a ranking with the faults, tokens and seconds of all turns that led to it."""
    return replace(
        ranking,
        faults=frozenset().union(*(turn.faults for turn in turns)),
        tokens=sum(turn.tokens for turn in turns),
        seconds=sum(turn.seconds for turn in turns),
    )


def stability(orders: Sequence[Sequence[int]]) -> float | None:
    """Return the mean Kendall tau over pairs of orders of the same candidates; None for one order or one candidate."""
    if len(orders) < 2 or len(orders[0]) < 2:
        return None
    ranks = [[order.index(k) for k in range(len(order))] for order in map(list, orders)]
    taus = [kendalltau(a, b).statistic for a, b in combinations(ranks, 2)]
    return float(sum(taus) / len(taus))


def fused(orders: Sequence[Sequence[int]]) -> tuple[list[int], list[float]]:
    """Return one order of several, and each candidate's points (`Consensus`); ties stand as in the first order."""
    n = len(orders[0])
    points = [float(sum(n - 1 - order.index(k) for order in orders)) for k in range(n)]
    return sorted(range(n), key=lambda k: (-points[k], orders[0].index(k))), points


def places_of_turn(n: int, turn: int, seed: int, query: str) -> list[int]:
    """Return places 0 to n - 1 in the order in which a turn shows them: as they are in turn 0, then drawn."""
    return list(range(n)) if turn == 0 else shuffled(range(n), seed, query, turn)
