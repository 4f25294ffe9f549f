"""PyTorch takes as many threads as cores that others leave, while it trains and ranks."""

import os
import subprocess
import sys
import time

import pytest
import torch
from helpers.material import SFT
from helpers.servers import pages

from mmr5_lab import Reranker
from mmr5_lab.models import threads
from mmr5_lab.models.threads import WINDOW, SpareCores, threads_beside
from mmr5_lab.training.stages import train_sft

CPU = torch.device("cpu")


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def busy():
    """A process for each core that does nothing but take it, for longer than use is measured."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    with SpareCores(CPU):  # measures
        time.sleep(5 * WINDOW)
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("others", "cores", "most", "expected"),
    [
        (0.0, 2, 2, 2),
        (0.3, 2, 2, 2),
        (1.0, 2, 2, 1),
        (1.33, 2, 2, 1),
        (2.0, 2, 2, 1),
        (2.2, 16, 16, 14),
        (0.0, 16, 4, 4),
    ],
)
def test_threads_are_what_others_leave(others, cores, most, expected):
    assert threads_beside(others, cores, most) == expected


def test_beside_busy_processes_one_thread_and_afterwards_as_many_as_before(four_threads, busy):
    with SpareCores(CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4


def test_a_gpu_s_threads_are_left_alone(four_threads, busy):
    with SpareCores(torch.device("cuda")):
        assert torch.get_num_threads() == 4


def test_a_list_of_cores_that_a_container_numbers_anew_is_taken_whole():
    assert threads.among([5, 9], 16) == [5, 9]
    assert threads.among([5, 9], 2) == [0, 1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a process that can be held to one core")
def test_own_work_is_not_that_of_others():
    """On one core: what we and others use is at most all of it, so it would be more if ours counted as others'."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        started, own, others = time.monotonic(), time.process_time(), threads._seconds_of_others()
        while time.process_time() - own < 0.5:
            pass
        own, others = time.process_time() - own, threads._seconds_of_others() - others
        assert own + others <= time.monotonic() - started + 0.1
    finally:
        os.sched_setaffinity(0, allowed)


def test_the_model_reads_with_one_thread_beside_busy_processes(four_threads, busy, tiny_model):
    reranker, seen = Reranker.from_pretrained(tiny_model), []
    reranker.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    reranker.rank("Which page?", pages(2), "score")
    assert set(seen) == {1}
    assert torch.get_num_threads() == 4


def test_training_takes_one_thread_beside_busy_processes(four_threads, busy, material, tmp_path, monkeypatch):
    seen, fit = [], SpareCores.fit
    monkeypatch.setattr(SpareCores, "fit", lambda self: (fit(self), seen.append(torch.get_num_threads())))
    log = train_sft(material.model, material.traces, tmp_path, **SFT)
    assert seen == [1] * (len(log) + 1), "before the first step, and at each"
    assert torch.get_num_threads() == 4
