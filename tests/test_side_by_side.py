import threading
import time

import pytest
import torch

from mmr5_lab.side_by_side import side_by_side


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_all_batches_are_done_two_at_a_time_with_half_the_threads_each(threads):
    both, seen = threading.Barrier(2, timeout=20), []

    def work(batch):
        both.wait()  # passes only where another batch is worked on
        seen.append((threading.current_thread(), torch.get_num_threads()))
        return 10 * batch

    assert dict(side_by_side(work, range(6), 2)) == {k: 10 * k for k in range(6)}
    assert len({thread for thread, _ in seen}) == 2
    assert {count for _, count in seen} == {2}
    assert torch.get_num_threads() == 4


def test_alone_there_are_no_threads(threads):
    found = list(side_by_side(lambda batch: (batch, threading.current_thread(), torch.get_num_threads()), [5], 2))
    assert found == [(5, (5, threading.main_thread(), 4))]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_comes_after_what_had_been_begun(threads, bad):
    begun = []
    both = threading.Barrier(2, timeout=20)

    def work(batch):
        begun.append(batch)
        if batch < 2:
            both.wait()
        if batch == bad:
            raise ValueError(f"batch {batch}")
        if batch == bad ^ 1:
            time.sleep(0.3)  # the one beside it ends first
        return batch

    found = []
    with pytest.raises(ValueError, match=f"batch {bad}"):
        found.extend(result for _, result in side_by_side(work, range(10), 2))
    assert sorted([*found, bad]) == sorted(begun)
    assert len(begun) <= bad + 3, "nothing is begun after an error"
    assert torch.get_num_threads() == 4


def test_a_caller_that_stops_is_left_with_its_threads(threads):
    begun = []
    for _ in side_by_side(begun.append, range(100), 2):
        break
    assert len(begun) < 10
    assert torch.get_num_threads() == 4
