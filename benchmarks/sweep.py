"""A sweep side by side against its runs one after another, and the ledger over many runs.

    python benchmarks/sweep.py [--quick] [--json OUT]

Eight short runs of notebook 01, on two cores: in a loop (`run_notebook`, the libraries free to use both cores), and as
a sweep of two at a time, with the same results. Then 10,000 synthetic run folders: listed, and filtered.
"""

import json
import tempfile
import time
from pathlib import Path

from common import Report, arguments

from mmr5_lab.experiments.grids import plan_sweep, read_grid
from mmr5_lab.experiments.history import leaderboard, runs_table
from mmr5_lab.experiments.notebooks import run_notebook
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.experiments.scheduler import Processes, run_sweep
from mmr5_lab.files import results

CORES = 2
GRID = """
notebooks: [01_data_construction]
axes:
  - NUM_CANDIDATES: {candidates}
  - SEED: [0, 1]
parameters: {{01_data_construction: {{MAX_TRACES: 20}}}}
"""
CHAIN = ("01_data_construction", "02_sft", "03_grpo", "04_inference", "05_evaluation")
PARENT = ("", "DATA_RUN", "SFT_RUN", "GRPO_RUN", "INFERENCE_RUN")


def main() -> None:
    given = arguments(__doc__)
    report = Report("Sweeps")
    with tempfile.TemporaryDirectory(dir=project_root()) as folder:  # inside: runs are named by paths from here
        _side_by_side(report, Path(folder), [3, 4, 5, 6] if not given.quick else [3, 5])
        _ledger(report, Path(folder) / "many", 10_000 if not given.quick else 1_000)
    report.finish(given.json)


def _side_by_side(report: Report, folder: Path, candidates: list[int]) -> None:
    grid = folder / "grid.yaml"
    grid.write_text(GRID.format(candidates=candidates))
    plan = plan_sweep(read_grid(grid), folder / "sweep")
    started = time.perf_counter()
    sweep = run_sweep(plan, Processes(CORES))
    together = time.perf_counter() - started
    assert sweep.count("done") == len(plan.jobs), sweep.table()

    started = time.perf_counter()
    alone = [run_notebook(job.notebook, job.parameters, folder / "loop") for job in plan.jobs.values()]
    one_by_one = time.perf_counter() - started
    assert [results(one) for one in alone] == [results(one) for one in plan.jobs], "both ways must give the same"
    share = f"{together:.1f} s, {together / one_by_one:.0%} of {one_by_one:.1f} s"
    report.add(
        f"{len(alone)} runs of 01 on {CORES} cores", [one_by_one], [together], len(alone) * 60, "runs/min", share
    )


def _ledger(report: Report, root: Path, count: int) -> None:
    for k in range(count):
        step = k % len(CHAIN)
        run = root / CHAIN[step] / f"{k:012x}"
        run.mkdir(parents=True)
        parameters = {"SEED": k % 3, "LORA_RANK": 8 << k % 7 % 3, "CORPUS": "data/mini/corpus", "MODE": "reason"}
        if step:
            parameters[PARENT[step]] = str(root / CHAIN[step - 1] / f"{k - 1:012x}")
        manifest = {"notebook": CHAIN[step], "hash": run.name, "parameters": parameters, "started": f"2026-01-{k:05}"}
        (run / "manifest.json").write_text(
            json.dumps(manifest | {"packages": dict.fromkeys("abcdefgh", "1.0")}, indent=2)
        )
        table = {system: {"micro R@1": k % 89 / 89, "valid": 1.0} for system in ("SFT", "SFT + RL")}
        (run / "results.json").write_text(json.dumps({"loss": k % 97 / 97, "table": table}, indent=2))
    for name, look in (
        ("list", lambda: runs_table(root)),
        ("filter", lambda: runs_table(root, ["notebook=02_sft", "LORA_RANK=8", "loss<0.5"])),
        ("leaderboard", lambda: leaderboard(root)),
    ):
        started = time.perf_counter()
        rows = len(look())
        seconds = time.perf_counter() - started
        # the bar is two seconds, and nothing else does this
        report.add(
            f"ledger of {count} runs: {name}", [2.0], [seconds], count, "runs/s", f"{seconds:.2f} s, {rows} rows"
        )


if __name__ == "__main__":
    main()
