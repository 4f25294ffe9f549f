"""`mmr5 reproduce`: plans of every target, what stands in the way, and `released` to its end on a stand-in hub."""

import json
import re
import time

import pytest
import yaml
from hub.small import CONCURRENCY, faulty_teacher, paid, small_profile, start

from mmr5_lab.corpus.mmdocir import SUBSETS
from mmr5_lab.evaluation.paper_tables import paper_results, run_name
from mmr5_lab.experiments.fingerprint import data_hashes
from mmr5_lab.experiments.parameters import checked_parameters, read_profile
from mmr5_lab.experiments.reproduce import TARGETS, Plan, _key_problems, _version_problems, reproduce, trained_rows
from mmr5_lab.experiments.runs import project_root, source_of
from mmr5_lab.traces.construction import read_traces
from mmr5_lab.training.monitoring import completions

WHOLE_ANSWERS = {"MAX_COMPLETION": 220}  # prompts are chosen by how often they are answered rightly


@pytest.fixture
def cache(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    return hub


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_says_what_a_target_takes_without_any_weights(target, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plan = reproduce(target, str(tmp_path / "runs"), dry_run=True)
    assert "MMDocIR/MMDocIR_Evaluation_Dataset: 1.6 GB" in plan
    assert re.search(r"together \d+\.\d hours on one GPU", plan)
    assert re.search(r"Writes: \d+\.\d GB", plan)
    assert ("0 of 6 notebooks" if target in ("paper", "recommended", "small") else "rows") in plan


def test_the_teachers_price_is_that_of_its_tokens(tmp_path):
    """7,200 traces of 5 pages and a summary: 43,200 calls of 1,225 tokens at 2.5 and 60 at 10 a million."""
    plan = reproduce("paper", str(tmp_path), dry_run=True)
    price = 43_200 * (1225 * 2.5 + 60 * 10) / 1e6
    assert "at most 43,200 calls, 53 + 2.6 million tokens" in plan
    assert f"{price:.0f} in your PRICE's money" in plan


def test_training_is_planned_as_the_documents_say():
    table = yaml.safe_load((project_root() / "data/full_size.yaml").read_text())["training"]
    lines = (project_root() / "docs/full_size.md").read_text().splitlines()
    for target, stages in table.items():
        for stage, figures in stages.items():
            [line] = [line for line in lines if line.startswith(f"| {stage}, `{target}`")]
            cells = [cell.strip().removesuffix(" GiB") for cell in line.split("|")]
            assert [float(cell) for cell in cells[-4:-1]] == figures


def test_rows_of_the_paper_are_of_the_papers_model_alone():
    """A profile with another base, as `small`, must not fill rows of 7B: `paper_tables` lists its runs as others."""
    assert trained_rows("Qwen/Qwen2.5-VL-7B-Instruct")["SFT + RL"] == "MM-R5"
    small = trained_rows("Qwen/Qwen2.5-VL-3B-Instruct")
    assert small == {"base": "Qwen2.5-VL-3B-Instruct-cot", "SFT": "Qwen2.5-VL-3B-Instruct-sft",
                     "SFT + RL": "Qwen2.5-VL-3B-Instruct-sft-rl"}  # fmt: skip
    assert set(small.values()).isdisjoint(paper_results()["method"])


def test_inference_is_planned_as_by_the_planner():
    """Of 7B, 8 queries of 10 pages, 2,048 tokens each: `models.memory.plan` says 34.6 GiB (docs/log.md)."""
    profile = project_root() / "notebooks/profiles/released.yaml"
    values = checked_parameters(source_of("04_inference"), read_profile(profile)["04_inference"])
    plan = Plan("released", {"04_inference": values}, "runs")
    assert plan.stages.loc["rerank, ColQwen + MM-R5", "GiB a GPU"] == pytest.approx(34.6, rel=0.03)


def test_what_stands_in_the_way_is_said_with_its_remedy_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="paper cannot start yet") as error:
        reproduce("paper", str(tmp_path / "runs"))
    problems = str(error.value)
    assert "run `hf download MMDocIR/MMDocIR_Train_Dataset --repo-type dataset`" in problems
    assert "OPENAI_API_KEY is not set" in problems
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match="set MAX_QUESTIONS in a copy"):
        reproduce("paper", max_questions=2)


