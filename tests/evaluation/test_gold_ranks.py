"""Where gold pages stand, and the measures that follow from it, on two questions by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mmr5_lab.evaluation.gold_ranks import (
    average_precision,
    first_few,
    gold_ranks,
    measure_columns,
    ndcg,
    recall,
    reciprocal_rank,
)

CORPUS = SimpleNamespace(
    documents=pd.DataFrame({"doc_name": ["a.pdf", "b.pdf"], "num_pages": [4, 3]}),
    questions=pd.DataFrame(
        {"question_id": ["q1", "q2"], "doc_name": ["b.pdf", "a.pdf"], "domain": "Laws", "gold_pages": [[2], [3, 0]]}
    ),
)


def test_ranks_of_gold_pages():
    hits, gold, candidates = gold_ranks({"q2": [1, 3, 2, 0], "q1": [0, 1]}, CORPUS)
    assert hits == [[], [2, 4]]  # q1's gold page is not ranked
    assert gold == [1, 2]
    assert candidates == [2, 4]


def test_measures():
    assert [recall(ranks, 2, 3) for ranks in ([], [2, 4], [1, 2])] == [0, 1 / 2, 1]
    assert [reciprocal_rank(ranks, 2, 0) for ranks in ([], [2, 4])] == [0, 1 / 2]
    assert [average_precision(ranks, 2, 0) for ranks in ([], [2, 4])] == [0, (1 / 2 + 2 / 4) / 2]
    best = 1 + 1 / math.log2(3)
    assert [ndcg(ranks, 2, 3) for ranks in ([], [2, 4], [1, 2])] == [0, pytest.approx((1 / math.log2(3)) / best), 1]


def test_lists_and_arrays_are_one_run():
    assert gold_ranks({"q1": np.array([2, 1]), "q2": np.array([0])}, CORPUS)[0] == [[1], [1]]
    with pytest.raises(ValueError, match="not lists of whole page numbers: q1"):
        gold_ranks({"q1": np.array([2.0, 1.0]), "q2": np.array([0])}, CORPUS)


def test_a_run_that_counts_from_1_is_recognised():
    with pytest.raises(ValueError, match="page 3 of question q1; they seem to count from 1, but pages are 0-based"):
        gold_ranks({"q1": [3, 1], "q2": [1]}, CORPUS)


def test_columns_of_measures():
    assert list(measure_columns([1, 5], ["nDCG", "RR", "R"])) == ["nDCG@1", "nDCG@5", "RR", "R@1", "R@5"]


def test_long_lists_are_cut():
    assert first_few(range(3)) == "0, 1, 2"
    assert first_few(range(7)) == "0, 1, 2, 3, 4 and 2 more"
