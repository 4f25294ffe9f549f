"""Recall as MMDocIR defines it, averages that hide nothing, by domain, type and number of gold pages."""

import os
from dataclasses import dataclass
from pathlib import Path

import ir_measures
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, R, nDCG

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.rankings import Rankings, read_trec, write_qrels, write_trec
from mmr5_lab.evaluation.gold_ranks import MEASURES
from mmr5_lab.evaluation.metrics import (
    breakdown,
    candidate_ceiling,
    evaluate,
    evaluate_runs,
    per_question,
    recall_at_k,
)
from mmr5_lab.evaluation.significance import bootstrap_interval

SHARED = Path(os.environ.get("MMR5_SHARED", Path(__file__).parents[3] / "shared"))
needs_mmdocir = pytest.mark.skipif(
    not (SHARED / "mmdocir" / "MMDocIR_annotations.jsonl").is_file(),
    reason=f"MMDocIR's annotations are not in {SHARED / 'mmdocir'} (set MMR5_SHARED)",
)


@dataclass(frozen=True)
class Tables:
    questions: pd.DataFrame
    documents: pd.DataFrame


def tables(rows, num_pages=10):
    """rows: (question_id, doc_name, domain, gold_pages)."""
    questions = pd.DataFrame(rows, columns=["question_id", "doc_name", "domain", "gold_pages"])
    documents = questions[["doc_name", "domain"]].drop_duplicates().assign(num_pages=num_pages)
    return Tables(questions, documents)


TOY = tables(
    [
        ("q1", "a.pdf", "Laws", [0]),
        ("q2", "a.pdf", "Laws", [2, 3]),
        ("q3", "b.pdf", "News", [1]),
        ("q4", "c.pdf", "Guidebook", [5, 6, 7, 8]),
    ]
)
TOY_RUN = {
    "q1": [0, 4],  # R@1 1, R@3 1
    "q2": [2, 9, 8],  # R@1 .5, R@3 .5
    "q3": [0, 2, 3],  # R@1 0, R@3 0
    "q4": [5, 6, 0, 7],  # R@1 .25, R@3 .5
}


@pytest.mark.parametrize(
    ("ranking", "gold", "k", "expected"),
    [
        ([4, 0, 2], [2], 1, 0),
        ([4, 0, 2], [2], 3, 1),
        ([4, 0, 2], [2, 7], 3, 0.5),
        ([2, 7], [2, 7], 1, 0.5),  # one place cannot hold two gold pages
        ([2], [2], 5, 1),  # shorter than k
        ([], [2], 5, 0),
        ([2], [2, 2], 1, 1),  # gold is a set
    ],
)
def test_recall_at_k(ranking, gold, k, expected):
    assert recall_at_k(ranking, gold, k) == expected


