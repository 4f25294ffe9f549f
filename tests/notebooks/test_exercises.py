"""Exercises: a slip is named; what is open raises nothing; students get the notebooks without the solutions."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from exercises import EXERCISES, advantages, check
from helpers.exercises import verdicts

from mmr5_lab.experiments.runs import project_root

NOTEBOOKS = sorted((project_root() / "notebooks").glob("0[1-8]*.ipynb"))
QUESTIONS = pd.DataFrame({
    "question_id": ["a", "b", "c"], "doc_name": "d", "domain": "Laws", "gold_pages": [[1], [2, 3], [9]],
})  # fmt: skip
CORPUS = SimpleNamespace(questions=QUESTIONS, documents=pd.DataFrame({"doc_name": ["d"], "num_pages": [10]}))
RUN = {"a": [0, 1, 4, 5], "b": [2, 3, 4, 5], "c": [0, 1, 2, 3]}  # first at rank 2; both in front; not there
TRACE = {
    "images": ["1.png", "2.png"], "positive_ids": [1], "query": "How high was the staff?",
    "messages": [{"role": "assistant", "content": "<think>Image 1: a table of staff.\nImage 2: rents.</think>"}],
}  # fmt: skip
ABOUT = {
    "01.1": {"pages": [12, 3, 7, 9, 1], "gold": [9, 3]},
    "01.2": {"run": RUN, "corpus": CORPUS, "n": 2},
    "01.3": {"trace": TRACE},
    "02.1": {"inputs": 512, "outputs": 128, "rank": 8},
    "02.2": {"prompt": [0.5, 0.1, 0.2], "completion": [0.9, 0.5, 0.25, 0.8]},
    "03.1": {"written": [5, 1, 2, 3, 4], "positives": [2, 5]},
    "03.2": {"rewards": [2, 1, 1, 2]},
    "03.3": {"pass_rate": 0.9, "share": 0.5},
    "04.1": {"text": "<think>t</think><answer>[4, 2, 2, 7]</answer>", "n": 5},
    "04.2": {"height": 1100, "width": 850},
    "04.3": {"orders": [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 0]]},
    "05.1": {"domains": ["Laws"] * 3 + ["News"], "recalls": [1, 1, 0, 0]},
    "05.2": {"run": RUN, "corpus": CORPUS},
    "05.3": {"p_values": [0.01, 0.04, 0.03]},
    "06.1": {"run": RUN, "corpus": CORPUS},
    "06.2": {"one": [0, 1, 2, 3], "other": [1, 0, 3, 2]},
    "07.1": {},
    "07.2": {},
    "07.3": {"rewards": {"r + 5": lambda r: r + 5, "2 r": lambda r: 2 * r, "-r": lambda r: -r, "r²": lambda r: r**2}},
    "08.1": {
        "grid": {
            "notebooks": ["01_data_construction"],
            "axes": [{"NUM_CANDIDATES": [3, 5, 10]}, {"SHUFFLES": [0, 2, 4], "SEED": [0, 1, 2]}],
            "without": [{"NUM_CANDIDATES": 3, "SHUFFLES": [2, 4]}],
        }
    },
    "08.2": {
        "before": {"notebooks": ["01_data_construction"], "axes": [{"TOP_K": [1, 3]}, {"SHUFFLES": [0, 4]}]},
        "after": {"notebooks": ["01_data_construction"], "axes": [{"TOP_K": [1, 3, 20]}, {"SHUFFLES": [0, 4]}]},
    },
}
LEAKED = "<think>Image 1: a table of staff.\nImage 2: rents, labelled as negative.</think>"


def first_place(completions, positive_ids, num_candidates, **columns):
    return [1.0 if "[3" in text else 0.0 for text in completions]


def broken(completions, **columns):
    return [1 / 0 for _ in completions]


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("01.1", [2, 4, 1, 3, 5]),
        ("01.2", 1),  # c
        ("01.3", LEAKED),
        ("02.1", 5120),
        ("02.2", 0.602),
        ("03.1", (1 + 1 / 27) / (9 / 8)),
        ("03.2", [0.87, -0.87, -0.87, 0.87]),
        ("03.3", 7),
        ("04.1", (3, 1, 0, 2, 4)),
        ("04.2", 30 * 39),
        ("04.3", [1, 0, 2, 3]),
        ("05.1", [0.5, 1 / 3]),
        ("05.2", (1 / 4 + 2 / 4 / 2) / 3),
        ("05.3", [0.03, 0.06, 0.06]),
        ("06.1", (1 + 1 / 2) / 3),
        ("06.2", 1 / 3),
        ("07.1", "so <answer>[3]</answer> <think></think><answer>[1, 2, 3, 4, 5]</answer>"),
        ("07.3", {"2 r", "r + 5"}),
        ("08.1", 7),
        ("08.2", 2),
    ],
)
def test_the_right_answer_is_right(exercise, answer):
    assert repr(check(exercise, answer, **ABOUT[exercise])) == f"✓ {exercise}: right"


@pytest.mark.parametrize(
    ("exercise", "answer", "said"),
    [
        ("01.1", [9, 3, 12, 7, 1], "page numbers"),
        ("01.1", [1, 3, 0, 2, 4], "counts from 1"),
        ("01.1", [2, 4], "each candidate once"),
        ("01.1", [1, 2, 4, 3, 5], "image 1 is not right, and stands before"),
        ("01.1", [4, 2, 1, 3, 5], "stand as in the prompt, not as in the label"),
        ("01.1", [2, 4, 5, 3, 1], "the others follow"),
        ("01.2", 2, "that are kept"),
        ("01.3", TRACE["messages"][0]["content"], "as it was"),
        ("01.3", "<think>Image 1: a table of staff.\nImage 2: prices.</think>", "let it pass"),
        ("01.3", "<think>Image 1: I cannot see the image.\nImage 2: rents.</think>", "something else: refusal"),
        ("02.1", 512 * 128, "the layer itself"),
        ("02.1", 8 * 512, "one of the two matrices"),
        ("02.1", 8 * 512 * 128, "rank times the layer"),
        ("02.2", 2.408, "that is the sum"),
        ("02.2", 1.002, "the prompt's carry no loss"),
        ("02.2", 0.868, "in bits"),
        ("02.2", 0.49, "minus the logarithm of the mean"),
        ("02.2", 0.7, "0.7 is too high"),
        ("03.1", 1.037, "divide by what the best order earns"),
        ("03.1", 0.5185, "not by the number of gold pages"),
        ("03.1", (1 + 1 / 3) / 1.5, "takes 1/rank; "),
        ("03.1", (1 / 8 + 1 / 125) / (9 / 8), "takes the ids for ranks"),
        ("03.2", [2, 1, 1, 2], "add up to 0, these to 6.00"),
        ("03.2", [0.5, -0.5, -0.5, 0.5], "now divide"),
        ("03.2", [1, -1, -1, 1], "yours divides by G"),
        ("03.2", [1.5, -1.5, -1.5, 1.5], "divides by the variance"),
        ("03.2", [-0.87, 0.87, 0.87, -0.87], "signs are turned"),
        ("03.2", [1, 2], "a list of 4 numbers"),
        ("03.3", 1, "its own mean"),
        ("03.3", 4, "0.66 of the groups still teach nothing"),
        ("03.3", 8, "a smaller group does too"),
        ("04.1", [4, 2, 1, 3, 5], "counts from 0"),
        ("04.1", [3, 1, 1, 0, 2], "the first counts"),
        ("04.1", [3, 1, 6, 0, 2], "images that do not exist"),
        ("04.1", [3, 1], "3 of the 5 are missing"),
        ("04.1", [1, 3, 0, 2, 4], "in the order in which they were written"),
        ("04.1", [3, 1, 4, 2, 0], "the candidates' own order"),
        ("04.2", 60 * 78, "these are the patches"),
        ("04.2", 31 * 40, "that rounds up"),
        ("04.2", 1100 * 850 / 28**2, "no part of a token"),
        ("04.3", [0, 1, 2, 3], "candidate 0 is first most often"),
        ("04.3", [3, 2, 0, 1], "turned round"),
        ("04.3", [1, 2, 0, 3], "candidate 0 has more points than 2"),
        ("05.1", [1 / 3, 0.5], "exchanged"),
        ("05.1", [0.5, 0.5], "macro is not the mean over questions"),
        ("05.1", [0.4, 1 / 3], "micro: a mean over all questions"),
        ("05.2", 1 / 4, "every gold page to be among the candidates"),
        ("05.2", 0.5, "best order"),
        ("05.3", [0.03, 0.12, 0.09], "Bonferroni"),
        ("05.3", [0.03, 0.04, 0.06], "may not end up below"),
        ("05.3", [0.01, 0.04, 0.03], "as they were"),
        ("06.1", 1 / 6, "has now"),
        ("06.1", 2 / 3, "both of them in first place"),
        ("06.1", 2.5 / 3, "that it was not given"),
        ("06.2", 2 / 3, "share of pairs that agree"),
        ("06.2", 0.0, "share of equal places"),
        ("07.1", "<think>t</think><answer>[3, 1, 2, 4, 5]</answer>", "honest"),
        ("07.1", "<think>t</think><answer>[3, 1, 2]</answer>", "1.00 for the rank and 0.60 for the form"),
        ("07.1", 3, "the answer is a completion"),
        ("07.2", first_place, "gives 0.0 for a gold page in second place"),
        ("07.2", broken, "raised ZeroDivisionError"),
        ("07.2", "first_place", "a function, without ()"),
        ("07.3", {"r + 5", "2 r", "-r"}, "-r: rewards 0, 1/27, 1/8 and 1"),
        ("07.3", {"2 r"}, "1 more leaves"),
        ("07.3", "2 r", "a set of some of"),
        ("08.1", 9, "`without` leaves some"),
        ("08.1", 27, "go together, value by value"),
        ("08.1", 6, "multiply"),
        ("08.2", 1, "every value of the other axis"),
        ("08.2", 6, "found again by their hash"),
        ("08.2", "two", "the answer is a number"),
    ],
)  # fmt: skip
def test_a_slip_is_named(exercise, answer, said):
    found = check(exercise, answer, **ABOUT[exercise])
    assert found.right is False
    assert said in found.message


def test_a_runs_own_recall_is_not_that_of_its_shuffles():
    found = check("05.2", (1 + 1 / 2) / 3, run=RUN | {"a": [1, 0, 4, 5]}, corpus=CORPUS)
    assert "own recall" in found.message


def test_a_right_page_further_down_is_enough():
    """A question whose right page stands second is not lost."""
    found = check("01.2", 3, run=RUN | {"b": [4, 2, 3, 5]}, corpus=CORPUS, n=4)
    assert "how often the first page is wrong" in found.message


@pytest.mark.parametrize("exercise", EXERCISES)
def test_what_is_open_is_said_to_be_open(exercise):
    assert check(exercise, ..., **ABOUT[exercise]).right is None
    assert repr(check(exercise, [..., 2], **ABOUT[exercise])).startswith(f"… {exercise}: not answered yet")


@pytest.mark.parametrize("exercise", EXERCISES)
@pytest.mark.parametrize("answer", [None, "", [], {}, -1, float("nan"), True, object(), [None], np.zeros(3)])
def test_no_answer_raises(exercise, answer):
    found = check(exercise, answer, **ABOUT[exercise])
    assert found.right is False
    assert found.message


def test_an_exercise_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"no exercise '3\.1'; there are 01\.1"):
        check("3.1", 1)


def tagged(path: Path, tag: str) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [c.source for c in cells if c.cell_type == "code" and tag in c.metadata.get("tags", ())]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_exercise_has_a_stub_a_solution_and_a_check(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    kinds = [next(iter(cell.metadata.get("tags", [])), "") for cell in cells]
    number = path.stem[:2]
    asked = [name for name in EXERCISES if name.startswith(number)]
    last = max(k for k, cell in enumerate(cells) if "run.finish(" in cell.source)
    assert kinds[last + 1 :] == ["exercise", "solution", "exercise"] * len(asked), "exercises come after the results"
    assert {"exercise", "solution"}.isdisjoint(kinds[: last + 1])
    for k, name in enumerate(asked, 1):
        stub, solution, checked = (cell.source for cell in cells[last + 3 * k - 2 : last + 3 * k + 1])
        assert f"answer_{k} = ...  # " in stub
        assert f"answer_{k} = " in solution
        assert checked.startswith(f'check("{name}", answer_{k}')


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> Path:
    """The students' edition, by the Makefile's own command."""
    folder = tmp_path_factory.mktemp("students")
    recipe = re.search(r"^students:.*\n((?:\t.*\n)+)", (project_root() / "Makefile").read_text(), re.MULTILINE)[1]
    command = recipe.split("@echo")[0].strip().removeprefix("@").replace("\\\n", " ")
    command = command.replace("$(BIN)", str(Path(sys.executable).parent)).replace("build/students", str(folder))
    command = command.replace("$(NOTEBOOKS)", " ".join(map(str, NOTEBOOKS)))
    subprocess.run(command, shell=True, check=True, cwd=project_root(), capture_output=True)
    return folder


def test_students_get_the_exercises_without_the_solutions(students):
    assert sorted(path.name for path in students.iterdir()) == [path.name for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        theirs = students / path.name
        assert tagged(path, "solution")
        assert tagged(theirs, "solution") == []
        assert tagged(theirs, "exercise") == tagged(path, "exercise")
        assert tagged(theirs, "parameters") == tagged(path, "parameters")


def test_a_notebook_runs_for_a_student_who_has_answered_nothing(students, tmp_path):
    path, done = students / "01_data_construction.ipynb", tmp_path / "done.ipynb"
    given = {"MAX_TRACES": 5, "SPLITS": ["sft"], "RUN": str(tmp_path / "run")}
    papermill.execute_notebook(str(path), str(done), given, cwd=str(project_root()), progress_bar=False)
    assert verdicts(done) == [f"… {name}: not answered yet: replace ... with your answer" for name in
                              ("01.1", "01.2", "01.3")]  # fmt: skip


def test_advantages_are_within_a_group_and_add_up_to_nothing():
    assert advantages([2, 1, 1, 2]) == pytest.approx([0.8659, -0.8659, -0.8659, 0.8659], abs=1e-4)
    assert advantages([1, 1, 1]).tolist() == [0, 0, 0]
