"""Strategies over a ranker whose preferences are known: what they find, and what they cost."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_lab.reranking.ranking import Ranker, Ranking
from mmr5_lab.reranking.strategies import Consensus, Windows, stability, window_starts


class Judge(Ranker):
    """Knows each page's worth; `biased` puts the first page shown in front, whatever it is."""

    def __init__(self, worth, biased=False, limit=None):
        self.worth, self.biased, self.limit, self.shown = worth, biased, limit, []

    def check(self, pairs):
        """Its pages are numbers."""

    def rank_each(self, pairs, mode="reason", batch_size=16):
        for i, (query, pages) in enumerate(pairs):
            assert self.limit is None or len(pages) <= self.limit
            self.shown.append(list(pages))
            order = sorted(range(len(pages)), key=lambda k: -self.worth[pages[k]])
            if self.biased:
                order = [0, *(k for k in order if k)]
            fault = frozenset({"missing"} if query == "bad" else ())
            yield i, Ranking(order, f"saw {pages[0]}", "", fault, [1.0] * len(pages), 7, 0.5)


def test_windows_start_at_the_back():
    assert window_starts(20, 10, 5) == [10, 5, 0]
    assert window_starts(12, 10, 5) == [2, 0]
    assert window_starts(3, 10, 5) == [0]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_windows_give_a_permutation_with_the_best_in_front(n, size, stride, seed):
    if stride > size or (stride == size and n > size):
        return  # windows that do not overlap carry nothing to the front
    worth = list(range(n))
    random.Random(seed).shuffle(worth)
    judge = Judge(worth, limit=size)
    order = Windows(judge, size, stride).rank("q", list(range(n))).order
    assert sorted(order) == list(range(n))
    best = sorted(range(n), key=lambda k: -worth[k])
    carried = max(1, size - stride) if n > size else n
    assert order[:carried] == best[:carried]
    assert len(judge.shown) == len(window_starts(n, size, stride))


def test_windows_sum_what_they_cost_and_keep_the_top_windows_words():
    judge = Judge(list(range(9)))
    rankings = Windows(judge, 4, 2).rank_many([("bad", list(range(9))), ("q", [3, 4])])
    assert (rankings[0].tokens, rankings[0].seconds) == (7 * 4, 0.5 * 4)
    assert rankings[0].faults == {"missing"}
    assert rankings[0].reasoning == "saw 0"
    assert rankings[0].shown == [0, 8, 7, 2], "the pages that its images are"
    assert rankings[0].scores is None, "scores of different windows do not compare"
    assert (rankings[1].order, rankings[1].tokens, rankings[1].scores) == ([1, 0], 7, [1.0, 1.0])


def test_a_stride_that_skips_candidates_is_refused():
    with pytest.raises(ValueError, match="stride 5 is not within 1 to the window's size 4"):
        Windows(Judge([]), 4, 5)


def test_consensus_corrects_a_liking_for_the_first_place():
    worth = [0, 5, 1, 2]
    assert Judge(worth, biased=True).rank("q", [0, 1, 2, 3]).order[0] == 0
    ranking = Consensus(Judge(worth, biased=True), shuffles=9).rank("q", [0, 1, 2, 3])
    assert ranking.order[0] == 1
    assert 0 < ranking.stability < 1
    assert ranking.tokens == 63


def test_an_unbiased_ranker_agrees_with_itself():
    ranking = Consensus(Judge([0, 5, 1, 2]), shuffles=4).rank("q", [0, 1, 2, 3])
    assert ranking.order == [1, 3, 2, 0]
    assert ranking.stability == 1.0
    assert ranking.scores == pytest.approx([0.0, 12.0, 4.0, 8.0])


def test_strategies_combine():
    worth = list(itertools.chain(range(10), [30, 20]))
    ranking = Consensus(Windows(Judge(worth, limit=5), 5, 2), shuffles=3).rank("q", list(range(12)))
    assert ranking.order[:2] == [10, 11]


def test_stability_is_the_mean_rank_correlation():
    assert stability([[0, 1, 2], [2, 1, 0]]) == pytest.approx(-1)
    assert stability([[0, 1, 2], [0, 2, 1], [0, 1, 2]]) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert stability([[0, 1]]) is None


def test_fewer_than_one_shuffle_is_refused():
    with pytest.raises(ValueError, match="shuffles is 0"):
        Consensus(Judge([]), shuffles=0)


def test_a_shuffle_depends_on_the_question_not_on_its_place():
    pages = list(range(6))
    alone, among = Judge(pages), Judge(pages)
    Consensus(alone, 3).rank("q", pages)
    Consensus(among, 3).rank_many([("other", pages), ("q", pages)])
    assert alone.shown == among.shown[1::2]
