"""Sweeps with real processes: what fails ends alone, nothing finished is lost, nothing half-done is taken for done."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from mmr5_lab.cli import main
from mmr5_lab.experiments.grids import GridError, plan_sweep, read_grid
from mmr5_lab.experiments.notebooks import run_notebook
from mmr5_lab.experiments.scheduler import Processes, run_sweep
from mmr5_lab.files import results

DATA, SFT = "01_data_construction", "02_sft"


def write_grid(folder, **told) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"notebooks": [DATA]} | told, sort_keys=False))
    return path


def plan(folder, root="runs", **told):
    return plan_sweep(read_grid(write_grid(folder, **told)), root)


def sweep_process(folder, *options) -> subprocess.Popen:
    """`mmr5 sweep` as a user starts it."""
    command = [sys.executable, "-m", "mmr5_lab.cli", "sweep", "grid.yaml", "--cores", "2", *options]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )  # fmt: skip


def until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def begun(folder) -> list[Path]:
    return list(folder.glob("runs/*/*/begun.txt"))


def kernels_in(folder) -> list[psutil.Process]:
    """Kernels that work for this project."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and "ipykernel_launcher" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_what_fails_ends_alone(toy):
    """One cell raises, one kernel is killed, one run hangs, one eats memory; the others finish."""
    cases = {
        "good": {"notebooks": [DATA, SFT]},
        "raises": {"notebooks": [DATA, SFT], "HOW": "raise"},
        "dies": {"notebooks": [DATA], "HOW": "die"},
        "hangs": {"notebooks": ["hang"]},
        "eats": {"notebooks": ["eat"]},
    }
    planned = plan(
        toy, notebooks=[DATA, SFT, "hang", "eat"], axes=[{"case": cases}], timeout={"hang": 0.05}, memory={"eat": 0.8}
    )
    states = list(run_sweep(planned, Processes(cores=2)).states.values())
    assert [(state.job.notebook, state.state) for state in states] == [
        (DATA, "done"),
        (SFT, "done"),
        (DATA, "failed"),
        (SFT, "skipped"),
        (DATA, "failed"),
        ("hang", "failed"),
        ("eat", "failed"),
    ]
    good, sft, raised, skipped, died, hung, ate = states
    assert results(good.job.folder) == {"square": 1, "threads": "1"}, "a run has as many threads as cores"
    assert results(sft.job.folder) == {"score": 1.0}
    assert "ValueError: no such page" in raised.message
    assert "NotebookFailedError" in (raised.job.folder / "log.txt").read_text()
    assert skipped.message == f"{DATA} {raised.job.folder.name} failed"
    assert "its kernel died: it was killed (out of memory?)" in died.message
    assert hung.message == "it took longer than its 0.05 minutes and was ended"
    assert ate.message == "it took more than its 0.8 GB of memory and was ended"
    for state in (raised, died, hung, ate):
        assert not (state.job.folder / "results.json").exists()
        assert (state.job.folder / "failed.txt").read_text().strip()
    assert not kernels_in(toy), "nothing is left running"


def test_an_error_longer_than_a_pipe_ends_its_run(toy):
    """100 kB of message: the run waited for ever for somebody to read it."""
    [state] = run_sweep(plan(toy, notebooks=[DATA], axes=[{"HOW": ["long"]}]), Processes(cores=1)).states.values()
    assert state.state == "failed"
    assert "x" * 1000 in state.message


def test_a_killed_sweep_leaves_nothing_running_and_continues(toy):
    write_grid(toy, axes=[{"X": [1, 2, 3], "SLEEP": [0.0, 600.0, 600.0]}])
    process = sweep_process(toy)
    until(lambda: list(toy.glob("runs/*/*/results.json")) and len(begun(toy)) == 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not kernels_in(toy), 30)
    [finished] = toy.glob("runs/*/*/results.json")
    stamp = finished.stat().st_mtime_ns

    again = sweep_process(toy)
    until(lambda: sum(len(path.read_text()) for path in begun(toy)) == 5)
    assert finished.stat().st_mtime_ns == stamp, "what was finished is not done again"

    os.kill(again.pid, signal.SIGINT)  # Ctrl-C
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 1
    assert "3 runs, 1 finished before" in output
    assert "interrupted; the same command goes on from here" in output
    assert not kernels_in(toy)