def test_a_key_that_cannot_be_one_stands_in_the_way(monkeypatch):
    """Not only after hours of encoding, where the teacher is first asked."""
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    assert "is not a key: character 4" in _key_problems("http://127.0.0.1:1/v1")[0]


def test_versions_that_do_not_fit_stand_in_the_way(monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["trl<1", "torch>=2", 'ruff<0; extra == "dev"'])
    [trl, four_bit] = _version_problems({"02_sft": {"FOUR_BIT": True}})
    assert trl.startswith("trl<1 is required")
    assert trl.endswith("run `pip install 'trl<1'`")
    assert "pip install bitsandbytes" in four_bit


def test_a_run_is_of_the_revision_that_the_hubs_cache_has(cache):
    given = {"CORPUS": "mmdocir", "BASE": "i2vec/MM-R5", "MODEL": "not/there", "TEACHER_MODEL": "i2vec/MM-R5"}
    before = data_hashes(given, project_root())
    assert set(before) == {"CORPUS", "BASE"}
    [reference] = cache.glob("models--i2vec--MM-R5/refs/main")
    revision = reference.read_text()
    assert before["BASE"] == revision
    reference.write_text("0" * 40)
    assert data_hashes(given, project_root()) == before | {"BASE": "0" * 40}
    reference.write_text(revision)


def test_a_run_on_several_corpora_is_of_all_of_them(cache):
    root = project_root()
    both = [data_hashes({"CORPUS": name}, root)["CORPUS"] for name in ("data/mini/corpus", "mmdocir")]
    joined = data_hashes({"CORPUS": "data/mini/corpus + mmdocir"}, root)["CORPUS"]
    assert joined == "+".join(both)
    assert data_hashes({"CORPUS": "data/mini/corpus + mmdocir-train"}, root)["CORPUS"] != joined


def test_a_damaged_download_is_named(cache, tmp_path, monkeypatch):
    [pages] = cache.glob("datasets--MMDocIR--MMDocIR_Evaluation_Dataset/snapshots/*/MMDocIR_pages.parquet")
    whole = pages.read_bytes()
    pages.write_bytes(whole[:100])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        with pytest.raises(ValueError, match=r"(?s)is not a readable parquet file.*hf download .* --repo-type dataset"):
            reproduce("released", str(tmp_path / "runs"))
    finally:
        pages.write_bytes(whole)


def rows_of(text: str, table: str) -> dict[str, bool]:
    """Row -> has it a figure of ours, in a printed table."""
    [block] = re.findall(rf"(?s)\n{table}, micro\n(.*?)(?=\n\n|$)", text)
    cells = (re.split(r"\s{2,}", line) for line in block.splitlines()[2:])
    return {row: ours != "–" for row, ours, *_ in cells}


def killed(process, when) -> None:
    """Kill it, as the system kills, once `when()` holds."""
    deadline = time.monotonic() + 300
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()


