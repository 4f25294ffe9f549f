"""Sweeps on Ray: the same runs; the runs of a worker or of a node that is killed are made again."""

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'mmr5-lab[ray]'")

from ray.cluster_utils import Cluster

from mmr5_lab.experiments.grids import GridError, plan_sweep, read_grid
from mmr5_lab.experiments.ray_workers import RayWorkers
from mmr5_lab.experiments.scheduler import run_sweep
from mmr5_lab.files import results

DATA = "01_data_construction"
GRID = """
notebooks: [01_data_construction, 02_sft, hang]
axes:
  - case:
      chain: {notebooks: [01_data_construction, 02_sft], X: 3}
      raises: {notebooks: [01_data_construction], HOW: raise}
      slow: {notebooks: [01_data_construction], X: 5, SLEEP: 20.0}
      hangs: {notebooks: [hang]}
timeout: {hang: 0.05}
"""


def test_a_sweep_on_ray(toy):
    (toy / "grid.yaml").write_text(GRID)
    plan = plan_sweep(read_grid("grid.yaml"))
    slow = next(job.folder for job in plan.jobs.values() if job.parameters.get("X") == 5)
    killed: list[int] = []

    def kill_the_slow_runs_worker(sweep):
        """Once its kernel is at work: the kernel's parent is Ray's worker process."""
        if killed or not (slow / "begun.txt").exists():
            return
        for process in psutil.process_iter():
            try:
                if "ipykernel_launcher" in " ".join(process.cmdline()) and _runs_in(process, slow):
                    killed.append(process.ppid())
                    psutil.Process(process.ppid()).kill()
            except psutil.Error:
                continue

    workers = RayWorkers(cores=2)
    with pytest.raises(GridError, match="asks for 64 cores and the cluster has 2"):
        workers.check(next(iter(plan_of(toy, GRID + "cores: 64\n").jobs.values())))
    sweep = run_sweep(plan, workers, kill_the_slow_runs_worker)
    assert [state.state for state in sweep.states.values()] == ["done", "done", "failed", "done", "failed"]
    chain, sft, raised, retried, hung = sweep.states.values()
    assert results(chain.job.folder) == {"square": 9, "threads": "1"}
    assert results(sft.job.folder) == {"score": 9.0}
    assert "no such page" in raised.message
    assert killed, "its worker was killed"
    assert (retried.job.folder / "begun.txt").read_text() == "xx", "and Ray began it again"
    assert hung.message == "it took longer than its 0.05 minutes and was ended"
    assert "no such page" in (raised.job.folder / "log.txt").read_text()


def test_a_node_of_two_is_killed(toy):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    plan = plan_of(toy, "notebooks: [01_data_construction]\naxes: [{X: [1, 2, 3]}, {SLEEP: [20.0]}]\n")
    removed: list[bool] = []

    def kill_the_second_node(sweep):
        """Once both nodes have a run at work."""
        if not removed and sum((job.folder / "begun.txt").exists() for job in plan.jobs.values()) == 2:
            removed.append(cluster.remove_node(second, allow_graceful=False))

    workers = RayWorkers(address=cluster.address)
    try:
        assert workers.cores == 2
        sweep = run_sweep(plan, workers, kill_the_second_node)
    finally:
        cluster.shutdown()
    assert removed, "a node was killed"
    assert [state.state for state in sweep.states.values()] == ["done"] * 3
    assert [results(job.folder)["square"] for job in plan.jobs.values()] == [1, 4, 9]
    assert sorted((job.folder / "begun.txt").read_text() for job in plan.jobs.values()) == ["x", "x", "xx"]


def plan_of(folder, text):
    (folder / "other.yaml").write_text(text)
    return plan_sweep(read_grid("other.yaml"))


def _runs_in(process: psutil.Process, folder) -> bool:
    """Does this kernel make the run in `folder`? Its parent holds the lock of that run."""
    return any(folder.name in file.path for file in psutil.Process(process.ppid()).open_files())
