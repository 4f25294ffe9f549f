"""Each miss has one cause, and the counts add up."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.evaluation.errors import HIT, MISSES, classify, cost, count_outcomes, gains_and_losses, pages_by_question
from mmr5_lab.prompting.answers import parse_ranking


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """`a.pdf` (Laws): five questions, gold page 3 but for the last; `n.pdf` (News): a question asked twice."""
    folder = tmp_path_factory.mktemp("corpus")

    def asked(text, gold, kind):
        return {"Q": text, "A": "", "page_id": gold, "type": kind, "layout_mapping": []}

    laws = [asked(f"question {k}", [3], "['Table', 'Chart']" if k == 0 else "text-only") for k in range(4)]
    news = [asked("On what date?", [0], "meta-data"), asked("On  what DATE?", [1], "[]")]
    write_corpus(
        folder,
        [
            {"doc_name": "a.pdf", "domain": "Laws", "questions": [*laws, asked("several", [0, 3], "text-only")]},
            {"doc_name": "n.pdf", "domain": "News", "questions": news},
        ],
        [{"doc_name": name, "image_binary": b"x"} for name in ("a.pdf", "n.pdf") for _ in range(6)],
    )
    return load_corpus(folder)


def answered(question: str, candidates: list[int], text: str) -> dict:
    """The row that `rerank_run` would write for a completion."""
    parsed = parse_ranking(text, len(candidates))
    pages = [candidates[k] for k in parsed.order]
    return {
        "question_id": question, "candidates": candidates, "pages": pages, "text": text, "faults": sorted(parsed.faults)
    }  # fmt: skip


def ranked(ids: str) -> str:
    return f"<think>because</think><answer>[{ids}]</answer>"


RIGHT = [
    answered("a.pdf:q0", [2, 3, 4], ranked("2, 1, 3")),  # page 3 first: a gain
    answered("a.pdf:q1", [3, 2, 4], ranked("1, 2, 3")),
    answered("a.pdf:q2", [3, 2, 4], ranked("1, 2, 3")),
    answered("a.pdf:q3", [3, 2, 4], ranked("1, 2, 3")),
    answered("a.pdf:q4", [0, 3, 4], ranked("2, 1, 3")),  # another of its two gold pages: neither gain nor loss
    answered("n.pdf:q0", [0, 1], ranked("1, 2")),
    answered("n.pdf:q1", [0, 1], ranked("2, 1")),
]


def with_answers(*rows: dict) -> pd.DataFrame:
    changed = {row["question_id"]: row for row in rows}
    return pd.DataFrame([changed.get(row["question_id"], row) for row in RIGHT])


@pytest.mark.parametrize(
    ("question", "candidates", "text", "outcome"),
    [
        ("a.pdf:q0", [2, 3, 4], ranked("2, 1, 3"), "hit"),
        ("a.pdf:q0", [2, 3, 4], ranked("1, 2, 3"), "inversion"),
        ("a.pdf:q0", [2, 4, 5], ranked("1, 2, 3"), "candidate miss"),
        ("a.pdf:q0", [2, 4, 5], "nothing", "candidate miss"),  # no text could have saved it
        ("a.pdf:q0", [2, 3, 4], "I would say page 2.", "fault"),
        ("a.pdf:q0", [2, 3, 4], ranked(""), "fault"),  # an empty list is repaired
        ("a.pdf:q0", [2, 3, 4], ranked("9, 1, 2"), "fault"),  # what it wrote first does not exist
        ("a.pdf:q0", [2, 3, 4], "<think>Image 1 is about", "truncation"),
        ("a.pdf:q0", [2, 3, 4], ranked("3, 3, 2"), "inversion"),  # faulty, but page 4 is what it put first
        ("a.pdf:q0", [2, 3, 4], "<think>x</think><answer>[3, ", "inversion"),  # cut after the first id
        ("a.pdf:q0", [3, 2, 4], "nothing", "hit"),  # luck: the candidates' order is right
        ("a.pdf:q0", [2, 3, 4], "", "inversion"),  # scores, without text and faults
        ("n.pdf:q1", [0, 1], ranked("1, 2"), "ambiguous gold"),  # page 0 is gold where the same is asked
        ("n.pdf:q1", [0, 2], ranked("1, 2"), "ambiguous gold"),
        ("n.pdf:q1", [2, 1], ranked("1, 2"), "inversion"),
    ],
)
def test_causes(corpus, question, candidates, text, outcome):
    row = answered(question, candidates, text)
    if text == "":
        row["faults"] = []
    outcomes = classify(with_answers(row), corpus).set_index("question_id")
    assert outcomes.loc[question, "outcome"] == outcome
    assert outcomes.drop(index=question)["outcome"].eq("hit").all()


def test_rows_say_where_and_how(corpus):
    faulty = answered("a.pdf:q1", [3, 2, 4], ranked("2, 2, 1"))
    lost = answered("a.pdf:q2", [5, 2, 4], ranked("1, 2, 3"))
    frame = classify(with_answers(faulty, lost).sample(frac=1, random_state=0), corpus)
    assert frame["question_id"].tolist() == corpus.questions["question_id"].tolist()
    rows = frame.set_index("question_id")
    assert rows.loc["a.pdf:q1", ["first", "faults", "rank", "retriever_rank", "change"]].tolist() == [
        *(2, ("duplicate", "missing"), 2.0, 1.0, -1.0)
    ]
    assert rows.loc["a.pdf:q0", ["rank", "retriever_rank", "change"]].tolist() == [1, 2, 1]
    assert rows.loc["a.pdf:q2", ["rank", "retriever_rank"]].isna().all()
    assert rows.loc["a.pdf:q4", ["gold", "R@1", "change"]].tolist() == [2, 0.5, 0]


def test_counts_by_domain_and_type(corpus):
    generations = with_answers(
        answered("a.pdf:q0", [2, 3, 4], "nothing"),
        answered("a.pdf:q1", [2, 4, 5], ranked("1, 2, 3")),
        answered("n.pdf:q1", [0, 1], ranked("1, 2")),
    )
    outcomes = classify(generations, corpus)
    by_domain = count_outcomes(outcomes)
    assert list(by_domain.columns) == [HIT, *MISSES, "questions"]
    # columns: hit, ambiguous gold, candidate miss, truncation, fault, inversion, questions
    assert by_domain.loc["Laws"].tolist() == [3, 0, 1, 0, 1, 0, 5]
    assert by_domain.loc["News"].tolist() == [1, 1, 0, 0, 0, 0, 2]
    assert by_domain.loc["all"].tolist() == [4, 1, 1, 0, 1, 0, 7]
    by_type = count_outcomes(outcomes, by="type")
    assert by_type.index.tolist() == ["Table", "Chart", "text-only", "meta-data", "(none)", "all"]
    assert by_type["fault"].tolist() == [1, 1, 0, 0, 0, 1]
    assert by_type["questions"].tolist() == [1, 1, 4, 1, 1, 7]


def test_gains_and_losses(corpus):
    table = gains_and_losses(classify(with_answers(answered("a.pdf:q1", [3, 2], ranked("2, 1"))), corpus))
    # Laws: q0 gained, q1 lost; News: q1 gained
    assert table.loc["Laws"].tolist() == [1, 1, 3, 5, 0]
    assert table.loc["News"].tolist() == [1, 0, 1, 2, 0.5]
    assert table.loc["all"].tolist() == [2, 1, 4, 7, pytest.approx(1 / 7)]


def test_a_parquet_file_is_classified_alike(corpus, tmp_path):
    generations = with_answers(answered("a.pdf:q0", [2, 3, 4], "nothing"))
    generations.to_parquet(tmp_path / "run.generations.parquet")
    again = classify(pd.read_parquet(tmp_path / "run.generations.parquet"), corpus)
    pd.testing.assert_frame_equal(again, classify(generations, corpus))


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_every_question_has_one_outcome(corpus, data):
    rows = []
    for question, pages in zip(corpus.questions["question_id"], [6] * 5 + [6] * 2, strict=True):
        candidates = data.draw(st.lists(st.integers(0, pages - 1), min_size=1, max_size=4, unique=True))
        text = data.draw(st.sampled_from([ranked("1"), ranked("2, 1"), ranked("7"), "<think>x", "[1]", ""]))
        rows.append(answered(question, candidates, text))
    outcomes = classify(pd.DataFrame(rows), corpus)
    assert set(outcomes["outcome"]) <= {HIT, *MISSES}
    assert ((outcomes["outcome"] == HIT) == (outcomes["rank"] == 1)).all()
    assert ((outcomes["R@1"] > 0) == (outcomes["rank"] == 1)).all()
    counts = count_outcomes(outcomes)
    assert counts.loc["all", "questions"] == counts.drop(index="all")["questions"].sum() == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop(columns=["faults", "text"]), "lack the columns text, faults"),
        (lambda rows: rows.iloc[:0], "are empty"),
        (lambda rows: pd.concat([rows, rows.iloc[:2]]), "twice: a.pdf:q0, a.pdf:q1"),
        (lambda rows: rows.iloc[2:], "lacks questions of the corpus: a.pdf:q0, a.pdf:q1"),
        (lambda rows: rows.replace("a.pdf:q0", "z.pdf:q0"), "does not know: z.pdf:q0"),
        (lambda rows: rows.assign(pages=[[9, 3, 4], *rows["pages"][1:]]), "not the candidates .*: a.pdf:q0"),
    ],
)
def test_generations_that_cannot_be_classified_are_named(corpus, change, message):
    with pytest.raises(ValueError, match=message):
        classify(change(with_answers()), corpus)


def test_scores_and_faults_that_are_missing_are_none(corpus):
    rows = with_answers().assign(scores=float("nan"), faults=None)
    assert classify(rows, corpus)["faults"].tolist() == [()] * 7


def test_a_question_twice_or_without_pages_is_named(corpus):
    rows = pd.DataFrame({"question_id": ["a", "b"], "pages": [[1], None]})
    with pytest.raises(ValueError, match="rows without pages: b"):
        pages_by_question(rows)
    with pytest.raises(ValueError, match="questions twice: a"):
        pages_by_question(pd.concat([rows[:1], rows[:1]]))


def test_costs_are_of_the_same_questions(corpus):
    frame = with_answers().assign(tokens=10, seconds=[1.0, 2.0] + [0.5] * 5)
    table = cost({"all": frame}, corpus, samples=50)
    assert table.loc["all", ["tokens a query", "seconds a query", "questions"]].tolist() == [10, 5.5 / 7, 7]
    with pytest.raises(ValueError, match=r"some: the run lacks questions of the corpus: a\.pdf:q0"):
        cost({"all": frame, "some": frame[1:]}, corpus)
    with pytest.raises(ValueError, match=r"all: no tokens or seconds for a\.pdf:q1"):
        cost({"all": frame.assign(tokens=[1, None, *[1] * 5])}, corpus)
    with pytest.raises(ValueError, match=r"all: these rows hold questions twice: a\.pdf:q0"):
        cost({"all": pd.concat([frame, frame[:1]])}, corpus)
