"""Carry out a sweep: each run in a process of its own, as many at once as cores and memory allow.

    run_sweep(plan, Processes(cores=2, memory=8), show)

A run that fails, dies, hangs or takes too much memory ends alone, with its log in its folder, and the runs that need it
are skipped; all others go on. Whatever ends a sweep, the same call continues it: finished runs are reused, others
go on from what is in their folders.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import psutil
from tqdm.auto import tqdm

from mmr5_lab.experiments.grids import (
    GridError,
    Job,
    Plan,
    as_text,
    estimates,
    in_words,
    plan_sweep,
    read_grid,
    time_left,
)
from mmr5_lab.experiments.notebooks import run_folder
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.experiments.worker import BUSY, LOG, kill, tree
from mmr5_lab.files import read_progress

if TYPE_CHECKING:
    from mmr5_lab.experiments.ray_workers import RayWorkers

TICK = 0.5  # seconds between two looks at what runs
BUSY_AGAIN = 5.0  # seconds until a run that another process is making is tried again
CHANGED = "code, data or notebook changed after the sweep had been planned: start it again"
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
    """A sweep on its way: the state of each job, and an estimate of what remains."""

    plan: Plan
    states: dict[Path, State]
    cores: float
    seconds: dict[Path, float | None] = field(default_factory=dict)  # estimates

    def count(self, *states: str) -> int:
        return sum(state.state in states for state in self.states.values())

    def line(self) -> str:
        """The whole sweep in a line."""
        counts = {name: self.count(name) for name in ("running", "failed", "skipped")}
        others = "".join(f", {count} {name}" for name, count in counts.items() if count)
        over = sum(state.over for state in self.states.values())
        expected = {folder: seconds for folder, seconds in self.seconds.items() if seconds is not None}
        open_jobs = [state.job for state in self.states.values() if not state.over]
        remaining = {f: max(0.0, seconds - self.states[f].seconds) for f, seconds in expected.items()}
        seconds, known = time_left(open_jobs, remaining, self.cores)
        time_text = f", {'about' if known else 'at least'} {in_words(seconds)} left" if seconds else ""
        return f"{over}/{len(self.states)} runs{others}{time_text}"

    def check(self) -> None:
        """Raise RuntimeError that names the first run that failed, where there is one."""
        if bad := [state for state in self.states.values() if not state.good]:
            raise RuntimeError(
                f"{self.count('failed')} of {len(self.states)} runs failed and {self.count('skipped')} were skipped "
                f"for that; the first is {bad[0].job.folder}: {bad[0].message}. The same command tries them again"
            )

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
    """Show a sweep on standard error: a line for each run that starts or ends, and a bar with the time left."""

    def __init__(self) -> None:
        self._shown: dict[Path, str] = {}
        self._bar = tqdm(bar_format="{desc}", disable=not sys.stderr.isatty(), leave=False)

    def __call__(self, sweep: Sweep) -> None:
        for folder, state in sweep.states.items():
            if state.state not in ("waiting", "reused", self._shown.get(folder)):
                self._shown[folder] = state.state
                took = f" after {in_words(state.seconds)}" if state.state in ("done", "failed") else ""
                message = ": " + state.message.replace("\n", "; ") if state.message else ""
                tqdm.write(f"{state.job.notebook} {folder.name} {state.state}{took}{message}", file=sys.stderr)
        self._bar.set_description_str(sweep.line())


def run_sweep(plan: Plan, workers: "Processes | RayWorkers", *show: Callable[[Sweep], None]) -> Sweep:
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
            for state in states.values():
                if state.state == "waiting":
                    _start_or_skip(sweep, state, workers)
            for view in show:
                view(sweep)
            for job, error in workers.ended():
                _note_end(sweep, job, error)
            for state in states.values():
                if state.state == "running":
                    state.seconds = time.monotonic() - state.started
    finally:
        workers.stop()
    for view in show:
        view(sweep)
    return sweep


def _start_or_skip(sweep: Sweep, state: State, workers: "Processes | RayWorkers") -> None:
    """Start a waiting job that has all it needs; skip one whose parent run failed."""
    job = state.job
    parents = [sweep.states[folder] for folder in job.takes]
    if bad := [parent for parent in parents if parent.over and not parent.good]:
        state.state, state.message = "skipped", f"{bad[0].job.notebook} {bad[0].job.folder.name} {bad[0].state}"
    elif all(p.good for p in parents) and time.monotonic() >= state.not_before and workers.has_room(job):
        state.state, state.message, state.started = "running", "", time.monotonic()
        if changed(job):  # asked here and not in the run's process: this one has hashed the code already
            _note_end(sweep, job, CHANGED)
        else:
            workers.start(job)


def changed(job: Job) -> bool:
    """Return whether notebook, code or data changed since planning, so that this is not the planned run any more."""
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
    for folder, other in sweep.states.items():  # the first run of its kind is the best estimate for the others
        if other.job.notebook == job.notebook and sweep.seconds.get(folder) is None:
            sweep.seconds[folder] = state.seconds


class Processes:
    """Runs on this machine, within a budget of cores and memory; `ray_workers.RayWorkers` has the same methods.

    cores: default all that this process may use; memory: GB, default what is free now. Each run's libraries get as
    many threads as it has cores. A run that takes more memory than the grid gives it is ended.
    """

    def __init__(self, cores: int | None = None, memory: float | None = None):
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.cores: float = cores or usable
        self.memory = memory or psutil.virtual_memory().available / GB
        self._threads = futures.ThreadPoolExecutor(2 * int(self.cores))  # two for each run, which has a core or more
        self._running: dict[futures.Future[str], Job] = {}
        self._stopped = threading.Event()

    def check(self, job: Job) -> None:
        """Raise GridError for a job that can never run here."""
        for name, unit, budget in (("cores", "cores", self.cores), ("memory", "GB of memory", self.memory)):
            if job.limits[name] > budget:
                raise GridError(
                    f"{job.notebook} asks for {job.limits[name]:g} {unit} and the sweep has {budget:.3g}: "
                    f"raise --{name}, or ask for less in the grid"
                )
        if job.limits["gpus"]:
            raise GridError(f"{job.notebook} asks for GPUs, which only Ray hands out: use --backend ray")

    def has_room(self, job: Job) -> bool:
        jobs = [job, *self._running.values()]
        return all(
            sum(one.limits[name] for one in jobs) <= budget
            for name, budget in (("cores", self.cores), ("memory", self.memory))
        )

    def start(self, job: Job) -> None:
        self._running[self._threads.submit(self._run, job)] = job

    def ended(self) -> list[tuple[Job, str]]:
        """Return jobs that ended since the last call, with an error: "" for none, BUSY for a run that another process
        makes. Waits up to `TICK` for one."""
        if not self._running:
            time.sleep(TICK)
        over, _ = futures.wait(self._running, TICK, futures.FIRST_COMPLETED)
        return [(self._running.pop(one), str(one.exception() or one.result())) for one in over]

    def stop(self) -> None:
        """End all jobs that run."""
        self._stopped.set()
        self._threads.shutdown()

    def _run(self, job: Job) -> str:
        """Let a process make a run, and return its outcome (see `worker.main`) or why the process was ended."""
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / LOG).open("a", encoding="utf-8") as log:
            process: Any = subprocess.Popen(
                [sys.executable, "-m", "mmr5_lab.experiments.worker"], cwd=project_root(), text=True, encoding="utf-8",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,  # Ctrl-C is for the sweep, which ends its runs itself
            )  # fmt: skip
        with process:
            process.stdin.write(json.dumps(job.work()) + "\n")
            process.stdin.flush()  # and stays open: its end would mean that the sweep is gone
            outcome = self._threads.submit(process.stdout.read)  # a pipe that nobody reads is full after 64 KiB
            limit = job.limits["memory"]
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(TICK)
                    break
                too_large = limit and _memory(process.pid) > limit * GB
                if too_large or self._stopped.is_set():
                    kill(process.pid)
                    return f"it took more than its {limit:g} GB of memory and was ended" if too_large else "stopped"
            if code == 0:
                return outcome.result()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"its process {how} (out of memory?)"


def _memory(pid: int) -> int:
    """Bytes that a process and all that it started hold."""
    held = 0
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess):
            held += process.memory_info().rss
    return held


def sweep(
    grid: str | Path,
    root: str | Path,
    *,
    dry_run: bool,
    cores: int | None,
    memory: float | None,
    backend: str,
    address: str | None,
    tracker: str | None,
) -> None:
    """Carry out a grid file, shown in the terminal: what `mmr5 sweep` does.

    Raises GridError before anything starts, RuntimeError at the end where a run failed.
    """
    plan = plan_sweep(read_grid(grid), root)
    workers: Any = Processes(cores, memory)
    if backend == "ray" and not dry_run:
        from mmr5_lab.experiments.ray_workers import RayWorkers  # Ray is an extra

        workers = RayWorkers(address, cores)
    print(as_text(plan, workers.cores), flush=True)
    if dry_run:
        return
    views: list[Callable[[Sweep], None]] = [Terminal()]
    if tracker:
        from mmr5_lab.experiments.trackers import Tracked  # loads PyTorch

        views.append(Tracked(tracker))
    run_sweep(plan, workers, *views).check()
