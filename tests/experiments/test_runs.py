"""Run folders say whether they can be trusted."""

import json
import os
import subprocess
import sys

import papermill
import pytest

from mmr5_lab.experiments.history import parents_of
from mmr5_lab.experiments.notebooks import run_folder, run_notebook
from mmr5_lab.experiments.parameters import NotebookError
from mmr5_lab.experiments.runs import RunBusyError, RunError, enter_project, latest, open_run, read_run, with_newest
from mmr5_lab.files import read_progress, report_progress, results

DATA = "01_data_construction"

MANIFEST = json.dumps({"notebook": "02_sft", "hash": "abc"})


def finish(folder, seconds):
    """A run folder whose results are of this time."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(MANIFEST)
    (folder / "results.json").write_text("{}")
    os.utime(folder / "results.json", (seconds, seconds))


@pytest.mark.parametrize(
    ("manifest", "results", "done", "fault"),
    [
        (MANIFEST, '{"loss": 1}', True, ""),
        (MANIFEST, "{}", True, ""),
        (MANIFEST, None, False, ""),  # begun
        (None, None, False, ""),
        (None, "{}", False, "manifest.json is missing"),
        (MANIFEST[:9], "{}", False, "manifest.json cannot be read"),
        ("[]", "{}", False, "manifest.json is not a JSON object"),
        (MANIFEST, '{"loss": ', False, "results.json cannot be read"),
        (MANIFEST, "", False, "results.json cannot be read"),  # a disk that was full
        (MANIFEST, b"\xff\x00", False, "results.json cannot be read"),
    ],
)
def test_a_run_is_done_when_both_files_are_whole(tmp_path, manifest, results, done, fault):
    for name, content in (("manifest.json", manifest), ("results.json", results)):
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    record = read_run(tmp_path)
    assert record.done is done
    assert record.fault.startswith(fault)
    assert bool(record.fault) is bool(fault)


def test_the_newest_run_of_those_that_hold_a_file(tmp_path):
    """A run that was finished in JupyterLab has no executed notebook."""
    names = ("0.damaged", ".0.deleted", "newest", "middle", "oldest")  # the first two are no runs any more
    for age, name in enumerate(names):
        finish(tmp_path / "02_sft" / name, 1000 - age)
    for name in ("middle", "oldest"):
        (tmp_path / "02_sft" / name / "notebook.ipynb").write_text("{}")
    assert latest("02_sft", tmp_path).name == "newest"
    assert latest("02_sft", tmp_path, "notebook.ipynb").name == "middle"
    with pytest.raises(FileNotFoundError, match=r"no finished run of 03_grpo in .*: run notebooks/03_grpo.ipynb first"):
        latest("03_grpo", tmp_path)


@pytest.fixture
def made(toy):
    """Run folders of 01 to 04, named after their notebook's number."""
    found = {}
    for name in ("01_data_construction", "02_sft", "03_grpo", "04_inference"):
        folder = toy / "runs" / name / (name[:2] * 6)
        finish(folder, 1e9)
        found[name[:2]] = str(folder.relative_to(toy))
    return found


