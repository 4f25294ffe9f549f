"""Several corpora opened as one, and short documents filled up with pages of others."""

import random
from dataclasses import replace

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_lab.corpus.documents import ANNOTATIONS, PAGES, load_corpus
from mmr5_lab.corpus.ids import CorpusError, corpora_named
from mmr5_lab.corpus.joined import join, pad
from mmr5_lab.corpus.page_store import PageStore
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.mini.documents import DOMAINS, make_document
from mmr5_lab.mini.teacher import evidence_teacher
from mmr5_lab.retrieval.retrieve import retrieve


def write(folder, counts: dict[str, int], split: str = "sft", domain: str = "") -> None:
    """Write a corpus of documents with so many pages, and a question about the first page of each."""
    annotations, pages = [], []
    for name, count in counts.items():
        annotation, rows = make_document(name, domain or next(iter(DOMAINS)), split, 1, random.Random(name))
        annotation["questions"] = [annotation["questions"][0] | {"page_id": [0], "layout_mapping": []}]
        annotations.append({**annotation, "page_indices": [len(pages), len(pages) + count - 1]})
        pages += rows[:count]
    write_corpus(folder, annotations, pages)


@pytest.fixture
def folders(tmp_path):
    write(tmp_path / "one", {"a": 1, "b": 3, "c": 2})
    write(tmp_path / "two", {"a": 4, "d": 1}, split="rl")
    return tmp_path


def test_two_corpora_are_one(folders):
    both = load_corpus("one + two", root=folders)
    assert both.documents["doc_name"].tolist() == ["one/a", "one/b", "one/c", "two/a", "two/d"]
    assert both.documents["split"].tolist() == ["sft"] * 3 + ["rl"] * 2
    assert both.questions["question_id"].tolist()[-2:] == ["two%2Fa:q0", "two%2Fd:q0"]
    for name in ("one", "two"):
        part = load_corpus(folders / name)
        for doc_name in part.documents["doc_name"]:
            for page in range(part.num_pages(doc_name)):
                assert both.page_bytes(f"{name}/{doc_name}", page) == part.page_bytes(doc_name, page)
                assert both.page_text(f"{name}/{doc_name}", page) == part.page_text(doc_name, page)
    alone = retrieve(load_corpus(folders / "two"), top_k=3)
    assert retrieve(both.split("rl"), top_k=3).pages == {f"two%2F{q}": pages for q, pages in alone.pages.items()}
    assert load_corpus("two + one", "sft", root=folders).documents["doc_name"].tolist() == ["one/a", "one/b", "one/c"]


def test_a_folder_with_a_plus_in_its_name_is_one_corpus(folders):
    (folders / "one").rename(folders / "one + two")
    assert corpora_named("one + two", folders) == ["one + two"]
    assert load_corpus("one + two", root=folders).documents["doc_name"].tolist() == ["a", "b", "c"]


def test_what_cannot_be_joined_is_named(folders):
    write(folders / "other" / "one", {"z": 1})
    with pytest.raises(CorpusError, match=r"two corpora have the same name.*rename one"):
        load_corpus("one + other/one", root=folders)
    with pytest.raises(CorpusError, match=f"nothing is not a corpus folder: {ANNOTATIONS} is missing"):
        load_corpus("one + nothing", root=folders)
    (folders / "two" / PAGES).unlink()
    with pytest.raises(CorpusError, match=f"{PAGES} is missing: corpora are joined by their pages"):
        load_corpus("one + two", root=folders)


def test_short_documents_get_pages_of_others_of_their_split(folders):
    plain, padded = (load_corpus("one + two", root=folders, pad_to=count) for count in (0, 4))
    assert padded.documents["num_pages"].tolist() == [4, 4, 4, 4, 4]
    of_split = {s: {page.tobytes() for page in images(plain.split(s))} for s in ("sft", "rl")}
    for row in padded.documents.to_dict("records"):
        pages = [padded.page_image(row["doc_name"], page).tobytes() for page in range(4)]
        own = plain.num_pages(row["doc_name"])
        assert pages[:own] == [plain.page_image(row["doc_name"], page).tobytes() for page in range(own)]
        assert len(set(pages)) == 4
        assert set(pages) <= of_split[row["split"]], "the splits for SFT and RL share no page"
    again = load_corpus("one + two", root=folders, pad_to=4)
    assert [list(again.rows(n)) for n in again.documents["doc_name"]] == [
        list(padded.rows(n)) for n in padded.documents["doc_name"]
    ]


def images(corpus):
    return [corpus.page_image(n, k) for n in corpus.documents["doc_name"] for k in range(corpus.num_pages(n))]


def test_documents_of_evaluation_keep_their_own_pages(tmp_path):
    write(tmp_path / "eval", {"a": 1, "b": 3}, split="eval")
    assert load_corpus(tmp_path / "eval", pad_to=5).documents["num_pages"].tolist() == [1, 3]


def test_what_stays_short_is_said(tmp_path, caplog):
    write(tmp_path / "few", {"a": 1, "b": 1})
    assert load_corpus(tmp_path / "few", pad_to=5).documents["num_pages"].tolist() == [2, 2]
    assert "2 documents have fewer than 5 pages still" in caplog.text


