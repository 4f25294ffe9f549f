"""Batches side by side on a CPU: one a core, where a model's matrices are too small to keep several cores busy."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

import torch

SMALL = 1024  # of hidden states: above, cores do better at one batch together, and hold one batch in memory

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def cores_for_batches(model: Any) -> int:
    """How many batches of a model to work on at once."""
    on_cpu = model.device.type == "cpu"
    return torch.get_num_threads() if on_cpu and model.config.get_text_config().hidden_size < SMALL else 1


def side_by_side(
    work: Callable[[Batch], Result], batches: Sequence[Batch], at_once: int
) -> Iterator[tuple[Batch, Result]]:
    """Yield (batch, `work(batch)`) as they are finished, `at_once` of them at a time, which share PyTorch's threads.

    After an error nothing new is begun; it is raised once what had been begun is finished and yielded.
    """
    at_once = min(at_once, len(batches))
    if at_once < 2:
        yield from ((batch, work(batch)) for batch in batches)
        return
    threads = torch.get_num_threads()
    left = iter(batches)
    running: dict[Future[Result], Batch] = {}
    error: BaseException | None = None
    try:
        with ThreadPoolExecutor(
            at_once, initializer=torch.set_num_threads, initargs=(threads // at_once or 1,)
        ) as pool:
            while True:
                for batch in islice(left, 0 if error else at_once - len(running)):
                    running[pool.submit(work, batch)] = batch
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    batch = running.pop(future)
                    if failed := future.exception():
                        error = error or failed
                    else:
                        yield batch, future.result()
    finally:
        torch.set_num_threads(threads)
    if error:
        raise error