def test_a_run_names_the_newest_run_that_it_took(toy, made):
    """As in JupyterLab, where none is named: the manifest tells it, and the run is that of who names it."""
    run = open_run("02_sft", {"DATA_RUN": "", "SEED": 0})
    assert run.parameters == {"DATA_RUN": made["01"], "SEED": 0}
    assert parents_of(read_run(run.folder)) == {"DATA_RUN": toy / made["01"]}
    assert open_run("02_sft", {"DATA_RUN": made["01"], "SEED": 0}).folder == run.folder
    finish(toy / "runs" / "01_data_construction" / "newer", 2e9)
    assert open_run("02_sft", {"DATA_RUN": "", "SEED": 0}).folder != run.folder


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"DATA_RUN": "", "SFT_RUN": "", "MODEL": ""}, {"DATA_RUN": "01", "SFT_RUN": "02"}),
        ({"DATA_RUN": "", "SFT_RUN": "", "MODEL": "base"}, {"DATA_RUN": "01"}),
        ({"SFT_RUN": "", "GRPO_RUN": "", "SYSTEMS": ["base"]}, {}),
        ({"SFT_RUN": "", "GRPO_RUN": "", "SYSTEMS": ["SFT"]}, {"SFT_RUN": "02"}),
        ({"SFT_RUN": "", "GRPO_RUN": "", "SYSTEMS": ["base", "RL only"]}, {"GRPO_RUN": "03"}),
        ({"SFT_RUN": "none", "GRPO_RUN": "", "SYSTEMS": ["SFT + RL"]}, {"GRPO_RUN": "03"}),
        ({"INFERENCE_RUN": "", "GRPO_RUN": ""}, {"INFERENCE_RUN": "04", "GRPO_RUN": "03"}),
    ],
)
def test_only_runs_that_are_taken_are_named(made, given, taken):
    assert with_newest(given) == given | {name: made[number] for name, number in taken.items()}


def test_progress_is_read_as_it_was_reported(tmp_path):
    assert read_progress(tmp_path) is None
    report_progress(tmp_path, "SFT step", 3, 40)
    assert read_progress(tmp_path) == {"what": "SFT step", "done": 3, "total": 40}


def opened(notebook, **parameters):
    return open_run(notebook, {"RUN": "my_run", **parameters})


def content(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != ".open"}


@pytest.mark.parametrize(
    ("notebook", "parameters", "message"),
    [
        (
            DATA,
            {"X": 3},
            r"my_run is a finished run made with other settings: X \(2, now 3\); leave RUN empty, name an",
        ),
        (DATA, {"X": 2, "SLEEP": 1.0}, r"SLEEP \(None, now 1.0\)"),
        ("hang", {"SECONDS": 1.0}, "my_run is a run of 01_data_construction, not of hang: leave RUN empty"),
        ("02_sft", {"DATA_RUN": "none"}, "is a run of 01_data_construction, not of 02_sft"),
    ],
)
def test_a_finished_run_is_not_opened_for_other_work(toy, notebook, parameters, message):
    """The old results would count as those of the new parameters, and another notebook's would be lost."""
    opened(DATA, X=2).finish({"square": 4})
    before = content(toy / "my_run")
    with pytest.raises(RunError, match=message):
        opened(notebook, **parameters)
    assert content(toy / "my_run") == before


def test_a_finished_run_is_not_opened_with_other_code_or_data(toy):
    (toy / "corpus").write_text("pages")
    opened(DATA, X=2, CORPUS="corpus").finish({})
    (toy / "corpus").write_text("other pages")
    with pytest.raises(RunError, match="other settings: the content of CORPUS; leave"):
        opened(DATA, X=2, CORPUS="corpus")
    (toy / "corpus").write_text("pages")
    path = toy / "notebooks" / f"{DATA}.ipynb"
    path.write_text(path.read_text().replace("squared", "times itself"))
    with pytest.raises(RunError, match="other settings: another version of the code"):
        opened(DATA, X=2, CORPUS="corpus")


def test_a_finished_run_is_opened_again_for_the_same_work(toy):
    """Its results stand until there are new ones."""
    opened(DATA, X=2).finish({"square": 4})
    before = content(toy / "my_run")
    run = opened(DATA, X=2)
    assert content(toy / "my_run") == before
    run.finish({"square": 4, "again": True})
    assert results("my_run") == {"square": 4, "again": True}
    assert read_run("my_run").done


def test_an_unfinished_run_goes_on_with_mended_code_but_not_with_other_parameters(toy):
    opened(DATA, X=2)
    path = toy / "notebooks" / f"{DATA}.ipynb"
    path.write_text(path.read_text().replace("squared", "times itself"))
    opened(DATA, X=2)
    with pytest.raises(RunError, match=r"my_run is an unfinished run made with other settings: X \(2, now 5\)"):
        opened(DATA, X=5)


