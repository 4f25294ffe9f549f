"""What the benchmarks share: arguments, interleaved timing, the table and its JSON."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch


def arguments(description: str, shapes: Sequence[str] = (), busy: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="less data, one round")
    parser.add_argument("--json", metavar="OUT", type=Path, help="also write the rows as JSON")
    parser.add_argument("--model", help="model folder (default: the newest run of 03_grpo, else the miniature's base)")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="also draw the rates (where a benchmark can)")
    if busy:
        parser.add_argument("--busy", action="store_true", help="instead: alone, and beside two busy processes")
    if shapes:
        parser.add_argument(
            "--shape", choices=shapes, default=shapes[0], help=f"model to measure (default: {shapes[0]})"
        )
    return parser.parse_args()


def interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each way, round by round and one after another, so that a slow minute hits all; last results."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - started)
    return seconds, results


@contextmanager
def chat_server(latency: float, failing: float = 0.0, answer: str = "") -> Iterator[str]:
    """The address of a running `chat_server.py`."""
    command = [sys.executable, Path(__file__).with_name("chat_server.py"), str(latency), str(failing), answer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


@contextmanager
def busy_processes(count: int = 2) -> Iterator[None]:
    """Processes that do nothing but take their share of the cores."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()


class Peak:
    """Largest resident memory of this process while it runs, sampled every 5 ms, in MB."""

    def __enter__(self):
        self.megabytes, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        process = psutil.Process()
        while not self._done.wait(0.005):
            self.megabytes = max(self.megabytes, process.memory_info().rss / 1e6)

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()


class Report:
    """Rows of a benchmark; `add` takes seconds of both ways for the same amount of work."""

    def __init__(self, title: str):
        print(f"{title}\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads\n")
        print(f"{'':44}{'baseline':>12}{'ours':>12}  {'unit':16}{'ratio':>7}")
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, baseline: list[float], ours: list[float], work: float, unit: str, note: str = "") -> None:
        """Rates are medians of work ÷ seconds; the ratio is above 1 where ours is faster. Spread: slowest, fastest."""
        rates = [statistics.median(work / s for s in seconds) for seconds in (baseline, ours)]
        spread = [[work / max(seconds), work / min(seconds)] for seconds in (baseline, ours)]
        self.write(name, *rates, unit, note, {"spread": spread, "rounds": len(ours)})

    def write(
        self, name: str, baseline: float, ours: float, unit: str, note: str = "", more: dict | None = None
    ) -> None:
        """A row of figures where more is better."""
        row = {"name": name, "baseline": baseline, "ours": ours, "unit": unit, "ratio": ours / baseline}
        print(f"{name:44}{baseline:>12.4g}{ours:>12.4g}  {unit:16}{row['ratio']:>7.2f}  {note}", flush=True)
        self.rows.append(row | ({"note": note} if note else {}) | (more or {}))

    def finish(self, path: Path | None) -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.rows, indent=1))


def model_folder(given: str | None) -> str:
    """The model to measure: the one named, the newest trained one, or the base (which answers no question)."""
    from mmr5_lab.experiments.runs import latest, project_root
    from mmr5_lab.files import results

    if given:
        return given
    try:
        return str(project_root() / results(latest("03_grpo", project_root() / "runs"))["model"])
    except FileNotFoundError:
        print("no run of 03_grpo (make demo makes one): measuring the base, which writes no rankings\n")
        return str(project_root() / "data/mini/base")