@pytest.mark.parametrize(
    ("ranking", "gold", "k", "message"),
    [
        ([1], [], 1, "gold is empty"),
        ([1], [1], 0, "k is 0"),
        ([1, 2, 1], [1], 1, r"repeats pages \[1\]"),
    ],
)
def test_recall_refuses_what_has_no_meaning(ranking, gold, k, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(ranking, gold, k)


def test_evaluate_by_hand():
    table = evaluate(TOY_RUN, TOY, ks=(1, 3))
    expected = pd.DataFrame(
        {
            "R@1": [0.75, 0, 0.25, 1 / 3, 0.5, 1.75 / 4, (0.75 + 1 + 0.25) / 3, (1 + 0.5 + 1 + 0.25) / 4],
            "R@3": [0.75, 0, 0.5, 1.25 / 3, 0.625, 2 / 4, (1 + 1 + 0.75) / 3, 3.75 / 4],
            "questions": [2, 1, 1, 4, 3, 4, 4, 4],
        },
        index=pd.Index(
            [
                "Laws",
                "News",
                "Guidebook",
                "macro",
                "macro_ex_news",
                "micro",
                "ceiling_macro",
                "ceiling_micro",
            ],
            name="domain",
        ),
    )
    pd.testing.assert_frame_equal(table, expected)


def test_default_columns():
    assert list(evaluate(TOY_RUN, TOY).columns) == ["R@1", "R@3", "R@5", "questions"]


def test_order_of_the_run_does_not_matter():
    backwards = dict(reversed(TOY_RUN.items()))
    pd.testing.assert_frame_equal(evaluate(backwards, TOY), evaluate(TOY_RUN, TOY))


def test_macro_without_news_where_there_is_none_or_nothing_else():
    no_news = tables([("q1", "a.pdf", "Laws", [0]), ("q2", "c.pdf", "Guidebook", [5])])
    table = evaluate({"q1": [0], "q2": [0]}, no_news, ks=[1])
    assert table.loc["macro_ex_news", "R@1"] == table.loc["macro", "R@1"] == 0.5
    only_news = tables([("q1", "a.pdf", "News", [0])])
    table = evaluate({"q1": [0]}, only_news, ks=[1])
    assert np.isnan(table.loc["macro_ex_news", "R@1"])
    assert table.loc["macro_ex_news", "questions"] == 0


def test_candidate_ceiling_by_hand():
    table = candidate_ceiling(TOY_RUN, TOY, ks=(1, 3))
    # q1: its page is there; q2: one of two; q3: none; q4: three of four, so 1/4 at 1 and 3/4 at 3.
    assert list(table.index) == ["Laws", "News", "Guidebook", "macro", "macro_ex_news", "micro"]
    assert table["R@1"].tolist() == [0.75, 0, 0.25, 1 / 3, 0.5, 1.75 / 4]
    assert table["R@3"].tolist() == [0.75, 0, 0.75, 0.5, 0.75, 2.25 / 4]


def test_per_question_rows():
    frame = per_question(TOY_RUN, TOY, ks=[3])
    assert frame["question_id"].tolist() == ["q1", "q2", "q3", "q4"]
    assert frame["gold"].tolist() == [1, 2, 1, 4]
    assert frame["candidates"].tolist() == [2, 3, 3, 4]
    assert frame["gold_in_candidates"].tolist() == [1, 1, 0, 3]
    assert frame["R@3"].tolist() == [1, 0.5, 0, 0.5]
    assert frame["R@3 all pages"].tolist() == [1, 1, 1, 0.75]


def test_other_measures_by_hand():
    frame = per_question(TOY_RUN, TOY, ks=[3], measures=list(MEASURES))
    second, third = 1 / np.log2(3), 1 / np.log2(4)  # gains at ranks 2 and 3
    # q1: gold at rank 1; q2: one of two at rank 1; q3: none; q4: ranks 1, 2 and 4 of four gold pages
    np.testing.assert_allclose(frame["nDCG@3"], [1, 1 / (1 + second), 0, (1 + second) / (1 + second + third)])
    assert frame["RR"].tolist() == [1, 1, 0, 1]
    np.testing.assert_allclose(frame["AP"], [1, 1 / 2, 0, (1 + 1 + 3 / 4) / 4])
    late = per_question(TOY_RUN | {"q3": [0, 2, 1]}, TOY, ks=[3], measures=["RR", "AP"])
    assert late.loc[2, ["RR", "AP"]].tolist() == [1 / 3, 1 / 3]


def test_tables_of_other_measures():
    table = evaluate(TOY_RUN, TOY, ks=[3], measures=["RR", "AP", "nDCG"])
    assert list(table.columns) == ["MRR", "MAP", "nDCG@3", "questions"]
    assert table.loc["micro", "MRR"] == 3 / 4
    assert table.loc["micro", "MAP"] == pytest.approx((1 + 1 / 2 + 0 + 2.75 / 4) / 4)
    assert table.loc["ceiling_micro"].tolist() == [1, 1, 1, 4]
    # of q2 one gold page of two was found, of q3 none, of q4 three of four
    reachable = candidate_ceiling(TOY_RUN, TOY, ks=[3], measures=["RR", "AP"])
    assert reachable.loc["micro"].tolist() == [3 / 4, (1 + 1 / 2 + 0 + 3 / 4) / 4, 4]


def test_many_runs_at_once():
    tables = evaluate_runs({"a": TOY_RUN, "b": TOY_RUN | {"q3": [1, 0]}}, TOY, ks=[1])
    pd.testing.assert_frame_equal(tables["a"], evaluate(TOY_RUN, TOY, ks=[1]))
    assert tables["b"].loc["News", "R@1"] == 1
    with pytest.raises(ValueError, match="b: the run lacks questions of the corpus: q2"):
        evaluate_runs({"a": TOY_RUN, "b": {"q1": [0], "q3": [0], "q4": [0]}}, TOY)


@pytest.mark.parametrize("measures", [[], ["P"], ["R", "R"]])
def test_unknown_measures(measures):
    with pytest.raises(ValueError, match="expected some of R, nDCG, RR, AP, each once"):
        evaluate(TOY_RUN, TOY, measures=measures)


def test_breakdown_by_number_of_gold_pages():
    table = breakdown(TOY_RUN, TOY, by="gold", ks=[3])
    assert table.index.tolist() == [1, 2, 4, "all"]
    assert table["R@3"].tolist() == [0.5, 0.5, 0.5, 0.5]  # q1 1 and q3 0; q2; q4
    assert table["R@3 candidates"].tolist() == [0.5, 0.5, 0.75, 2.25 / 4]
    assert table["R@3 all pages"].tolist() == [1, 1, 0.75, 3.75 / 4]
    assert table["questions"].tolist() == [2, 1, 1, 4]


def test_breakdown_has_intervals_where_documents_differ():
    table = breakdown(TOY_RUN, TOY, by="domain", ks=[1], measures=["R", "RR"], samples=500)
    frame = per_question(TOY_RUN, TOY, [1])
    assert tuple(table.loc["all", ["R@1 low", "R@1 high"]]) == bootstrap_interval(frame["R@1"], frame["doc_name"], 500)
    of_one = frame.groupby("domain")["doc_name"].agg(lambda names: len(set(names)) == 1)
    assert table["R@1 low"].drop("all").isna().to_dict() == of_one.to_dict()
    assert table["MRR high"].notna()["all"]


def test_breakdown_by_type_counts_a_question_in_each_of_its_types():
    types = [("Chart", "Table"), (), ("Table",), "text-only"]
    corpus = Tables(TOY.questions.assign(type=types), TOY.documents)
    table = breakdown(TOY_RUN, corpus, by="type", ks=[1], measures=["R", "RR"])
    assert list(table.columns[3:]) == ["MRR", "MRR candidates", "MRR all pages", "questions"]
    assert table["R@1"].to_dict() == {"Chart": 1, "Table": 0.5, "(none)": 0.5, "text-only": 0.25, "all": 1.75 / 4}
    assert table["questions"].to_dict() == {"Chart": 1, "Table": 2, "(none)": 1, "text-only": 1, "all": 4}


def test_breakdown_refuses_a_group_named_like_its_summary():
    renamed = tables([("q1", "a.pdf", "all", [0])])
    with pytest.raises(ValueError, match="a domain is named like the summary row 'all'"):
        breakdown({"q1": [0]}, renamed, by="domain")


def test_breakdown_refuses_what_the_corpus_does_not_say():
    with pytest.raises(ValueError, match="cannot group questions by 'type': choose domain, type or gold"):
        breakdown(TOY_RUN, TOY, by="type")
    assert breakdown(TOY_RUN, TOY, by="domain", ks=[1])["R@1"].tolist() == [0.75, 0, 0.25, 1.75 / 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: {}, "the run is empty"),
        (lambda run: Rankings(run), "a run is {question: pages}, as Rankings.pages is, not a Rankings"),
        (lambda run: pd.DataFrame([run]), "not a DataFrame"),
        (lambda run: run | {"q9": [0]}, "does not know: q9"),
        (lambda run: {q: run[q] for q in ("q1", "q3")}, "lacks questions of the corpus: q2, q4"),
        (lambda run: run | {"q2": []}, "questions without ranked pages: q2"),
        (lambda run: run | {"q2": [2, 10]}, "page 10 of question q2"),
        (lambda run: run | {"q2": [2, -1]}, "page -1 of question q2"),
        (lambda run: run | {"q2": [2, 3, 2]}, "repeats pages: page 2 of question q2"),
        (lambda run: run | {"q2": [2.0, 3.0]}, "not lists of whole page numbers: q2"),
        (lambda run: run | {"q2": [float("nan")]}, "not lists of whole page numbers: q2"),
        (lambda run: run | {"q2": ["2"]}, "not lists of whole page numbers: q2"),
        (lambda run: run | {"q2": None}, "not lists of whole page numbers: q2"),
    ],
)
def test_runs_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(change(TOY_RUN), TOY)