def test_pages_of_the_same_domain_come_first(tmp_path):
    first, second = list(DOMAINS)[:2]
    write(tmp_path / "near", {"a": 1, "b": 4, "c": 4}, domain=first)
    write(tmp_path / "far", {f"z{k}": 4 for k in range(8)}, domain=second)
    corpus = load_corpus("far + near", root=tmp_path, pad_to=3)
    near = {row for name in ("near/b", "near/c") for row in corpus.rows(name)}
    assert set(corpus.rows("near/a")[1:]) <= near


@settings(deadline=None, max_examples=25)
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=5), most=st.integers(1, 6))
def test_padding_adds_pages_of_others_and_nothing_else(tmp_path_factory, counts, most):
    folder = tmp_path_factory.mktemp("corpus")
    write(folder, {f"d{k}": count for k, count in enumerate(counts)})
    plain = load_corpus(folder)
    padded = pad(plain, most)
    pd.testing.assert_frame_equal(padded.questions, plain.questions)
    for name, own in zip(plain.documents["doc_name"], counts, strict=True):
        rows = list(padded.rows(name))
        assert rows[:own] == list(plain.rows(name))
        assert len(rows) == len(set(rows)) <= max(own, most)
        assert not set(rows[own:]) & set(plain.rows(name))


def test_the_named_hard_negatives_come_first_and_no_answer_is_among_them(folders):
    corpus = load_corpus(folders / "one")
    extra = [{"hard_negatives": [("c", 1), ("b", 2), ("c", 0)], "other_positives": [("b", 2)]}, {}, {}]
    corpus = replace(corpus, questions=corpus.questions.assign(extra=extra))
    assert list(pad(corpus, 3).rows("a")) == [corpus.rows("a")[0], corpus.rows("c")[1], corpus.rows("c")[0]]
    for count in range(2, 7):
        assert corpus.rows("b")[2] not in pad(corpus, count).rows("a")


def test_a_part_without_text_does_not_hide_the_text_of_the_others(folders):
    table = pq.read_table(folders / "two" / PAGES)
    pq.write_table(table.drop_columns(["ocr_text"]), folders / "bare.parquet")
    pages = PageStore(folders / "bare.parquet", needed=("doc_name", "image_binary"))
    one, two = load_corpus(folders / "one"), replace(load_corpus(folders / "two"), store=pages)
    both = join({"one": one, "two": two}, folders)
    assert both.page_text("one/b", 2) == one.page_text("b", 2) != ""
    assert both.page_text("two/a", 3) == ""
    assert not both.has_texts()
    with pytest.raises(CorpusError, match="have no text"):
        retrieve(both, "bm25")


def test_hard_negatives_may_be_spelled_otherwise(folders):
    corpus = load_corpus(folders / "one")
    extra = [{"hard_negatives": [["B.pdf", 1]]}, {}, {}]
    padded = pad(replace(corpus, questions=corpus.questions.assign(extra=extra)), 2)
    assert list(padded.rows("a")) == [corpus.rows("a")[0], corpus.rows("b")[1]]


def test_padding_is_no_annotation_and_is_added_once(folders):
    corpus = load_corpus(folders / "one")
    extra = [known | {"padding": [5]} for known in corpus.documents["extra"]]
    assert list(replace(corpus, documents=corpus.documents.assign(extra=extra)).rows("a")) == [0]
    with pytest.raises(CorpusError, match="is padded already"):
        pad(pad(corpus, 4), 5)


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        ([["b", -1]], "names page -1 of 'b', which has 3 pages"),
        ([["b", 9]], "names page 9 of 'b'"),
        ([["nowhere", 0]], "has no document 'nowhere'"),
        (["b"], "is no list of pairs"),
        ([{"doc_name": "b", "page_id": 1}], "is no list of pairs"),
    ],
)
def test_hard_negatives_that_are_no_pages_are_named(folders, negatives, message):
    corpus = load_corpus(folders / "one")
    extra = [{"hard_negatives": negatives}, {}, {}]
    with pytest.raises(CorpusError, match=message):
        pad(replace(corpus, questions=corpus.questions.assign(extra=extra)), 3)


def test_the_offline_teacher_explains_the_pages_that_a_document_was_given():
    corpus = load_corpus("data/mini/corpus", "sft", pad_to=12)
    question = next(q for _, q in corpus.questions.iterrows() if corpus.padding.get(q["doc_name"]))
    teacher, row = evidence_teacher(corpus), corpus.padding[question["doc_name"]][-1]
    [owner] = [
        n for n in corpus.documents["doc_name"] if row in corpus.rows(n) and row not in corpus.padding.get(n, ())
    ]
    content = corpus.documents.set_index("doc_name")["extra"][owner]["pages"][list(corpus.rows(owner)).index(row)]
    said = teacher.explain(question, 11, positive=False)
    assert said.startswith(f"a {content['kind']} with ")
    assert all(word in said for word in (*content["entities"], *content["measures"], *content["years"]))
