"""Runs are listed, filtered, followed from data to evaluation, compared, averaged over seeds, pruned."""

import json
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from mmr5_lab.cli import main
from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import Rankings, write_trec
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.experiments import history
from mmr5_lab.experiments.history import (
    HistoryError,
    compare_runs,
    find_run,
    leaderboard,
    lineage,
    prune,
    runs_table,
    settings_of,
)
from mmr5_lab.experiments.notebooks import run_notebook
from mmr5_lab.experiments.runs import lock_of

DATA, SFT, GRPO, INFERENCE, EVALUATION = "01_data_construction", "02_sft", "03_grpo", "04_inference", "05_evaluation"


def add(root: Path, notebook: str, digit: str, parameters: dict, results: dict | None, minute: int = 0) -> Path:
    """A run folder as a notebook leaves it; its hash is the digit twelve times."""
    folder = root / notebook / (digit * 12)
    folder.mkdir(parents=True)
    manifest = {"notebook": notebook, "hash": folder.name, "parameters": parameters}
    manifest["started"] = f"2026-11-24T07:{minute:02d}:00+0000"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def table(**systems: float) -> dict:
    """Results of an evaluation: BM25, and systems with their micro R@1."""
    rows = {name.replace("_", " "): {"micro R@1": value, "valid": 1.0} for name, value in systems.items()}
    return {"table": {"BM25": {"micro R@1": 0.5}, **rows, "ceiling: all pages": {"micro R@1": 0.9}}}


@pytest.fixture
def root(toy) -> Path:
    """Data, SFT of two seeds at two rates (one seed failed), their reranking and evaluation."""
    root = toy / "runs"
    data = add(root, DATA, "a", {"SEED": 0}, {"traces": 9}, minute=1)
    for digit, rate, seed, recall in (("1", 0.1, 0, 0.6), ("2", 0.1, 1, 0.7), ("3", 0.2, 0, 0.8), ("4", 0.2, 1, None)):
        made = {"DATA_RUN": f"runs/{DATA}/{data.name}", "LEARNING_RATE": rate, "SEED": seed}
        done = None if recall is None else {"model": f"runs/{SFT}/{digit * 12}/model", "last_loss": rate * 2}
        sft = add(root, SFT, digit, made, done, minute=2 + seed)
        if recall is None:
            (sft / "failed.txt").write_text("02_sft: its kernel died\n")
            continue
        named = {"SFT_RUN": f"runs/{SFT}/{sft.name}", "DATA_RUN": f"runs/{DATA}/{data.name}", "MODE": "reason"}
        add(root, INFERENCE, digit, named, {}, minute=5)
        add(root, EVALUATION, digit, {"INFERENCE_RUN": f"runs/{INFERENCE}/{digit * 12}"}, table(SFT=recall), minute=6)
    return root


def found(root, *conditions) -> list[str]:
    return [f"{row.notebook[:2]}{row.run[0]}" for row in runs_table(root, conditions).itertuples()]


def test_runs_are_listed_and_filtered(root):
    assert found(root)[:5] == ["01a", "021", "023", "022", "024"], "the newest last"
    assert found(root, "notebook=02_sft", "SEED=1") == ["022", "024"]
    assert found(root, "last_loss<0.3") == ["021", "022"]
    assert found(root, "LEARNING_RATE>=0.2", "state=done") == ["023"]
    assert found(root, "notebook = 02_SFT", "state!=done") == ["024"]
    assert found(root, "table.SFT.micro R@1>0.65") == ["052", "053"]
    assert found(root, "LEARNING_RATE<fast") == []
    assert set(found(root, "LORA_RANK!=8")) == set(found(root))
    with pytest.raises(HistoryError, match="cannot read 'state is done': write NAME=VALUE"):
        runs_table(root, ["state is done"])
    assert runs_table(root / "absent").empty


def test_states_of_runs(root):
    (root / SFT / ("1" * 12) / "results.json").write_text("{")
    add(root, GRPO, "5", {}, None)
    states = runs_table(root).set_index(["notebook", "run"])["state"]
    assert states[SFT, "1" * 12] == "damaged"
    assert states[SFT, "2" * 12] == "done"
    assert states[SFT, "4" * 12] == "failed"
    assert states[GRPO, "5" * 12] == "unfinished"


def test_a_run_is_found_by_the_beginning_of_its_hash(root):
    assert find_run("aa", root).folder == root / DATA / ("a" * 12)
    assert find_run(str(root / SFT / ("2" * 12)), root).manifest["parameters"]["SEED"] == 1
    with pytest.raises(HistoryError, match="several runs begin with '1'"):
        find_run("1", root)
    with pytest.raises(HistoryError, match="there is no run 'ffff'"):
        find_run("ffff", root)
    with pytest.raises(HistoryError, match="there is no run"):
        find_run("../../etc", root)