def test_long_lists_of_questions_are_cut():
    many = tables([(f"q{i}", "a.pdf", "Laws", [0]) for i in range(9)])
    with pytest.raises(ValueError, match="q1, q2, q3, q4, q5 and 3 more"):
        evaluate({"q0": [0]}, many)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no questions"),
        ([("q1", "a.pdf", "Laws", [])], "without gold pages: q1"),
        ([("q1", "a.pdf", "Laws", [10])], "page 10 of question q1"),
        ([("q1", "a.pdf", "Laws", [0]), ("q1", "a.pdf", "Laws", [1])], "repeats question ids: q1"),
        ([("q1", "a.pdf", "macro", [0])], "named like summary rows"),
        ([("q1", "a.pdf", None, [0])], "without a domain: q1"),
        ([("q1", "a.pdf", "Laws", [2.5])], "gold pages that are not lists of whole page numbers: q1"),  # was read as 2
        ([("q1", "a.pdf", "Laws", [float("nan")])], "not lists of whole page numbers: q1"),
        ([("q1", "a.pdf", "Laws", None)], "not lists of whole page numbers: q1"),
        (
            [("q1", "a.pdf", "Laws", [1, 10])],
            "page 10 of question q1; they seem to count from 1, but pages are 0-based",
        ),
    ],
)
def test_corpora_that_cannot_be_averaged_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        evaluate({"q1": [0]}, tables(rows))


