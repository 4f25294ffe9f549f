"""One run of a sweep, in a process of its own: `python -m mmr5_lab.experiments.worker`, which the scheduler starts.

The process reads its job, a line of JSON with the arguments of `work`, from standard input, and writes why the run
failed to standard output (nothing for a run that did not). Standard input stays open while the sweep lives; when it
closes, the run ends too.
"""

import json
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from mmr5_lab.experiments.notebooks import make_run
from mmr5_lab.experiments.runs import RunBusyError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
BUSY = "busy"
LOG = "log.txt"


def main() -> None:
    outcome = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anything else prints belongs into the log; a kernel that outlives us must not hold the pipe
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_sweep, daemon=True).start()
    outcome.write(work(**job))
    outcome.close()


def work(notebook: str, parameters: dict[str, Any], folder: str, cores: int, minutes: float) -> str:
    """Make one run and return why it failed ("" if it did not), or BUSY where another process is making it.

    cores: threads that the run's libraries may use
    minutes: the run is ended after them; 0 for no limit
    """
    os.environ.update(dict.fromkeys(THREADS, str(cores)))  # the kernel inherits them
    too_late = threading.Event()

    def end() -> None:
        too_late.set()
        kill(os.getpid(), itself=False)

    clock = threading.Timer(60 * minutes, end)
    try:
        if minutes:
            clock.start()
        make_run(notebook, parameters, Path(folder))
    except RunBusyError:
        return BUSY
    except Exception as error:
        if too_late.is_set():
            return f"it took longer than its {minutes:g} minutes and was ended"
        with suppress(OSError), (Path(folder) / LOG).open("a", encoding="utf-8") as log:  # the disk may be full
            traceback.print_exc(file=log)
        full = "No space left on device" in str(error)
        return (str(error) or type(error).__name__) + "\nfree some space and start the sweep again" * full
    finally:
        clock.cancel()
    return ""


def _end_with_sweep() -> None:
    """End this process and all that it started once the sweep is gone, so that no run goes on writing."""
    os.read(0, 1)  # not sys.stdin, whose lock a thread must not hold when Python ends
    kill(os.getpid())


def tree(pid: int) -> list[psutil.Process]:
    """Return what a process has started, at any depth (a kernel has a process group of its own), and last itself."""
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def kill(pid: int, itself: bool = True) -> None:
    """End all that a process has started, and the process."""
    ended = [process for process in tree(pid) if itself or process.pid != pid]
    for process in ended:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ended, timeout=10)


if __name__ == "__main__":
    main()
