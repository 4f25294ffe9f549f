"""Run folders say whether they can be trusted."""

import json
import os

import pytest

from mmr5_lab.experiments.history import parents_of
from mmr5_lab.experiments.runs import latest, open_run, read_run, with_newest
from mmr5_lab.files import read_progress, report_progress

MANIFEST = json.dumps({"notebook": "02_sft", "hash": "abc"})


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
    for age, name in enumerate(("newest", "middle", "oldest")):
        (tmp_path / "02_sft" / name).mkdir(parents=True)
        (tmp_path / "02_sft" / name / "results.json").write_text("{}")
        os.utime(tmp_path / "02_sft" / name / "results.json", (1000 - age, 1000 - age))
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
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")
        found[name[:2]] = str(folder.relative_to(toy))
    return found


def test_a_run_names_the_newest_run_that_it_took(toy, made):
    """As in JupyterLab, where none is named: the manifest tells it, and the run is that of who names it."""
    run = open_run("02_sft", {"DATA_RUN": "", "SEED": 0})
    assert run.parameters == {"DATA_RUN": made["01"], "SEED": 0}
    assert parents_of(read_run(run.folder)) == {"DATA_RUN": toy / made["01"]}
    assert open_run("02_sft", {"DATA_RUN": made["01"], "SEED": 0}).folder == run.folder
    newer = toy / "runs" / "01_data_construction" / "newer"
    newer.mkdir()
    (newer / "results.json").write_text("{}")
    os.utime(newer / "results.json", (2e9, 2e9))
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
