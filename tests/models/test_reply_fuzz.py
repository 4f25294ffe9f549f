"""A small part of `benchmarks/replies.py`: whatever a server answers, no good answer is lost or asked for twice."""

import importlib.util
import logging
from pathlib import Path

import pytest

from mmr5_lab.models import replies


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "replies.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_replies", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("sockets", "count"), [(False, 600), (True, 100)])
def test_no_good_answer_is_lost_or_asked_for_twice(benchmark, sockets, count, caplog):
    caplog.set_level(logging.ERROR)
    for row in benchmark.fuzz(count, sockets, seed=7):
        kinds = row["kinds"]
        assert sum(kinds.values()) >= count // 2
        assert min(kinds[kind] for kind in ("good", "no answer", "passing", "refused")) > 0


def test_the_fuzz_notices_a_half_answer_that_is_kept(benchmark, monkeypatch):
    monkeypatch.setitem(replies._ENDINGS, "error", None)
    with pytest.raises(AssertionError, match=r"was kept as|was asked for after"):
        benchmark.fuzz(600, False, seed=7)
