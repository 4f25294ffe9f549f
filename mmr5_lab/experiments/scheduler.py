"""Carry out a sweep: each run in a process of its own, as many at once as cores and memory allow.

    run_sweep(plan, Processes(cores=2, memory=8), show)

A run that fails, dies, hangs or takes too much memory ends alone, with its log in its folder, and those that need it
are skipped; all others go on. Whatever ends a sweep, the same call continues it: finished runs are found again, others
go on from what is in their folder.
"""

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pandas as pd
import psutil
from tqdm.auto import tqdm

from mmr5_lab.experiments.grids import GridError, Job, Plan, estimates, in_words, time_left
from mmr5_lab.experiments.notebooks import RunBusyError, make_run, run_folder
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.files import read_progress

TICK = 0.5  # seconds between two looks at what runs
BUSY_AGAIN = 5.0  # seconds until a run that another process is at is tried again
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
BUSY = "busy"
CHANGED = "code, data or notebook changed after the sweep had been planned: start it again"
LOG = "log.txt"
GB = 1 << 30


@dataclass
class State:
    """Where a job stands: "waiting", "running", "done", "reused", "failed" or "skipped", and why."""

    job: Job
    state: str = "waiting"
    message: str = ""
    started: float = 0.0  # monotonic seconds
    seconds: float = 0.0  # taken so far
    not_before: float = 0.0

    @property
    def over(self) -> bool:
        return self.state not in ("waiting", "running")

    @property
    def good(self) -> bool:
        return self.state in ("done", "reused")


@dataclass
class Sweep:
    """A sweep on its way: the state of each job, and what is left to do."""

    plan: Plan
    states: dict[Path, State]
    cores: float
    seconds: dict[Path, float | None] = field(default_factory=dict)  # estimates

    def count(self, *states: str) -> int:
        return sum(state.state in states for state in self.states.values())

    @property
    def left(self) -> tuple[float, bool]:
        """Seconds that are left, and whether that counts all runs (the time of some may be unknown)."""
        still = {}
        for folder, state in self.states.items():
            if not state.over:
                expected = self.seconds.get(folder)
                still[folder] = None if expected is None else max(0.0, expected - state.seconds)
        return time_left((self.states[folder].job for folder in still), still, self.cores)

    def line(self) -> str:
        """The whole sweep in a line."""
        seconds, known = self.left
        counts = {name: self.count(name) for name in ("running", "failed", "skipped")}
        told = "".join(f", {count} {name}" for name, count in counts.items() if count)
        over = sum(state.over for state in self.states.values())
        left = f", {'about' if known else 'at least'} {in_words(seconds)} left" if seconds else ""
        return f"{over}/{len(self.states)} runs{told}{left}"

    def table(self) -> pd.DataFrame:
        """One row a job: notebook, run (hash), state, seconds, progress ("SFT step 3/40"), message."""
        rows = []
        for folder, state in self.states.items():
            progress = read_progress(folder) if state.state == "running" else None
            rows.append({
                "notebook": state.job.notebook, "run": folder.name, "state": state.state,
                "seconds": round(state.seconds, 1), "message": state.message,
                "progress": "{what} {done}/{total}".format_map(progress) if progress else "",
            })  # fmt: skip
        return pd.DataFrame(rows)


class Terminal:
    """Shows a sweep on standard error: a line for each run that starts or ends, and a bar with the time left."""

    def __init__(self) -> None:
        self._told: dict[Path, str] = {}
        self._bar = tqdm(bar_format="{desc}", disable=not sys.stderr.isatty(), leave=False)

    def __call__(self, sweep: Sweep) -> None:
        for folder, state in sweep.states.items():
            if state.state not in ("waiting", "reused", self._told.get(folder)):
                self._told[folder] = state.state
                took = f" after {in_words(state.seconds)}" if state.state in ("done", "failed") else ""
                message = ": " + state.message.replace("\n", "; ") if state.message else ""
                tqdm.write(f"{state.job.notebook} {folder.name} {state.state}{took}{message}", file=sys.stderr)
        self._bar.set_description_str(sweep.line())