def test_results_that_cannot_be_trusted_are_set_aside_and_made_again(toy, caplog, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the sweep gives its runs
    folder = run_notebook(DATA, {"X": 4})
    manifest = folder / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:40])
    planned = plan(toy, axes=[{"X": [4]}])
    assert not planned.jobs[folder].done
    assert run_sweep(planned, Processes(1)).count("done") == 1
    assert json.loads(manifest.read_text())["hash"] == folder.name
    aside = folder.with_name(f"{folder.name}.damaged")
    assert (aside / "manifest.json").read_text() == whole[:40], "and nothing is lost"
    assert results(aside) == results(folder)

    shutil.copytree(folder, folder.with_name("0123456789ab"))  # a manifest of another run
    assert plan(toy, axes=[{"X": [4]}]).jobs[folder].done


def test_two_sweeps_on_one_folder_share_the_work(toy):
    write_grid(toy, axes=[{"X": [1, 2], "SLEEP": [1.0, 1.0]}])
    both = [sweep_process(toy), sweep_process(toy)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [path.read_text() for path in begun(toy)] == ["x", "x"], "each run was made once"


def test_a_full_disk_fails_one_run_and_is_told(toy):
    disk = toy / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        planned = plan(toy, root="disk/runs", axes=[{"X": [6]}])
        with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 1000)
        [state] = run_sweep(planned, Processes(1)).states.values()
        assert state.state == "failed"
        assert "No space left on device" in state.message
        assert "free some space and start the sweep again" in state.message
        (disk / "ballast").unlink()
        assert run_sweep(plan(toy, root="disk/runs", axes=[{"X": [6]}]), Processes(1)).count("done") == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_more_than_there_is_can_be_refused_before_anything_starts(toy):
    for told, message in (
        ({"cores": 4}, "asks for 4 cores and the sweep has 2: raise --cores, or ask for less in the grid"),
        ({"memory": 9}, "asks for 9 GB of memory and the sweep has 8: raise --memory"),
        ({"gpus": 1}, "GPUs, which only Ray hands out: use --backend ray"),
    ):
        with pytest.raises(GridError, match=message):
            run_sweep(plan(toy, **told), Processes(cores=2, memory=8))
    assert not (toy / "runs").exists()


def test_what_changes_after_the_plan_is_told_and_not_run(toy):
    planned = plan(toy, axes=[{"X": [1, 2], "SLEEP": [1.5, 0.0]}])
    path = toy / "notebooks" / f"{DATA}.ipynb"

    def edit_during_the_first(sweep):
        if begun(toy):
            path.write_text(path.read_text().replace("'squared'", "'times itself'"))

    first, second = run_sweep(planned, Processes(1), edit_during_the_first).states.values()
    assert (first.state, second.state) == ("done", "failed")
    assert second.message == "code, data or notebook changed after the sweep had been planned: start it again"
    assert not second.job.folder.exists()
    path.unlink()
    [state, _] = run_sweep(planned, Processes(1)).states.values()
    assert state.message == second.message


def test_the_command_line(toy, capsys):
    grid = str(write_grid(toy, axes=[{"X": [1]}]))
    assert main(["sweep", grid, "--dry-run"]) == 0
    assert "1 combinations (0 skipped), 1 runs, 0 finished before" in capsys.readouterr().out
    assert not (toy / "runs").exists()
    write_grid(toy, axes=[{"Y": [1]}])
    assert main(["sweep", grid]) == 2
    assert "has a parameter Y" in capsys.readouterr().err
    assert not multiprocessing.active_children()