def test_repeated_documents_are_named():
    corpus = Tables(TOY.questions, pd.concat([TOY.documents, TOY.documents[:1]]))
    with pytest.raises(ValueError, match=r"repeats documents: a\.pdf"):
        evaluate(TOY_RUN, corpus)


def test_pages_that_count_from_1_are_told():
    with pytest.raises(ValueError, match="page 10 of question q4; they seem to count from 1, but pages are 0-based"):
        evaluate({"q1": [1, 5], "q2": [3, 4], "q3": [1], "q4": [9, 10]}, TOY)


def test_domains_and_types_that_are_missing_are_not_left_out():
    with pytest.raises(ValueError, match="without a domain: q2"):
        breakdown(TOY_RUN, Tables(TOY.questions.assign(domain=["Laws", None, "News", "News"]), TOY.documents), "domain")
    types = ["Chart", None, float("nan"), ()]
    table = breakdown(TOY_RUN, Tables(TOY.questions.assign(type=types), TOY.documents), "type")
    assert table["questions"].to_dict() == {"Chart": 1, "(none)": 3, "all": 4}


def test_documents_that_are_missing_are_named():
    corpus = Tables(TOY.questions, TOY.documents[TOY.documents["doc_name"] != "b.pdf"])
    with pytest.raises(ValueError, match=r"documents that the corpus lacks: b\.pdf"):
        evaluate(TOY_RUN, corpus)


@pytest.mark.parametrize("ks", [(), (0,), (1, 1)])
def test_bad_cut_offs(ks):
    with pytest.raises(ValueError, match="expected distinct cut-offs"):
        evaluate(TOY_RUN, TOY, ks=ks)


@st.composite
def random_runs(draw):
    """Gold pages and a ranking of some pages for a few questions over ten-page documents."""
    rows, run = [], {}
    for i in range(draw(st.integers(1, 6))):
        gold = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
        rows.append((f"q{i}", f"{draw(st.integers(0, 2))}.pdf", "Laws", gold))
        run[f"q{i}"] = draw(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True))
    return tables(rows), run


@given(random_runs())
@settings(deadline=None)
def test_agrees_with_ir_measures(made):
    corpus, run = made
    qrels = {
        q: {str(p): 1 for p in gold}
        for q, gold in zip(corpus.questions["question_id"], corpus.questions["gold_pages"], strict=True)
    }
    scores = {q: {str(p): -float(rank) for rank, p in enumerate(pages)} for q, pages in run.items()}
    theirs = {
        (m.query_id, str(m.measure)): m.value for m in ir_measures.iter_calc([R @ 1, R @ 3, R @ 5], qrels, scores)
    }
    ours = per_question(run, corpus)
    for row in ours.to_dict("records"):
        for k in (1, 3, 5):
            assert row[f"R@{k}"] == pytest.approx(theirs[row["question_id"], f"R@{k}"])
            gold = [int(p) for p in qrels[row["question_id"]]]
            assert row[f"R@{k}"] == recall_at_k(run[row["question_id"]], gold, k)
    assert evaluate(run, corpus).loc["micro", "R@3"] == pytest.approx(
        ir_measures.calc_aggregate([R @ 3], qrels, scores)[R @ 3]
    )