class Workers(Protocol):
    """What runs jobs: `Processes` on this machine, `ray_workers.RayWorkers` on a cluster of them."""

    @property
    def cores(self) -> float: ...

    def check(self, job: Job) -> None:
        """Raises GridError for a job that can never run here."""

    def has_room(self, job: Job) -> bool: ...

    def start(self, job: Job) -> None: ...

    def ended(self) -> list[tuple[Job, str]]:
        """Jobs that ended since the last call, with an error ("" for none, BUSY for another process at that run);
        waits up to `TICK` for one."""

    def stop(self) -> None:
        """Ends all jobs that run."""


def run_sweep(plan: Plan, workers: Workers, *show: Callable[[Sweep], None]) -> Sweep:
    """Run all jobs of a plan that are not finished; each of `show` is called about every half second, and at the end.

    Returns the sweep with each job's state; failed ones have `log.txt` and `failed.txt` in their folders. Raises
    GridError, before anything starts, for a job that needs more than there is. On KeyboardInterrupt the runs that
    are on their way are ended and the interrupt passed on.
    """
    states = {folder: State(job, "reused" if job.done else "waiting") for folder, job in plan.jobs.items()}
    sweep = Sweep(plan, states, workers.cores, estimates(plan))
    for state in states.values():
        if not state.over:
            workers.check(state.job)
    try:
        while not all(state.over for state in states.values()):
            _start_what_can(sweep, workers)
            for told in show:
                told(sweep)
            for job, error in workers.ended():
                _note_end(sweep, job, error)
            for state in states.values():
                if state.state == "running":
                    state.seconds = time.monotonic() - state.started
    finally:
        workers.stop()
    for told in show:
        told(sweep)
    return sweep


def _start_what_can(sweep: Sweep, workers: Workers) -> None:
    for state in sweep.states.values():
        parents = [sweep.states[folder] for folder in state.job.takes]
        if state.state != "waiting":
            continue
        if bad := [parent for parent in parents if parent.over and not parent.good]:
            state.state, state.message = "skipped", f"{bad[0].job.notebook} {bad[0].job.folder.name} {bad[0].state}"
        elif (
            all(parent.good for parent in parents)
            and time.monotonic() >= state.not_before
            and workers.has_room(state.job)
        ):
            state.state, state.message, state.started = "running", "", time.monotonic()
            if changed(state.job):  # asked here, where the code's hash is known already
                _note_end(sweep, state.job, CHANGED)
            else:
                workers.start(state.job)


def changed(job: Job) -> bool:
    """Whether the run would be another one than was planned: notebook, code or data are no longer the same."""
    try:
        return run_folder(job.notebook, job.parameters, job.folder.parents[1]) != job.folder
    except (ValueError, OSError):  # the notebook is gone, cannot be read or lost a parameter
        return True


def _note_end(sweep: Sweep, job: Job, error: str) -> None:
    state = sweep.states[job.folder]
    state.seconds = time.monotonic() - state.started
    if error == BUSY:
        state.state, state.message = "waiting", "another process is making this run"
        state.not_before = time.monotonic() + BUSY_AGAIN
        return
    state.state, state.message = ("failed", error) if error else ("done", "")
    if error:
        with suppress(OSError):  # the disk may be full
            (job.folder / "failed.txt").write_text(error + "\n", encoding="utf-8")
        return
    for folder, other in sweep.states.items():  # the newest run of its kind tells best what others will take
        if other.job.notebook == job.notebook and sweep.seconds.get(folder) is None:
            sweep.seconds[folder] = state.seconds