def test_lineage_shows_where_a_run_came_from_and_what_came_from_it(root):
    lines = lineage(find_run(str(root / SFT / ("1" * 12))), root).splitlines()
    assert [line.split(" done")[0] for line in lines] == [
        f"from {DATA} aaaaaaaaaaaa",
        f"{SFT} 111111111111",
        f"  to {INFERENCE} 111111111111",
        f"    to {EVALUATION} 111111111111",
    ]
    evaluation = find_run(str(root / EVALUATION / ("3" * 12)))
    assert settings_of(evaluation) == {
        f"{DATA}.SEED": 0, f"{SFT}.LEARNING_RATE": 0.2, f"{SFT}.SEED": 0, f"{INFERENCE}.MODE": "reason",
    }  # fmt: skip


def test_the_leaderboard_averages_seeds_and_shows_what_differs(root):
    board = leaderboard(root)
    assert list(board.index) == ["SFT", "SFT", "BM25"]
    assert list(board["LEARNING_RATE"].dropna()) == [0.2, 0.1]
    assert list(board["seeds"]) == [1, 2, 1], "the retriever is the same in every evaluation"
    assert list(board["micro R@1"]) == pytest.approx([0.8, 0.65, 0.5])
    assert board["sd"].iloc[1] == pytest.approx(0.0707, abs=1e-4)
    assert "MODE" not in board, "what is the same everywhere is not shown"
    assert list(leaderboard(root, ["run=" + "1" * 12])["micro R@1"]) == [0.6, 0.5]
    with pytest.raises(HistoryError, match="no finished run of 05_evaluation"):
        leaderboard(root, ["SAMPLES=3"])


def test_a_system_depends_on_its_own_training_alone(root):
    """Two evaluations with the base in both, of which only the trained system differs: the base is one row."""
    for digit, sft in (("5", "1"), ("6", "3")):
        taken = {"SFT_RUN": f"runs/{SFT}/{sft * 12}", "GRPO_RUN": "none", "DATA_RUN": f"runs/{DATA}/{'a' * 12}"}
        add(root, INFERENCE, digit, {**taken, "MODE": "reason", "SYSTEMS": ["base", "SFT"], "NUM_CANDIDATES": 5}, {})
        add(root, EVALUATION, digit, {"INFERENCE_RUN": f"runs/{INFERENCE}/{digit * 12}"}, table(base=0.4, SFT=0.6))
    board = leaderboard(root, ["table.base.valid=1"])
    assert list(board.index) == ["SFT", "SFT", "BM25", "base"]
    assert list(board.loc["SFT", "LEARNING_RATE"]) == [0.1, 0.2]
    assert board.loc["base", "seeds"] == 1
    assert board["LEARNING_RATE"].isna().tolist() == [False, False, True, True]
    assert {"SFT_RUN", "GRPO_RUN", "SYSTEMS"}.isdisjoint(board.columns)


def test_retrievers_of_other_questions_are_rows_of_their_own(root):
    for digit, count in (("7", 5), ("8", 10)):
        add(root, INFERENCE, digit, {"NUM_CANDIDATES": count, "BATCH_SIZE": count}, {})
        add(root, EVALUATION, digit, {"INFERENCE_RUN": f"runs/{INFERENCE}/{digit * 12}"}, table())
    board = leaderboard(root, ["run!=" + digit * 12 for digit in "123"])
    assert (list(board.index), list(board["NUM_CANDIDATES"])) == (["BM25", "BM25"], [5, 10])
    assert "BATCH_SIZE" not in board


def test_the_mode_of_a_system_that_does_not_reason_is_in_its_name(root):
    add(root, INFERENCE, "8", {"MODE": "direct"}, {})
    add(root, EVALUATION, "8", {"INFERENCE_RUN": f"runs/{INFERENCE}/{'8' * 12}"}, table(base=0.4))
    assert list(leaderboard(root).index) == ["SFT", "SFT", "BM25", "base, direct"]


