"""Where gold pages stand, and the measures that follow from it, on two questions by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mmr5_lab.evaluation.gold_ranks import (
    GoldRanks,
    Labels,
    average_precision,
    first_few,
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
LABELS = Labels.of(CORPUS)


def test_labels_hold_the_corpus_as_arrays():
    assert LABELS.sizes.tolist() == [3, 4]
    assert LABELS.gold.tolist() == [1, 2]
    assert LABELS.starts.tolist() == [0, 3]
    assert np.flatnonzero(LABELS.is_gold).tolist() == [2, 3, 6]  # q1's pages are 0 to 2, q2's 3 to 6


def test_hits_keep_their_ranks():
    ranks = GoldRanks.of({"q2": [1, 3, 2, 0], "q1": [0, 1]}, LABELS)
    assert ranks.candidates.tolist() == [2, 4]
    assert ranks.question.tolist() == [1, 1]  # q1's gold page is not ranked
    assert ranks.rank.tolist() == [1, 3]
    assert ranks.best_order().rank.tolist() == [0, 1]
    assert ranks.perfect().question.tolist() == [0, 1, 1]
    assert ranks.perfect().rank.tolist() == [0, 0, 1]


def test_measures():
    ranks = GoldRanks.of({"q1": [0, 1], "q2": [1, 3, 2, 0]}, LABELS)
    assert recall(ranks, 3).tolist() == [0, 1 / 2]
    assert reciprocal_rank(ranks, None).tolist() == [0, 1 / 2]
    assert average_precision(ranks, None).tolist() == [0, (1 / 2 + 2 / 4) / 2]
    best = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(ndcg(ranks, 3), [0, (1 / np.log2(3)) / best])


def test_lists_and_arrays_are_one_run():
    lists = GoldRanks.of({"q1": [2, 1], "q2": [0]}, LABELS)
    arrays = GoldRanks.of({"q1": np.array([2, 1]), "q2": np.array([0])}, LABELS)
    assert lists.rank.tolist() == arrays.rank.tolist() == [0, 0]
    with pytest.raises(ValueError, match="not lists of whole page numbers: q1"):
        GoldRanks.of({"q1": np.array([2.0, 1.0]), "q2": np.array([0])}, LABELS)


def test_columns_of_measures():
    assert list(measure_columns([1, 5], ["nDCG", "RR", "R"])) == ["nDCG@1", "nDCG@5", "RR", "R@1", "R@5"]


def test_long_lists_are_cut():
    assert first_few(range(3)) == "0, 1, 2"
    assert first_few(range(7)) == "0, 1, 2, 3, 4 and 2 more"
