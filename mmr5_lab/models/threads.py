"""PyTorch's threads on a CPU that other processes use as well.

A product of matrices waits for the last of its threads. Where one of them has to share its core, all wait: on two cores
beside two busy processes, SFT of the miniature took 12 to 41 s with two threads and 6.1 s with one (`docs/log.md`,
"Threads beside other work"). So there are as many threads as cores that the others leave.
"""

import os
import time

import psutil
import torch

WINDOW = 0.2  # seconds at least over which the use of the cores is measured: the kernel counts in hundredths


def _cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _seconds_of_others() -> float:
    """Seconds that these cores have worked for other processes since the machine started."""
    times = psutil.cpu_times(percpu=True)
    not_work = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in user time as well
    ours = [times[core] for core in among(_cores(), len(times))]
    busy = sum(sum(core) - sum(getattr(core, name, 0.0) for name in not_work) for core in ours)
    return busy - time.process_time()


def among(cores: list[int], listed: int) -> list[int]:
    """Return cores as places in the kernel's list; the whole list where it is numbered anew, as containers do."""
    return cores if max(cores) < listed else list(range(listed))


class SpareCores:
    """A block in which PyTorch takes, on a CPU, no more threads than others leave cores; afterwards as many as before.

    `fit` looks again; call it between batches or steps. It only ever lowers the number that PyTorch had at first.
    """

    _seen = time.monotonic(), _seconds_of_others()  # the last measurement of the whole process
    _others = 0.0  # cores that others used then

    def __init__(self, device: torch.device):
        self.most = torch.get_num_threads()
        self._active = device.type == "cpu" and self.most > 1

    def __enter__(self) -> "SpareCores":
        self.fit()
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            torch.set_num_threads(self.most)

    def fit(self) -> None:
        if not self._active:
            return
        now, (since, before) = time.monotonic(), SpareCores._seen
        if now - since >= WINDOW:
            used = _seconds_of_others()
            SpareCores._others, SpareCores._seen = (used - before) / (now - since), (now, used)
        torch.set_num_threads(threads_beside(SpareCores._others, len(_cores()), self.most))


def threads_beside(others: float, cores: int, most: int) -> int:
    """Return how many threads to take where others use that many of the cores: what is left, from 1 to `most`."""
    return max(1, min(most, round(cores - others)))