def test_names_in_the_leaderboards_page_are_escaped(root, tmp_path):
    add(root, EVALUATION, "9", {}, {"table": {"<script>": {"micro R@1": 0.1, "valid": 1.0}}})
    page = history.write_leaderboard(leaderboard(root), tmp_path / "board.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


def asked(question: str, gold: list[int]) -> dict:
    return {"Q": question, "A": "", "page_id": gold, "type": "text-only", "layout_mapping": []}


def test_two_runs_are_compared_query_by_query(root, toy):
    annotations = [
        {"doc_name": name, "domain": "Laws", "split": "eval", "questions": [asked("?", [gold])]}
        for name, gold in (("a", 0), ("b", 1))
    ]
    pages = [{"doc_name": name, "image_binary": b"x", "ocr_text": ""} for name in "aaabbb"]
    write_corpus(toy / "corpus", annotations, pages)
    corpus = load_corpus(toy / "corpus").split("eval")
    orders = {
        "6": {"SFT": [[0, 1, 2], [1, 0, 2]], "base": [[2, 1, 0], [1, 0, 2]]},
        "7": {"SFT": [[1, 0, 2], [1, 2, 0]]},
    }
    for digit, systems in orders.items():
        sft = f"runs/{SFT}/{('1' if digit == '6' else '3') * 12}"
        folder = add(root, INFERENCE, digit, {"CORPUS": "corpus", "SPLIT": "eval", "SFT_RUN": sft}, {})
        for system, (first, second) in systems.items():
            write_trec(Rankings({"a:q0": first, "b:q0": second}), corpus, folder / f"{system}.trec", "mmr5")
    add(root, EVALUATION, "7", {"INFERENCE_RUN": f"runs/{INFERENCE}/{'7' * 12}"}, table(SFT=0.5))

    parameters, systems, queries = compare_runs("666:SFT", f"runs/{EVALUATION}/{'7' * 12}", root, samples=100)
    assert parameters.loc[f"{SFT}.LEARNING_RATE"].tolist() == [0.1, 0.2]
    assert systems["micro R@1"].tolist() == [1.0, 0.5]
    assert systems["difference"].iloc[1] == -0.5
    assert queries["change"].to_dict() == {"a:q0": -1.0, "b:q0": 0.0}
    with pytest.raises(HistoryError, match=r"which system of .*Write 666:SYSTEM; there are SFT, base"):
        compare_runs("666", f"runs/{INFERENCE}/{'7' * 12}", root)
    with pytest.raises(HistoryError, match="holds no rankings"):
        compare_runs("aaa", "666:SFT", root)


def test_what_others_came_from_is_not_pruned(root):
    assert list(prune(root)["run"]) == ["4" * 12], "by default what is not done"
    assert list(prune(root, ["notebook=02_sft"])["run"]) == ["4" * 12], "evaluations came from the others"
    rows = prune(root, ["run=" + "3" * 12], delete=True)
    assert sorted(rows["notebook"]) == [SFT, INFERENCE, EVALUATION], "a family that goes altogether"
    assert not list(root.glob(f"*/{'3' * 12}"))
    with FileLock(lock_of(root / SFT / ("4" * 12))):
        assert prune(root, delete=True).empty, "a run that is being made stays"
    assert (root / SFT / ("4" * 12)).exists()
    with FileLock(root / SFT / ("4" * 12) / ".open"):
        assert prune(root, delete=True).empty, "and one that is open in JupyterLab"
    assert list(prune(root, delete=True)["run"]) == ["4" * 12]


def test_the_history_is_read_while_others_write(toy):
    threads = [threading.Thread(target=add, args=(toy / "runs", SFT, digit, {}, {})) for digit in "0123456789abcdef"]
    for thread in threads:
        thread.start()
    seen = [len(runs_table("runs")) for _ in range(20)]
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert len(runs_table("runs", ["state=done"])) == 16


def test_the_command_line_shows_real_runs(toy, capsys):
    folder = run_notebook(DATA, {"X": 3})
    capsys.readouterr()
    assert main(["runs", "list", "X=3", "--show", "X", "square"]) == 0
    line, count = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[:3] == [DATA, folder.name, "done"]
    assert line.split()[-2:] == ["3", "9"]
    assert count == "1 runs"
    assert main(["runs", "show", folder.name[:6]]) == 0
    assert '"square": 9' in capsys.readouterr().out
    assert main(["runs", "lineage", folder.name]) == 0
    assert main(["runs", "prune", "X=3"]) == 0
    assert "1 runs, " in capsys.readouterr().out
    assert folder.exists(), "only --delete deletes"
    assert main(["runs", "list", "nonsense"]) == 2
    assert main(["runs", "leaderboard"]) == 2
    assert "no finished run of 05_evaluation" in capsys.readouterr().err


def test_the_leaderboard_is_printed_and_written(root, capsys, tmp_path):
    assert main(["runs", "leaderboard", "--html", str(tmp_path / "board.html")]) == 0
    assert "0.650" in capsys.readouterr().out
    assert (tmp_path / "board.html").read_text().count("<tr>") == 4
