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
        self, pairs: Sequence[Pair], due: Sequence[int], mode: str, batch_size: int, failures: dict[int, str]
    ) -> Iterator[tuple[int, Ranking]]:
        """Yield (place in `due`, ranking). A pair that fails on a server is noted in `failures`; the others go on."""
        try:
            yield from self.ranker.rank_each(pairs, mode, batch_size)
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
        done: list[Ranking | None] = [None] * len(pairs)
        failures: dict[int, str] = {}
        for turn in range(max(map(len, starts), default=0)):
            due = [i for i, places in enumerate(starts) if turn < len(places) and i not in failures]
            shown = [orders[i][starts[i][turn] : starts[i][turn] + self.size] for i in due]
            window = [(pairs[i][0], [pairs[i][1][k] for k in places]) for i, places in zip(due, shown, strict=True)]
            for j, ranking in self._rank_turn(window, due, mode, batch_size, failures):
                i, start = due[j], starts[due[j]][turn]
                orders[i][start : start + self.size] = [shown[j][k] for k in ranking.order]
                before = done[i]
                if before is not None:
                    ranking = replace(
                        ranking,
                        faults=before.faults | ranking.faults,
                        tokens=before.tokens + ranking.tokens,
                        seconds=before.seconds + ranking.seconds,
                    )
                done[i] = ranking
                if turn == len(starts[i]) - 1:
                    scores = ranking.scores if len(starts[i]) == 1 else None  # of one window only
                    yield i, replace(ranking, order=orders[i], scores=scores, shown=shown[j])
        if failures:
            raise RemoteError(failures, len(pairs))


def window_starts(n: int, size: int, stride: int) -> list[int]:
    """Return where the windows over n candidates begin, from the last candidates to the first.

    >>> window_starts(20, 10, 5)
    [10, 5, 0]
    """
    starts = [max(0, n - size)]
    while starts[-1] > 0:
        starts.append(max(0, starts[-1] - stride))
    return starts


class Consensus(Strategy):
    """Ranks several shuffles of the candidates and fuses the orders, which averages out a liking for places.

    Permutation self-consistency (arXiv 2310.07712), with sums of ranks instead of its Kemeny optimum:

    - "borda": n - rank points a shuffle;
    - "rrf": 1 / (60 + rank) a shuffle (reciprocal rank fusion, Cormack and others, SIGIR 2009).

    The first shuffle keeps the candidates' order. A ranking's `scores` are the points, `stability` is the mean Kendall
    tau between its orders (1: always the same), its reasoning and text are those of the first shuffle.

    early: with "borda", stop for a query once no further shuffle can change its first place.

    Raises ValueError for fewer than one shuffle or an unknown fusion.
    """

    def __init__(self, ranker: Ranker, shuffles: int = 5, fusion: str = "borda", seed: int = 0, early: bool = False):
        if shuffles < 1:
            raise ValueError(f"shuffles is {shuffles}: it must be at least 1")
        if fusion not in ("borda", "rrf"):
            raise ValueError(f"unknown fusion {fusion!r}: choose borda or rrf")
        if early and fusion != "borda":
            raise ValueError("early works with borda: only there the points that can still be won are bounded")
        self.ranker, self.shuffles, self.fusion, self.seed, self.early = ranker, shuffles, fusion, seed, early

    def rank_each(
        self, pairs: Sequence[Pair], mode: str = "reason", batch_size: int = 16
    ) -> Iterator[tuple[int, Ranking]]:
        """All queries' first shuffles go through the ranker together, then their second, and so on."""
        self.check(pairs)
        rankings: list[list[Ranking]] = [[] for _ in pairs]
        orders: list[list[list[int]]] = [[] for _ in pairs]
        open_pairs = list(range(len(pairs)))
        failures: dict[int, str] = {}
        for turn in range(self.shuffles):
            places = [places_of_turn(len(pairs[i][1]), turn, self.seed, pairs[i][0]) for i in open_pairs]
            shown = [(pairs[i][0], [pairs[i][1][k] for k in p]) for i, p in zip(open_pairs, places, strict=True)]
            for j, ranking in self._rank_turn(shown, open_pairs, mode, batch_size, failures):
                rankings[open_pairs[j]].append(ranking)
                orders[open_pairs[j]].append([places[j][k] for k in ranking.order])
            open_pairs = [i for i in open_pairs if i not in failures]
            turns = self.shuffles - turn - 1  # to come
            ended = [i for i in open_pairs if not turns or (self.early and _settled(orders[i], turns))]
            for i in ended:
                yield i, self._fused(rankings[i], orders[i])
            open_pairs = [i for i in open_pairs if i not in set(ended)]
        if failures:
            raise RemoteError(failures, len(pairs))

    def _fused(self, rankings: list[Ranking], orders: list[list[int]]) -> Ranking:
        order, points = fused(orders, self.fusion)
        return replace(
            rankings[0],
            order=order,
            scores=points,
            faults=frozenset().union(*(ranking.faults for ranking in rankings)),
            tokens=sum(ranking.tokens for ranking in rankings),
            seconds=sum(ranking.seconds for ranking in rankings),
            stability=stability(orders),
        )


def stability(orders: Sequence[Sequence[int]]) -> float | None:
    """Return the mean Kendall tau over pairs of orders of the same candidates; None for one order or one candidate."""
    if len(orders) < 2 or len(orders[0]) < 2:
        return None
    ranks = [[order.index(k) for k in range(len(order))] for order in map(list, orders)]
    taus = [kendalltau(a, b).statistic for a, b in combinations(ranks, 2)]
    return float(sum(taus) / len(taus))


def fused(orders: Sequence[Sequence[int]], fusion: str = "borda") -> tuple[list[int], list[float]]:
    """Return one order of several, and each candidate's points (`Consensus`); ties stand as in the first order."""
    points = _points(orders, fusion)
    return sorted(range(len(points)), key=lambda k: (-points[k], orders[0].index(k))), points


def _points(orders: Sequence[Sequence[int]], fusion: str) -> list[float]:
    n = len(orders[0])
    points = [0.0] * n
    for order in orders:
        for rank, k in enumerate(order, 1):
            points[k] += n - rank if fusion == "borda" else 1 / (60 + rank)
    return points


def places_of_turn(n: int, turn: int, seed: int, query: str) -> list[int]:
    """Return places 0 to n - 1 in the order in which a turn shows them: as they are in turn 0, then drawn."""
    return list(range(n)) if turn == 0 else shuffled(range(n), seed, query, turn)


def _settled(orders: Sequence[Sequence[int]], turns: int) -> bool:
    """Return whether no candidate can overtake the first one in so many turns, each of which moves two by n - 1."""
    n = len(orders[0])
    if n == 1:
        return True
    first, second = sorted(_points(orders, "borda"), reverse=True)[:2]
    return first - second > turns * (n - 1)
