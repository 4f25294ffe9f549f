"""Runs of a sweep on a Ray cluster, of this machine alone or of many (`mmr5 sweep GRID --backend ray --address …`).

Which node has room, GPUs, retries after a lost worker or node: all that is Ray's. All nodes need this checkout and the
folder of runs at the same path, as on a shared file system. Ray is an extra: pip install 'mmr5-lab[ray]'.
"""

import os
import time
from pathlib import Path
from typing import Any

from mmr5_lab.experiments.grids import GridError, Job
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.experiments.scheduler import CHANGED, GB, TICK, changed
from mmr5_lab.experiments.worker import work

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: nothing is reported
try:
    import ray
except ImportError:
    raise RuntimeError("--backend ray needs Ray: pip install 'mmr5-lab[ray]'") from None

RETRIES = 3  # of a run whose worker or node is lost; one that fails by itself is not tried again


class RayWorkers:
    """Workers of a sweep (see `scheduler.Processes`).

    address: of a running cluster ("auto" for the one on this machine); None starts one here, for this sweep alone
    cores: of a cluster that is started here; default all
    """

    def __init__(self, address: str | None = None, cores: int | None = None):
        path = os.pathsep.join(filter(None, [str(project_root()), os.environ.get("PYTHONPATH")]))
        ours: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False} if address is None else {}
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}}, **ours)
        self._work = ray.remote(_work)
        self._running: dict[ray.ObjectRef, Job] = {}

    @property
    def cores(self) -> float:
        return ray.cluster_resources().get("CPU", 1)

    def check(self, job: Job) -> None:
        """A cluster may grow; of one that is here, a job must not ask for more than all nodes have together."""
        there = ray.cluster_resources()
        for name, resource in (("cores", "CPU"), ("gpus", "GPU")):
            asked, has = job.limits[name], there.get(resource, 0)
            if asked > has:
                raise GridError(f"{job.notebook} asks for {asked:g} {name} and the cluster has {has:g}")

    def has_room(self, job: Job) -> bool:
        return True  # what has no room yet waits in Ray's queue

    def start(self, job: Job) -> None:
        limits = job.limits
        task = self._work.options(
            num_cpus=limits["cores"], num_gpus=limits["gpus"], memory=int(limits["memory"] * GB) or None,
            max_retries=RETRIES, name=f"{job.notebook} {job.folder.name}",
        )  # fmt: skip
        self._running[task.remote(job, project_root())] = job

    def ended(self) -> list[tuple[Job, str]]:
        if not self._running:
            time.sleep(TICK)
            return []
        over, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=TICK)
        return [(self._running.pop(task), _outcome(task)) for task in over]

    def stop(self) -> None:
        for task in self._running:
            ray.cancel(task, force=True)
        ray.shutdown()


def _work(job: Job, project: Path) -> str:
    """`work` on a node, where the run may have waited for long."""
    os.chdir(project)
    return CHANGED if changed(job) else work(**job.work())


def _outcome(task: ray.ObjectRef) -> str:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return f"Ray lost it {RETRIES + 1} times, the last time: {error}"
