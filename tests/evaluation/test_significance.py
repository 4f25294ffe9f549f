"""Intervals, tests and corrections whose answers are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_lab.evaluation.significance import (
    bootstrap_interval,
    bootstrap_intervals,
    holm,
    paired_randomisation_test,
)


def test_randomisation_test_equals_the_exact_p_of_few_questions():
    # Differences 1, 1, 1, 1: of 16 sign patterns, two reach |sum| = 4, so p is 1/8.
    p = paired_randomisation_test([1, 1, 1, 1], [0, 0, 0, 0], samples=20_000)
    assert p == pytest.approx(1 / 8, abs=0.01)
    # One more question without a difference changes nothing.
    assert paired_randomisation_test([1, 1, 1, 1, 0.5], [0, 0, 0, 0, 0.5], samples=20_000) == p


def test_randomisation_test_sides_and_ends():
    rng = np.random.default_rng(0)
    a, b = rng.random(200), rng.random(200)
    assert paired_randomisation_test(a, b) == paired_randomisation_test(b, a)  # two-sided
    assert paired_randomisation_test(a, a) == 1
    assert paired_randomisation_test(a + 1, a) == 1 / 10_001  # never 0
    assert paired_randomisation_test(a, b, seed=1) == paired_randomisation_test(a, b, seed=1)


def test_randomisation_test_keeps_its_level():
    """Where nothing differs, p under .1 comes about one time in ten."""
    rng = np.random.default_rng(0)
    ps = [
        paired_randomisation_test(rng.integers(0, 2, 60), rng.integers(0, 2, 60), samples=300, seed=i)
        for i in range(300)
    ]
    assert np.mean(np.array(ps) <= 0.1) < 0.15


def test_randomisation_by_document_is_the_exact_p_of_few_documents():
    """Documents differ by 2, 2 and 1 questions: of 8 sign patterns two reach |5|, so p is 1/4, not 2/32."""
    p = paired_randomisation_test([1] * 5, [0] * 5, samples=20_000, clusters=["a", "a", "b", "b", "c"])
    assert p == pytest.approx(1 / 4, abs=0.01)
    assert paired_randomisation_test([1] * 5, [0] * 5, samples=20_000) == pytest.approx(1 / 16, abs=0.01)


def test_randomisation_by_document_keeps_its_level_where_questions_do_not():
    """Ten documents of ten like questions each, no true difference: coins by question call most of them one."""
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(10), 10)
    by_document, by_question = [], []
    for i in range(200):
        a = np.repeat(rng.normal(size=10), 10)
        by_document.append(paired_randomisation_test(a, 0 * a, samples=200, seed=i, clusters=documents) <= 0.1)
        by_question.append(paired_randomisation_test(a, 0 * a, samples=200, seed=i) <= 0.1)
    assert np.mean(by_document) < 0.15
    assert np.mean(by_question) > 0.4


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [1], "a has 2 values and b has 1"),
        ([], [], r"a has shape \(0,\)"),
        ([1, float("nan")], [1, 2], "not finite, at positions 1"),
    ],
)
def test_randomisation_test_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_randomisation_test(a, b)


def test_bootstrap_of_independent_values_is_the_normal_interval():
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap_interval(values, np.arange(400), samples=5000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.005)
    assert high == pytest.approx(values.mean() + half, abs=0.005)


def test_bootstrap_counts_documents_not_questions():
    """Ten documents of forty equal questions: the interval is that of ten values, not of four hundred."""
    by_document = np.random.default_rng(0).random(10)
    clustered = bootstrap_interval(np.repeat(by_document, 40), np.repeat([f"{i}.pdf" for i in range(10)], 40))
    alone = bootstrap_interval(by_document, range(10))
    as_if_independent = bootstrap_interval(np.repeat(by_document, 40), range(400))
    assert clustered == pytest.approx(alone)
    assert clustered[1] - clustered[0] > 4 * (as_if_independent[1] - as_if_independent[0])


def test_many_systems_share_the_draws():
    """So the interval of a difference is that of the systems' paired difference."""
    rng = np.random.default_rng(0)
    a, b, documents = rng.random(60), rng.random(60), np.repeat(range(12), 5)
    intervals = bootstrap_intervals([a, b, a - b], documents, samples=500, seed=1)
    assert intervals.shape == (3, 2)
    for row, values in zip(intervals, (a, b, a - b), strict=True):
        assert tuple(row) == pytest.approx(bootstrap_interval(values, documents, samples=500, seed=1))


def test_bootstrap_level_and_seed():
    values, documents = [0, 1, 0, 1, 1], ["a", "a", "b", "c", "c"]
    wide, narrow = (bootstrap_interval(values, documents, level=level) for level in (0.99, 0.5))
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]
    assert bootstrap_interval(values, documents, seed=3) == bootstrap_interval(values, documents, seed=3)


@pytest.mark.parametrize(
    ("values", "clusters", "options", "message"),
    [
        ([1, 2], ["a"], {}, "2 values but 1 cluster labels"),
        ([], [], {}, "shape"),
        ([1, float("inf")], ["a", "b"], {}, "not finite"),
        ([1, 2], ["a", "b"], {"level": 1.0}, "0 < level < 1"),
        ([1, 2], ["a", "b"], {"samples": 0}, "samples >= 1"),
    ],
)
def test_bootstrap_refuses(values, clusters, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, clusters, **options)


def test_no_interval_for_one_document():
    assert np.isnan(bootstrap_interval([0, 1], ["a", "a"])).all()


def test_holm_by_hand():
    # smallest first: .01 × 4, .02 × 3, .03 × 2 = .06, .04 × 1 raised to .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []
    with pytest.raises(ValueError, match="within 0 and 1"):
        holm([0.1, float("nan")])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_holm_keeps_order_and_lies_between_p_and_bonferroni(p):
    adjusted = holm(p)
    for mine, before in zip(adjusted, p, strict=True):
        assert before <= mine <= min(1, before * len(p))
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
