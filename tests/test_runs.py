"""Run folders say whether they can be trusted."""

import json
import os

import pytest

from mmr5_lab.runs import latest, read_progress, read_run, report_progress

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


def test_progress_is_read_as_it_was_reported(tmp_path):
    assert read_progress(tmp_path) is None
    report_progress(tmp_path, "SFT step", 3, 40)
    assert read_progress(tmp_path) == {"what": "SFT step", "done": 3, "total": 40}
