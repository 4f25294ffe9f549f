"""The chain of notebooks on a tiny profile: killed, it goes on where it was; the report holds what a reader needs."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml
from exercises import advantages
from helpers.exercises import verdicts

from mmr5_lab.experiments.chain import _body, _cut_formulas, result_table, run_demo
from mmr5_lab.experiments.notebooks import run_notebook
from mmr5_lab.experiments.runs import CHAIN, project_root
from mmr5_lab.files import results
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.training.monitoring import completions


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory):
    """A folder with a tiny corpus and a profile of a few steps with a tiny model."""
    folder = tmp_path_factory.mktemp("demo")
    make_corpus(folder / "corpus", seed=3, splits={"sft": (3, 4), "rl": (2, 4), "eval": (3, 4)})
    corpus, base = {"CORPUS": str(folder / "corpus")}, str(tiny_model)
    profile = {
        "01_data_construction": corpus,
        "02_sft": {"MODEL": base, "EPOCHS": 2.0, "BATCH_SIZE": 2, "SAVE_STEPS": 2, "PROBES": 2},
        "03_grpo": {
            "MAX_STEPS": 2, "GENERATIONS": 2, "BATCH_SIZE": 4, "ACCUMULATION": 1, "MAX_COMPLETION": 20,
        },
        "04_inference": {**corpus, "BASE": base, "MAX_NEW_TOKENS": 40},
        "05_evaluation": {**corpus, "SAMPLES": 100},
        "06_error_analysis": {**corpus, "SAMPLES": 100, "PROBED": 3, "SHUFFLES": 2, "MAX_NEW_TOKENS": 20},
    }  # fmt: skip
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile))
    return folder


def demo(folder, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "mmr5_lab.cli", "demo", "--profile", folder / "profile.yaml"]
    command += ["--runs", folder / "runs"]
    return subprocess.Popen(command, cwd=project_root(), text=True, start_new_session=True, **options)


def checkpoints(folder) -> list:
    return list(folder.glob("runs/02_sft/*/checkpoints/checkpoint-*/trainer_state.json"))


def test_a_killed_demo_continues_and_finishes(small):
    process = demo(small, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not checkpoints(small):
        assert process.poll() is None, "the demo ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    [data] = small.glob("runs/01_data_construction/*/results.json")
    stamp = data.stat().st_mtime_ns
    assert not list(small.glob("runs/02_sft/*/results.json")), "a half-done run must not count as done"

    again = demo(small, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert data.stat().st_mtime_ns == stamp, "finished work is not done again"
    [sft] = small.glob("runs/02_sft/*")
    log = pd.read_csv(sft / "log.csv")
    assert log["step"].tolist() == list(range(1, json.loads((sft / "results.json").read_text())["steps"] + 1))
    assert not checkpoints(small), "a finished run needs no checkpoints"
    [grpo] = small.glob("runs/03_grpo/*")
    assert completions(grpo).groupby("step").size().to_dict() == {1: 4, 2: 4}, "completions are kept"
    assert "report.html" in output
    assert all(name in output for name in CHAIN)

    [evaluation] = small.glob("runs/05_evaluation/*")
    [inference] = small.glob("runs/04_inference/*")
    assert results(evaluation)["questions"] == results(inference)["questions"] > 6
    table = result_table(evaluation)
    assert list(table.index) == ["BM25", "base", "SFT", "SFT + RL", "ceiling: candidates", "ceiling: all pages"]
    assert (table.loc["SFT", "micro R@1"] <= table.loc["ceiling: candidates", "micro R@1"]).all()
    assert f"{table.loc['BM25', 'micro R@1']:.3f}" in output

    lab = run_notebook("07_reward_lab", {"GRPO_RUN": str(grpo)}, small / "runs")
    assert results(lab)["completions"] == 8
    assert results(lab)["exploits_that_pay"] == {"strict": 0, "ndcg": 0, "released": 5, "mine": 0}
    assert "No description has been provided" not in (lab / "notebook.html").read_text()

    quick = {"MAX_STEPS": 2, "BATCH_SIZE": 2, "FRONTIER": 4, "MAX_NEW_TOKENS": 20, "LABELS": "samples", "SAMPLES": 1}
    [data_run] = small.glob("runs/01_data_construction/*")
    scorer = run_notebook("10_fast_scorer", {"DATA_RUN": str(data_run), "GRPO_RUN": str(grpo), **quick}, small / "runs")
    assert results(scorer)["steps"] == 2
    assert list(results(scorer)["frontier"]) == [
        "reason", "direct", "pointwise", "score, untrained", "score, trained", "trained, 5 orders",
        "trained, windows of 3",
    ]  # fmt: skip

    report = (small / "runs" / "report.html").read_text()
    assert report.count("<img alt=") == 20 + 6, "each figure is described, and each diagram"
    assert report.count("data:image/svg+xml;base64,") == 6
    assert report.count("data:image/png;base64,") == 20 + 1, "and embedded; one stands above the browser of orders too"
    assert report.count("<iframe ") == 5, "browsers are static pages: of traces in 01, four in 06"
    assert "widget-view" not in report
    assert "No description has been provided" not in report
    assert "<mfrac>" in report
    assert "FORMULA" not in report
    assert "Traceback" not in report
    assert "Exercises" not in report, "a report asks nothing"
    said = [line for executed in small.glob("runs/0*/*/notebook.ipynb") for line in verdicts(executed)]
    assert len(said) == 19
    assert [line for line in said if not line.startswith("✓")] == [], "the shipped solutions are right"
    for _, group in completions(grpo).groupby(["step", "query_id"]):
        paid = group["rank_reward"] + group["format_reward"]
        assert group["advantage"].tolist() == pytest.approx(advantages(paid).tolist(), abs=1e-5)


def test_a_finished_demo_is_shown_at_once(small, capsys):
    started = time.monotonic()
    report = run_demo(small / "profile.yaml", small / "runs")
    assert time.monotonic() - started < 10
    assert report == small / "runs" / "report.html"
    assert "SFT + RL" in capsys.readouterr().out


def test_its_notebooks_are_not_full_of_notices_of_the_libraries(small):
    """Of a renamed attribute at every step, and of a dataset that cannot be told from another."""
    notebooks = list(small.glob("runs/*/*/notebook.ipynb"))
    assert len(notebooks) >= len(CHAIN)
    for path in notebooks:
        for cell in json.loads(path.read_text())["cells"]:
            said = "".join(text for output in cell.get("outputs", []) for text in output.get("text", []))
            assert "is_gradient_checkpointing" not in said
            assert "be hashed" not in said


def test_one_system_is_evaluated_alone(small):
    """As in notebooks/sweeps/study.yaml: no run of 02 or 03 is needed for a base that answers without reasoning."""
    profile = yaml.safe_load((small / "profile.yaml").read_text())
    [data] = small.glob("runs/01_data_construction/*/results.json")
    given = profile["04_inference"] | {"SYSTEMS": ["base"], "MODE": "direct", "SFT_RUN": "none", "GRPO_RUN": "none"}
    inference = run_notebook("04_inference", given | {"DATA_RUN": str(data.parent), "FRONTIER": 2}, small / "runs")
    given = profile["05_evaluation"] | {"INFERENCE_RUN": str(inference)}
    table = result_table(run_notebook("05_evaluation", given, small / "runs"))
    assert list(table.index) == ["BM25", "base", "ceiling: candidates", "ceiling: all pages"]
    assert table.loc["base", "valid"] == 1.0


def test_a_profile_with_an_unknown_notebook_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text("02_stf: {}\n")
    with pytest.raises(ValueError, match="has parameters for 02_stf; the chain is 01_data_construction"):
        run_demo(tmp_path / "p.yaml", tmp_path)
    (tmp_path / "p.yaml").write_text("02_sft: {}\n")
    with pytest.raises(ValueError, match="there is no notebook 02 to stop after"):
        run_demo(tmp_path / "p.yaml", tmp_path, "02")


def test_a_notebook_that_was_run_in_jupyterlab_does_not_end_the_report(tmp_path):
    """It is finished, so the chain takes it, and keeps no executed notebook."""
    assert _body(tmp_path / "01_data_construction" / "<0>" / "notebook.ipynb") == (
        f"<p>Run in JupyterLab, with its results in {tmp_path}/01_data_construction/&lt;0&gt;.</p>"
    )


def test_formulas_are_cut_out_as_mathml():
    formulas = []
    assert _cut_formulas("a $x^2$ b\n$$\\frac{1}\n{2}$$ costs \\$5", formulas) == (
        "a FORMULA0ALUMROF b\nFORMULA1ALUMROF costs \\$5"
    )
    assert "<msup>" in formulas[0]
    assert "<mfrac>" in formulas[1]
    assert 'display="block"' in formulas[1]