class Processes:
    """Runs on this machine, within a budget of cores and memory.

    cores: default all that this process may use; memory: GB, default what is free now. Each run's libraries get as
    many threads as it has cores. A run that takes more memory than the grid gives it is ended.
    """

    def __init__(self, cores: int | None = None, memory: float | None = None):
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.cores: float = cores or usable
        self.memory = memory or psutil.virtual_memory().available / GB
        self._running: dict[Path, tuple[Job, multiprocessing.process.BaseProcess, Connection]] = {}
        # A server that has loaded the libraries forks each run's process: it starts at once, and is a clean one.
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload(["mmr5_lab.experiments.notebooks"])

    def check(self, job: Job) -> None:
        for name, unit, budget in (("cores", "cores", self.cores), ("memory", "GB of memory", self.memory)):
            if job.limits[name] > budget:
                raise GridError(
                    f"{job.notebook} asks for {job.limits[name]:g} {unit} and the sweep has {budget:.3g}: "
                    f"raise --{name}, or ask for less in the grid"
                )
        if job.limits["gpus"]:
            raise GridError(f"{job.notebook} asks for GPUs, which only Ray hands out: use --backend ray")

    def has_room(self, job: Job) -> bool:
        return all(
            sum(other.limits[name] for other, _, _ in self._running.values()) + job.limits[name] <= budget
            for name, budget in (("cores", self.cores), ("memory", self.memory))
        )

    def start(self, job: Job) -> None:
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(job, project_root(), sender), name=job.notebook)
        with _no_main():
            process.start()
        sender.close()
        self._running[job.folder] = (job, process, receiver)

    def ended(self) -> list[tuple[Job, str]]:
        wait([process.sentinel for _, process, _ in self._running.values()], timeout=TICK)
        found = []
        for job, process, receiver in list(self._running.values()):
            if not process.is_alive():
                found.append((job, _last_word(process, receiver)))
                self._forget(job)
            elif (limit := job.limits["memory"]) and _memory(process.pid) > limit * GB:
                self._end(job)
                found.append((job, f"it took more than its {limit:g} GB of memory and was ended"))
        return found

    def stop(self) -> None:
        for job, _, _ in list(self._running.values()):
            self._end(job)

    def _end(self, job: Job) -> None:
        _kill(_tree(self._running[job.folder][1].pid))
        self._forget(job)

    def _forget(self, job: Job) -> None:
        _, process, receiver = self._running.pop(job.folder)
        process.join()
        receiver.close()


@contextmanager
def _no_main() -> Iterator[None]:
    """What starts meanwhile does not import the caller's script, and all that it imports, once more for each run."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _last_word(process: Any, receiver: Connection) -> str:
    try:
        return receiver.recv()
    except EOFError:  # it did not get to say one
        code = process.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"its process {how} (out of memory?)"


def work(job: Job, project: Path) -> str:
    """Make one run, in a process for it alone. Returns why it failed ("" if it did not), or BUSY."""
    os.chdir(project)
    os.environ.update(dict.fromkeys(THREADS, str(int(job.limits["cores"]))))
    minutes = job.limits["timeout"]
    too_long = threading.Event()

    def end() -> None:
        too_long.set()
        kill_children()

    clock = threading.Timer(60 * minutes, end) if minutes else None
    try:
        if clock:
            clock.start()
        make_run(job.notebook, job.parameters, job.folder)
    except RunBusyError:
        return BUSY
    except Exception as error:
        if too_long.is_set():
            return f"it took longer than its {minutes:g} minutes and was ended"
        with suppress(OSError), (job.folder / LOG).open("a", encoding="utf-8") as log:  # the disk may be full
            traceback.print_exc(file=log)
        full = "No space left on device" in str(error)
        return (str(error) or type(error).__name__) + "\nfree some space and start the sweep again" * full
    finally:
        if clock:
            clock.cancel()
    return ""


def _work(job: Job, project: Path, sender: Connection) -> None:
    """`work` as a process of this machine: in a session of its own, with a log, ending when the sweep does."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is the sweep's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / LOG).open("a", encoding="utf-8") as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
    except OSError as error:
        sender.send(str(error))
    else:
        sender.send(work(job, project))


def _end_with_parent() -> None:
    """A sweep that is killed must not leave runs behind that go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        _kill(_tree(os.getpid()))


def kill_children() -> None:
    """End all that this process has started."""
    _kill(_tree(os.getpid())[:-1])


def _tree(pid: int | None) -> list[psutil.Process]:
    """A process's descendants (its kernel has a process group of its own) and, last, itself; [] if it is gone."""
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs([process for process in processes if process.pid != os.getpid()], timeout=10)


def _memory(pid: int | None) -> int:
    """Bytes that a process and its children hold."""
    held = 0
    for process in _tree(pid):
        with suppress(psutil.NoSuchProcess):
            held += process.memory_info().rss
    return held