def test_results_of_unknown_origin_are_not_overwritten(toy):
    (toy / "my_run").mkdir()
    (toy / "my_run" / "results.json").write_text("{}")
    with pytest.raises(RunError, match=r"holds results that cannot be trusted \(manifest.json is missing\)"):
        opened(DATA, X=2)
    assert list(content(toy / "my_run")) == ["results.json"]


def test_papermill_cannot_make_a_failed_run_count_as_done(toy):
    """`papermill … -p RUN my_run` on a finished run, with parameters that fail: the folder stays as it was."""
    notebook, out = str(toy / "notebooks" / f"{DATA}.ipynb"), str(toy / "out.ipynb")

    def execute(**parameters):
        papermill.execute_notebook(notebook, out, {"RUN": "my_run", **parameters}, cwd=str(toy), progress_bar=False)

    execute(X=2)
    before = content(toy / "my_run")
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="RunError: my_run is a finished run"):
        execute(X=3, HOW="raise")
    assert content(toy / "my_run") == before
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="has no parameter Y; it has X, HOW, SLEEP"):
        execute(Y=3)
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="X = True is a bool, expected int"):
        execute(X=True)


def test_parameters_are_checked_when_a_run_is_opened(toy):
    for values, message in (
        ({"X": "2"}, "X = '2' is a str, expected int"),
        ({"X": (1, 2)}, "is a tuple, expected int"),  # which the hash would leave out
        ({"SLEEP": float("nan")}, "is not a finite number"),
    ):
        with pytest.raises(NotebookError, match=message):
            open_run(DATA, values)
    assert not (toy / "runs").exists()
    assert open_run(DATA, {"X": 1, "SLEEP": 1}).folder == open_run(DATA, {"X": 1, "SLEEP": 1.0}).folder
    assert open_run(DATA, {"X": 1, "ADDED": 2}).parameters["ADDED"] == 2, "in JupyterLab, and not saved yet"


def test_a_run_is_open_in_one_process(toy, monkeypatch):
    monkeypatch.setattr("mmr5_lab.experiments.runs.PATIENCE", 0.1)
    code = (
        "from mmr5_lab.experiments.runs import open_run\nrun = open_run('01_data_construction', {'X': 2})\n"
        "print('open', flush=True)\ninput()\nrun.finish({})\nprint('finished', flush=True)\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RunBusyError, match=r"is open in another process, such as a notebook's kernel: end that"):
            open_run(DATA, {"X": 2})
        assert open_run(DATA, {"X": 3}).folder.exists()
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "finished\n"
        assert read_run(open_run(DATA, {"X": 2}).folder).done, "and free, though the kernel is still there"
        other.kill()


def test_a_run_that_was_begun_with_other_code_is_set_aside(toy, caplog):
    """Its code was edited after the run's folder had been named."""
    folder = run_folder(DATA, {"X": 4})
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"notebook": DATA, "hash": "another", "parameters": {"X": 4}}))
    assert run_notebook(DATA, {"X": 4}) == folder
    assert results(folder)["square"] == 16
    assert "its manifest is that of another run; it is kept as" in caplog.text
    assert read_run(folder.with_name(f"{folder.name}.damaged")).manifest["hash"] == "another"


def test_jupyterlab_starts_kernels_in_the_notebooks_folder(toy, monkeypatch):
    """What a notebook opens there is the project's; `enter_project` makes relative paths mean the same."""
    monkeypatch.chdir(toy / "notebooks")
    outside = open_run(DATA, {"X": 2})
    outside.finish({})
    assert outside.folder == toy / "runs" / DATA / outside.manifest["hash"]
    assert latest(DATA) == outside.folder
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert enter_project() == toy
    assert open_run(DATA, {"X": 2}).folder == outside.folder.relative_to(toy)
    assert str(toy / "notebooks") in sys.path