@given(random_runs(), st.data())
@settings(deadline=None, max_examples=25)
def test_ties_are_ranked_alike_by_other_tools(tmp_path_factory, made, data):
    """Scores with many ties, written as TREC files and read by ir_measures (pytrec_eval) and by ourselves."""
    toy, pages = made
    names = [f"{name}:{q}" for name, q in zip(toy.questions["doc_name"], pages, strict=True)]
    questions = toy.questions.assign(question_id=names)
    corpus = Corpus(Path("toy"), toy.documents.assign(first_row=0), questions)
    few = st.sampled_from([-1.0, 0.0, 1e-6, 0.5, 7.25, 400.0])
    scores = {
        q: sorted(data.draw(st.lists(few, min_size=len(p), max_size=len(p))), reverse=True)
        for q, p in zip(questions["question_id"], pages.values(), strict=True)
    }
    run = Rankings(dict(zip(scores, pages.values(), strict=True)), scores)
    folder = tmp_path_factory.mktemp("ties")
    write_trec(run, corpus, folder / "run")
    write_qrels(corpus, folder / "qrels")
    assert read_trec(folder / "run", corpus).pages == run.pages
    measures = {"R@1": R @ 1, "R@3": R @ 3, "nDCG@1": nDCG @ 1, "nDCG@3": nDCG @ 3, "RR": RR, "AP": AP}
    qrels = list(ir_measures.read_trec_qrels(str(folder / "qrels")))
    lines = list(ir_measures.read_trec_run(str(folder / "run")))
    theirs = {(m.query_id, m.measure): m.value for m in ir_measures.iter_calc(measures.values(), qrels, lines)}
    for row in per_question(run.pages, corpus, ks=(1, 3), measures=list(MEASURES)).to_dict("records"):
        for name, measure in measures.items():
            assert row[name] == pytest.approx(theirs[row["question_id"], measure])


@given(random_runs())
@settings(deadline=None, max_examples=25)
def test_recall_stays_under_both_ceilings(made):
    corpus, run = made
    table, reachable = evaluate(run, corpus), candidate_ceiling(run, corpus)
    for k in ("R@1", "R@3", "R@5"):
        assert table.loc["micro", k] <= reachable.loc["micro", k] + 1e-12
        assert reachable.loc["micro", k] <= table.loc["ceiling_micro", k] + 1e-12


@pytest.fixture(scope="module")
def mmdocir():
    return load_corpus(SHARED / "mmdocir")


@needs_mmdocir
def test_mmdocir_perfect_ranking(mmdocir):
    """The known best figures on all 1,658 questions: some have more gold pages than places."""
    num_pages = mmdocir.documents.set_index("doc_name")["num_pages"]
    run = {
        row.question_id: [*row.gold_pages, *sorted(set(range(num_pages[row.doc_name])) - set(row.gold_pages))]
        for row in mmdocir.questions.itertuples()
    }
    table = evaluate(run, mmdocir)
    assert table.loc["micro", "questions"] == 1658
    assert len(table) == 10 + 5
    for average in ("micro", "ceiling_micro"):
        assert table.loc[average, ["R@1", "R@3", "R@5"]].round(4).tolist() == [0.8952, 0.9927, 0.9998]
    for average in ("macro", "ceiling_macro"):
        assert table.loc[average, ["R@1", "R@3", "R@5"]].round(4).tolist() == [0.8820, 0.9904, 0.9997]
    # News is one document with 137 questions, and macro_ex_news is the mean of the other nine.
    assert table.loc["News", "questions"] == 137
    others = table.iloc[:10].drop(index="News")
    assert table.loc["macro_ex_news", "R@1"] == pytest.approx(others["R@1"].mean())
    assert table.loc["macro_ex_news", "questions"] == 1658 - 137


@needs_mmdocir
def test_mmdocir_page_order_equals_the_definition(mmdocir):
    """Vectorised and one by one give the same on the real annotations."""
    num_pages = mmdocir.documents.set_index("doc_name")["num_pages"]
    run = {row.question_id: range(num_pages[row.doc_name]) for row in mmdocir.questions.itertuples()}
    frame = per_question(run, mmdocir)
    for k in (1, 3, 5):
        expected = [
            recall_at_k(run[q], gold, k)
            for q, gold in zip(mmdocir.questions["question_id"], mmdocir.questions["gold_pages"], strict=True)
        ]
        np.testing.assert_allclose(frame[f"R@{k}"], expected)


@needs_mmdocir
def test_mmdocirs_own_definition_on_scores_with_ties(mmdocir):
    """Sort the scores, falling and stable, so equal ones are in page order; then |top k ∩ gold| ÷ |gold|."""
    num_pages = mmdocir.documents.set_index("doc_name")["num_pages"]
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 8, num_pages[name]) for name in mmdocir.questions["doc_name"]]
    run = {q: np.argsort(-s, kind="stable") for q, s in zip(mmdocir.questions["question_id"], scores, strict=True)}
    frame = per_question(run, mmdocir)
    for k in (1, 3, 5):
        expected = []
        for gold, of_page in zip(mmdocir.questions["gold_pages"], scores, strict=True):
            top = [p for p, _ in sorted(enumerate(of_page), key=lambda pair: pair[1], reverse=True)[:k]]
            expected.append(len(set(top) & set(gold)) / len(gold))
        assert frame[f"R@{k}"].tolist() == expected
