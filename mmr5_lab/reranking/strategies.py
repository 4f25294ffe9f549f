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

Turn = tuple[list[int], Ranking]  # the candidates that were shown, and their ranking


class Strategy(Ranker):
    """A ranker over another one, which ranks some or all candidates of a query in several turns."""

    ranker: Ranker

    def check(self, pairs: Sequence[Pair]) -> None:
        """Raise ValueError for pages that the ranker beneath cannot rank."""
        self.ranker.check(pairs)

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """Show the ranker the first turn of all queries together, then the second, and so on.

        A query that fails on a server is left out of later turns; the others go on.
        """
        self.check(pairs)  # all pages, before the first turn
        turns: list[list[Turn]] = [[] for _ in pairs]
        failures: dict[int, str] = {}
        due = {i: self._next(query, len(pages), []) for i, (query, pages) in enumerate(pairs)}
        while due:
            shown = [(pairs[i][0], [pairs[i][1][k] for k in places]) for i, places in due.items()]
            indices = list(due)
            following: dict[int, list[int]] = {}
            try:
                for j, ranking in self.ranker.rank_each(shown, mode, batch_size):
                    i = indices[j]
                    query, pages = pairs[i]
                    turns[i].append((due[i], ranking))
                    if places := self._next(query, len(pages), turns[i]):
                        following[i] = places
                    else:
                        yield i, _with_costs(self._joined(len(pages), turns[i]), turns[i])
            except RemoteError as error:
                failures |= {indices[j]: reason for j, reason in error.failures.items()}
                if error.fatal:
                    raise RemoteError(failures, len(failures), fatal=True) from None
            due = dict(sorted(following.items()))
        if failures:
            raise RemoteError(failures, len(pairs))

    def _next(self, query: str, n: int, turns: Sequence[Turn]) -> list[int]:
        """Return the candidates of n, 0-based, that the next turn shows; empty after the last turn."""
        raise NotImplementedError

    def _joined(self, n: int, turns: Sequence[Turn]) -> Ranking:
        """Return one ranking of n candidates, made of those of all turns."""
        raise NotImplementedError


def _with_costs(ranking: Ranking, turns: Sequence[Turn]) -> Ranking:
    rankings = [each for _, each in turns]
    return replace(
        ranking,
        faults=frozenset().union(*(each.faults for each in rankings)),
        tokens=sum(each.tokens for each in rankings),
        seconds=sum(each.seconds for each in rankings),
    )


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

    def _order(self, n: int, turns: Sequence[Turn]) -> list[int]:
        order = list(range(n))
        for start, (shown, ranking) in zip(window_starts(n, self.size, self.stride), turns, strict=False):
            order[start : start + self.size] = [shown[k] for k in ranking.order]
        return order

    def _next(self, query: str, n: int, turns: Sequence[Turn]) -> list[int]:
        starts = window_starts(n, self.size, self.stride)[len(turns) :]
        return self._order(n, turns)[starts[0] : starts[0] + self.size] if starts else []

    def _joined(self, n: int, turns: Sequence[Turn]) -> Ranking:
        shown, last = turns[-1]
        scores = last.scores if len(turns) == 1 else None  # scores of different windows do not compare
        return replace(last, order=self._order(n, turns), scores=scores, shown=shown)


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

    def _next(self, query: str, n: int, turns: Sequence[Turn]) -> list[int]:
        return places_of_turn(n, len(turns), self.seed, query) if len(turns) < self.shuffles else []

    def _joined(self, n: int, turns: Sequence[Turn]) -> Ranking:
        orders = [[shown[k] for k in ranking.order] for shown, ranking in turns]
        order, points = fused(orders)
        return replace(turns[0][1], order=order, scores=points, stability=stability(orders))


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