def test_the_papers_run_ends_in_its_rows_though_it_is_killed_twice(hub, tmp_path):
    """Killed among the teacher's answers and in RL, with a faulty teacher and the shipped profile made smaller."""
    runs = tmp_path / "runs"
    with faulty_teacher() as teacher:
        profile = small_profile("paper", teacher, tmp_path / "profile.yaml")
        command = ("paper", "--profile", str(profile), "--runs", str(runs))
        killed(start(hub, *command), lambda: len(teacher.bodies) > 12)
        killed(start(hub, *command), lambda: any(runs.glob("03_grpo/*/settings.json")))
        process = start(hub, *command)
        out, err = process.communicate()
        assert process.returncode == 0, err
    again = {question: times for question, times in paid(teacher).items() if times > 1}
    assert sum(again.values()) - len(again) <= CONCURRENCY, "only what was under way when killed is asked again"
    [traces] = runs.glob("01_data_construction/*/traces.jsonl")
    seen = [trace["doc_name"] for trace in read_traces(traces)]
    assert {name.partition("/")[0] for name in seen} == set(SUBSETS)
    assert len(seen) == 7
    [rl] = runs.glob("03_grpo/*")
    asked = {question.rpartition(":")[0].replace("%2F", "/") for question in completions(rl)["query_id"]}
    assert asked
    assert asked.isdisjoint(seen)
    rows = rows_of(out, "main")
    assert {row for row, ours in rows.items() if ours} == {
        "ColQwen", "ColQwen + Qwen2.5-VL-7B-cot", "ColQwen + Qwen2.5-VL-7B-sft", "ColQwen + MM-R5", "perfect ranking",
    }  # fmt: skip
    assert rows_of(out, "retrievers")["ColQwen + MM-R5"]
    assert json.loads(next(runs.glob("01*/*/results.json")).read_text())["corpus"] == "mmdocir-train", "of any machine"
    assert not list(hub.glob("*/snapshots/*/vectors")), "the hub's cache is not ours to write into"
    assert len(list((runs / "vectors").iterdir())) == 2


@pytest.mark.parametrize(
    ("target", "more", "table", "rows"),
    [
        ("recommended", {"grpo": WHOLE_ANSWERS}, "main",
         ["ColQwen", *(f"ColQwen + {name}" for name in ("Qwen2.5-VL-7B-cot", "Qwen2.5-VL-7B-sft", "MM-R5"))]),
        # 4 bits need a GPU; everything else is as on one
        ("small", {"sft": {"FOUR_BIT": False}, "grpo": {"FOUR_BIT": False} | WHOLE_ANSWERS}, "other",
         [run_name("ColQwen", f"Qwen2.5-VL-3B-Instruct-{way}") for way in ("cot", "sft", "sft-rl")]),
    ],
)  # fmt: skip
def test_the_improved_runs_end_in_their_rows(hub, tmp_path, target, more, table, rows):
    """One command each. Documents of one page (Wiki-SS) have five candidates, since they are filled up."""
    runs = tmp_path / "runs"
    with faulty_teacher() as teacher:
        profile = small_profile(target, teacher, tmp_path / "profile.yaml", **more)
        process = start(hub, target, "--profile", str(profile), "--runs", str(runs))
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert {row for row, ours in rows_of(out, table).items() if ours} == {*rows, "perfect ranking"}
    [traces] = runs.glob("01_data_construction/*/traces.jsonl")
    [wiki] = [trace for trace in read_traces(traces) if trace["doc_name"].startswith("Wiki-SS/")]
    assert sorted(wiki["candidates"]) == [0, 1, 2, 3, 4]
    assert len({(traces.parent / image).read_bytes() for image in wiki["images"]}) == 5
    [rl] = runs.glob("03_grpo/*")
    assert {len(pages) for pages in completions(rl)["candidates"]} == {5}


def test_the_papers_other_rerankers_fill_their_rows(hub, tmp_path):
    process = start(hub, "baselines", "--max-questions", "1", "--runs", str(tmp_path / "runs"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    filled = {row for row, ours in rows_of(out, "main").items() if ours}
    ways = [
        f"ColQwen + {model}{way}" for model in ("Qwen2.5-VL-7B", "Qwen2.5-VL-32B", "Gemma3-12B") for way in ("", "-cot")
    ]
    assert filled == {"ColQwen", *ways, "perfect ranking"}


def test_the_released_weights_fill_their_rows(hub, tmp_path):
    """The documented command, offline, on two questions a row; started again it finds everything done."""
    process = start(hub, "released", "--max-questions", "2", "--runs", str(tmp_path / "runs"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    rows = rows_of(out, "retrievers")
    assert len(rows) == 6
    assert all(rows.values()), "every row has a figure of ours"
    again = start(hub, "released", "--max-questions", "2", "--runs", str(tmp_path / "runs"), "--dry-run")
    assert "5 of 5 rows" in again.communicate()[0]
