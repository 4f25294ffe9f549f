"""One call compares systems: averages, intervals, differences, corrected p-values, and their typeset forms."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from mmr5_lab.evaluation.comparison import compare, to_html, to_latex
from mmr5_lab.evaluation.metrics import evaluate, per_question
from mmr5_lab.evaluation.significance import bootstrap_interval, holm, paired_randomisation_test


@dataclass(frozen=True)
class Tables:
    questions: pd.DataFrame
    documents: pd.DataFrame


def corpus_of(documents: int, questions: int = 2) -> Tables:
    """Documents of five pages, in turn of Laws and News; page 0 is gold for every question."""
    names = [f"{i}.pdf" for i in range(documents)]
    rows = [
        (f"{name}:q{k}", name, ("Laws", "News")[i % 2], [0]) for i, name in enumerate(names) for k in range(questions)
    ]
    return Tables(
        pd.DataFrame(rows, columns=["question_id", "doc_name", "domain", "gold_pages"]),
        pd.DataFrame({"doc_name": names, "num_pages": 5}),
    )


CORPUS = corpus_of(4)
IDS = CORPUS.questions["question_id"].tolist()  # of 0.pdf (Laws), 1.pdf (News), 2.pdf (Laws), 3.pdf (News)


def run_with(right: list[bool]) -> dict[str, list[int]]:
    """The gold page first where `right`, second elsewhere."""
    return {q: [0, 1] if hit else [1, 0] for q, hit in zip(IDS, right, strict=True)}


FIRST = run_with([True, False, False, False, False, False, False, False])
BETTER = run_with([True, True, True, True, True, True, False, False])
SEED = run_with([True, True, True, True, False, False, False, False])


def test_averages_and_differences_by_hand():
    table = compare({"first": FIRST, "better": BETTER}, CORPUS, baseline="first", ks=[1, 2], samples=500)
    assert table.index.tolist() == ["first", "better"]
    # Laws: 1 of 4 and 4 of 4; News: 0 of 4 and 2 of 4
    assert table["macro R@1"].tolist() == [1 / 8, 6 / 8]
    assert table["macro_ex_news R@1"].tolist() == [1 / 4, 1]
    assert table["micro R@1"].tolist() == [1 / 8, 6 / 8]
    assert table["micro R@2"].tolist() == [1, 1]
    assert table["difference"].tolist()[1] == 5 / 8
    assert table.loc["first", ["difference", "difference low", "difference high", "p", "p Holm"]].isna().all()
    assert table["candidate ceiling"].tolist() == table["corpus ceiling"].tolist() == [1, 1]
    assert table["seeds"].tolist() == [1, 1]
    assert table["sd"].isna().all()


def test_statistics_are_those_of_metrics():
    table = compare({"first": FIRST, "better": BETTER}, CORPUS, samples=400, seed=3, level=0.9)
    a, b = per_question(BETTER, CORPUS)["R@1"], per_question(FIRST, CORPUS)["R@1"]
    documents = CORPUS.questions["doc_name"]
    row = table.loc["better"]
    assert (row["low"], row["high"]) == pytest.approx(bootstrap_interval(a, documents, 400, 3, 0.9))
    assert (row["difference low"], row["difference high"]) == pytest.approx(
        bootstrap_interval(a - b, documents, 400, 3, 0.9)
    )
    assert row["p"] == row["p Holm"] == paired_randomisation_test(a, b, 400, 3, documents)


def test_documents_are_swapped_whole():
    """Of 4 documents that differ 1, 2, 2 and 0 questions, 2 of 8 sign patterns reach the sum: p is 1/4."""
    table = compare({"first": FIRST, "better": BETTER}, CORPUS, samples=20_000)
    assert table.loc["better", "p"] == pytest.approx(1 / 4, abs=0.01)


def test_seeds_are_averaged_by_question():
    table = compare({"first": FIRST, "two": [BETTER, SEED]}, CORPUS, samples=100)
    assert table.loc["two", "seeds"] == 2
    assert table.loc["two", "micro R@1"] == (6 / 8 + 4 / 8) / 2
    assert table.loc["two", "macro_ex_news R@1"] == 3 / 4  # 2 and 1 of the domain's two documents
    assert table.loc["two", "sd"] == pytest.approx(np.std([6 / 8, 4 / 8], ddof=1))
    same = compare({"first": FIRST, "two": [BETTER, BETTER]}, CORPUS, samples=100)
    one = compare({"first": FIRST, "two": BETTER}, CORPUS, samples=100)
    pd.testing.assert_frame_equal(same.drop(columns=["seeds", "sd"]), one.drop(columns=["seeds", "sd"]))


def test_macro_and_micro_are_those_of_evaluate():
    table = compare({"a": SEED}, CORPUS, samples=100)
    expected = evaluate(SEED, CORPUS)
    for kind in ("macro", "macro_ex_news", "micro"):
        for k in (1, 3, 5):
            assert table.loc["a", f"{kind} R@{k}"] == pytest.approx(expected.loc[kind, f"R@{k}"])


def test_another_measure_can_be_tested():
    table = compare({"first": FIRST, "better": BETTER}, CORPUS, ks=[1], measure="RR", samples=100)
    assert table["micro RR"].tolist() == [(1 + 7 / 2) / 8, (6 + 2 / 2) / 8]
    assert table["difference"].tolist()[1] == 2.5 / 8
    assert "micro RR" in table.attrs["note"]


def test_candidate_ceiling_counts_what_was_never_ranked():
    table = compare({"first": FIRST | {IDS[0]: [1, 2]}}, CORPUS, samples=100)
    assert table.loc["first", "candidate ceiling"] == 7 / 8
    assert table.loc["first", "corpus ceiling"] == 1


def test_p_values_of_a_table_are_corrected_together():
    table = compare({"first": FIRST, "a": BETTER, "b": SEED}, CORPUS, samples=2000)
    assert table["p Holm"].tolist()[1:] == holm(table["p"].tolist()[1:])
    assert "2 tests" in table.attrs["note"]


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ({}, {}, "no runs to compare"),
        ({"a": FIRST}, {"baseline": "b"}, "the baseline 'b' is not among the systems: 'a'"),
        ({"a": FIRST}, {"measure": "P@1"}, "unknown measure 'P@1'"),
        ({"a": []}, {}, "system 'a' is not a run or a list of runs"),
        ({"a": "run.trec"}, {}, "system 'a' is not a run or a list of runs"),
        ({"a": FIRST, "b": {}}, {}, "system 'b': the run is empty"),
        ({"a": FIRST, "b": [FIRST, {IDS[0]: [0]}]}, {}, "system 'b', seed 1: the run lacks questions .* 0.pdf:q1"),
        ({"a": FIRST | {"x:q0": [0]}}, {}, "system 'a': .* does not know: x:q0"),
        ({"a": FIRST | {IDS[0]: [7]}}, {}, "system 'a': .* page 7 of question 0.pdf:q0"),
        ({"a": FIRST | {IDS[0]: [1, 1]}}, {}, "system 'a': .* repeats pages"),
    ],
)
def test_what_cannot_be_compared_is_named(runs, options, message):
    with pytest.raises(ValueError, match=message):
        compare(runs, CORPUS, samples=10, **options)


def test_html_and_latex_for_people():
    table = compare({"first": FIRST, "R&D_50% <script>": [BETTER, SEED]}, CORPUS, ks=[1], samples=200)
    row = table.iloc[1]
    text = to_html(table)
    assert "<script>" not in text
    assert '<th scope="row">R&amp;D_50% &lt;script&gt;</th><td>2</td>' in text
    assert f"<td>[{row['low']:.3f}, {row['high']:.3f}]</td><td>+{row['difference']:.3f}</td>" in text
    assert f"<td>{row['p Holm']:.4f}</td></tr>" in text
    assert "8 questions of 4 documents" in text
    lines = to_latex(table).splitlines()
    assert any(line.startswith(r"R\&D\_50\% \textless{}script\textgreater{} & 2 & ") for line in lines)
    assert any(line.startswith("first & 1 & -- & 0.125 & 0.250 & 0.125 & ") for line in lines)
    assert r"\bottomrule" in lines
