"""First-stage retrieval and TREC files, on a corpus small enough to rank by hand."""

import logging
import math
import os
import subprocess
import sys

import ir_measures
import pytest
from ir_measures import R

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import Rankings, RankingsError, read_trec, write_qrels, write_trec
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.retrieval.bm25 import bm25_scores, content_words
from mmr5_lab.retrieval.retrieve import retrieve


def question(text: str, gold: list[int]) -> dict:
    return {"Q": text, "A": "", "page_id": gold, "type": "text-only", "layout_mapping": []}


@pytest.fixture
def corpus(tmp_path):
    """`a b.pdf` with questions q0 (gold 2), q1 (gold 0, 3); `scan.pdf`, without words, with q0 (gold 1)."""
    texts = ["the market", "a map of rivers", "Rivers, rivers: the long river", "tax 2021"]
    pages = [{"doc_name": "a b.pdf", "image_binary": b"x", "ocr_text": text} for text in texts]
    pages += [{"doc_name": "scan.pdf", "image_binary": b"x", "ocr_text": text} for text in ("", " \n", ".")]
    annotations = [
        {
            "doc_name": "a b.pdf",
            "domain": "Guidebook",
            "questions": [question("Which RIVERS are long?", [2]), question("What is it?", [0, 3])],
        },
        {"doc_name": "scan.pdf", "domain": "Brochure", "questions": [question("The river?", [1])]},
    ]
    write_corpus(tmp_path / "corpus", annotations, pages)
    return load_corpus(tmp_path / "corpus")


def test_bm25_ranks_pages_of_the_questions_own_document(corpus):
    run = retrieve(corpus)
    # page 2 holds "rivers" twice and "long", page 1 "rivers" once; the others score 0 and are in page order
    assert run.pages["a%20b.pdf:q0"] == [2, 1, 0, 3]
    # "what" is on no page, "is" and "it" are stop words: page order
    assert run.pages["a%20b.pdf:q1"] == [0, 1, 2, 3]
    assert run.scores["a%20b.pdf:q1"] == [0, 0, 0, 0]
    assert list(run.pages) == corpus.questions["question_id"].tolist()


def test_bm25_is_the_written_formula():
    """Texts of 2 and 1 words, both query words in text 0 only, k1 = 1.5 and b = .75."""
    [row] = bm25_scores(["Blue whale", "krill"], ["the blue BLUE fox"])
    idf = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    once = idf * 1 / (1 + 1.5 * (1 - 0.75 + 0.75 * 2 / 1.5))
    assert row.tolist() == pytest.approx([2 * once, 0])  # a word asked twice counts twice


def test_jax_does_not_take_the_gpu(tmp_path):
    """bm25s imports JAX where it is installed, which took 105 of 140 GiB of an H200."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("import os; print('JAX', os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])")
    command = [sys.executable, "-c", "import mmr5_lab.retrieval.bm25"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XLA")}
    given = {"env": environment | {"PYTHONPATH": str(tmp_path)}, "capture_output": True, "text": True}
    assert "JAX false" in subprocess.run(command, check=True, **given).stdout


def test_stopwords_do_not_count():
    assert bm25_scores(["the of"], ["the"]) is None  # nothing left to index
    [row] = bm25_scores(["the of", "whale"], ["the whale"])
    assert (row > 0).tolist() == [False, True]


@pytest.mark.parametrize(
    ("texts", "query", "best"),
    [
        (["売上高は増加した。", "従業員は減少した。", "2015年の売上"], "従業員の数は？", 1),
        (["第一章 概论", "检索增强生成的方法", "结论"], "什么是检索增强", 1),
        (["ราคาสินค้าเพิ่มขึ้น", "พนักงานใหม่", "สรุป"], "พนักงานกี่คน", 1),
        (["가격이 올랐다", "직원이 줄었다"], "직원은 몇 명인가", 1),
        (["हिन्दी भाषा", "अंग्रेज़ी में लेख"], "हिन्दी", 0),
        (["plain", "the ﬁnal ﬁgures"], "final figures", 1),  # ligatures, as PDFs have them
        (["plain", "cafe\u0301 au lait"], "CAFÉ", 1),
        (["plain", "ＡＢＣ 株式会社"], "abc", 1),  # full width
        (["猫", "犬"], "犬", 1),
    ],
)
def test_bm25_matches_in_any_script(texts, query, best):
    [row] = bm25_scores(texts, [query])
    assert row.argmax() == best
    assert row[best] > 0


def test_words_are_pairs_of_characters_where_a_script_has_no_spaces():
    assert content_words(["2015年の売上高"]) == [["2015", "年の", "の売", "売上", "上高"]]
    assert content_words(["Don't STOP_it the Übergröße"]) == [["don", "t", "stop_it", "übergrösse"]]
    assert content_words(["the whale", ""], []) == [["the", "whale"], []]


def test_questions_without_a_match_are_told(corpus, caplog):
    run = retrieve(corpus)
    assert run.unmatched == ["a%20b.pdf:q1", "scan.pdf:q0"]
    assert "1 questions have no match" in caplog.text
    assert "in page order: a%20b.pdf:q1" in caplog.text  # that of scan.pdf is told as of a document without words


def test_top_k_cuts_the_ranking(corpus):
    assert retrieve(corpus, top_k=2).pages["a%20b.pdf:q0"] == [2, 1]
    with pytest.raises(ValueError, match="top_k is 0"):
        retrieve(corpus, top_k=0)
    with pytest.raises(ValueError, match="unknown retrieval method 'magic'"):
        retrieve(corpus, method="magic")


def test_a_document_without_words_is_in_page_order_and_says_so(corpus, caplog):
    with caplog.at_level(logging.WARNING):
        run = retrieve(corpus)
    assert run.pages["scan.pdf:q0"] == [0, 1, 2]
    assert "1 documents have no words in ocr_text, their pages are ranked by page order: scan.pdf" in caplog.text


def test_a_run_is_written_in_trec_form_and_read_back(corpus, tmp_path):
    run = Rankings(
        {"a%20b.pdf:q0": [2, 0, 3], "scan.pdf:q0": [1]},
        {"a%20b.pdf:q0": [1.5, 0.0, 0.0], "scan.pdf:q0": [7.0]},
    )
    write_trec(run, corpus, tmp_path / "runs" / "bm25.trec", tag="bm25")
    # the tie is broken by a small step: other tools sort by score
    assert (tmp_path / "runs" / "bm25.trec").read_text() == (
        "a%20b.pdf:q0 Q0 a%20b.pdf:2 1 1.50000 bm25\n"
        "a%20b.pdf:q0 Q0 a%20b.pdf:0 2 0.00000 bm25\n"
        "a%20b.pdf:q0 Q0 a%20b.pdf:3 3 -0.00001 bm25\n"
        "scan.pdf:q0 Q0 scan.pdf:1 1 7.00000 bm25\n"
    )
    again = read_trec(tmp_path / "runs" / "bm25.trec", corpus)
    assert again.pages == run.pages
    assert again.scores == {"a%20b.pdf:q0": [1.5, 0.0, -1e-5], "scan.pdf:q0": [7.0]}


def test_a_run_without_scores_keeps_its_order(corpus, tmp_path):
    run = Rankings({"a%20b.pdf:q0": [3, 1, 0, 2]})
    write_trec(run, corpus, tmp_path / "run")
    assert (tmp_path / "run").read_text().splitlines()[2] == "a%20b.pdf:q0 Q0 a%20b.pdf:0 3 0.33333 mmr5"
    assert read_trec(tmp_path / "run", corpus).pages == run.pages


def test_scores_order_a_run_and_ranks_break_ties(corpus, tmp_path):
    (tmp_path / "run").write_text(
        "scan.pdf:q0 Q0 scan.pdf:0 3 1.0 x\nscan.pdf:q0 Q0 scan.pdf:1 2 1.0 x\n\nscan.pdf:q0 Q0 scan.pdf:2 1 9e1 x\n"
    )
    assert read_trec(tmp_path / "run", corpus).pages == {"scan.pdf:q0": [2, 1, 0]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("scan.pdf:q0 Q0 scan.pdf:1 1 1.0", "not `question Q0 .* but 'scan.pdf:q0 Q0 .*; write the run again"),
        ("scan.pdf:q0 Q0 scan.pdf:1 first 1.0 x", "not .* with an integer rank and a finite score"),
        ("scan.pdf:q0 Q0 scan.pdf:1 1 high x", "not .* with an integer rank and a finite score"),
        ("scan.pdf:q0 Q0 scan.pdf:1 1 nan x", "not .* with an integer rank and a finite score"),
        ("scan.pdf:q9 Q0 scan.pdf:1 1 1.0 x", "the corpus has no question 'scan.pdf:q9'; read the run with the corpus"),
        ("scan.pdf:q0 Q0 scan.pdf 1 1.0 x", "'scan.pdf' is not a page id"),
        ("scan.pdf:q0 Q0 scan.pdf:3 1 1.0 x", "'scan.pdf' has no page 3, only 0 to 2; read the run with the corpus"),
        ("scan.pdf:q0 Q0 a%20b.pdf:1 1 1.0 x", "'a%20b.pdf:1' is not of the question's document .*; read the run"),
        (
            "scan.pdf:q0 Q0 scan.pdf:0 2 0.5 x",
            "page 'scan.pdf:0' is listed twice for question .*; keep its better",
        ),
    ],
)
def test_a_malformed_line_is_named(corpus, tmp_path, line, message):
    (tmp_path / "run").write_text(f"scan.pdf:q0 Q0 scan.pdf:0 1 1.0 x\n{line}\n")
    with pytest.raises(RankingsError, match=f"run, line 2.*{message}"):
        read_trec(tmp_path / "run", corpus)


def test_runs_that_are_missing_or_empty_are_named(corpus, tmp_path):
    with pytest.raises(RankingsError, match="absent does not exist"):
        read_trec(tmp_path / "absent", corpus)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(RankingsError, match="empty holds no rankings; retrieve or rerank again"):
        read_trec(tmp_path / "empty", corpus)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(RankingsError, match="binary is not a text file"):
        read_trec(tmp_path / "binary", corpus)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_run_is_read_in_the_encodings_that_editors_write(corpus, tmp_path, encoding):
    line = "scan.pdf:q0 Q0 scan.pdf:0 1 1.0 x\r\n"
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    (tmp_path / "run").write_bytes((mark + line).encode(encoding))
    assert read_trec(tmp_path / "run", corpus).pages == {"scan.pdf:q0": [0]}


def test_a_run_in_another_encoding_is_told_what_to_do(corpus, tmp_path):
    (tmp_path / "run").write_bytes("scan.pdf:q0 Q0 scan.pdf:0 1 1.0 größe".encode("cp1252"))
    with pytest.raises(RankingsError, match=r"run is not a text file in UTF-8 .*: save it as UTF-8"):
        read_trec(tmp_path / "run", corpus)


def test_a_run_may_spell_names_otherwise(corpus, tmp_path):
    (tmp_path / "run").write_text("A%20B:q0 Q0 A%20b.PDF:2 1 1.0 x\nscan:q0 Q0 scan:1 1 1.0 x\n")
    assert read_trec(tmp_path / "run", corpus).pages == {"a%20b.pdf:q0": [2], "scan.pdf:q0": [1]}


def test_a_run_that_counts_pages_from_1_is_told(corpus, tmp_path):
    lines = [f"a%20b.pdf:q0 Q0 a%20b.pdf:{page} {page} {9 - page} x\n" for page in (1, 2, 3, 4)]
    (tmp_path / "run").write_text("".join(lines))
    with pytest.raises(
        RankingsError, match=r"line 4: 'a b.pdf' has no page 4, only 0 to 3; does the run count .* from 1"
    ):
        read_trec(tmp_path / "run", corpus)
    (tmp_path / "run").write_text("".join(lines).replace(":1 ", ":0 "))
    with pytest.raises(
        RankingsError, match=r"line 4: 'a b.pdf' has no page 4, only 0 to 3; read the run with the corpus"
    ):
        read_trec(tmp_path / "run", corpus)


def test_scores_that_are_not_finite_are_not_written(corpus, tmp_path):
    with pytest.raises(RankingsError, match=r"question 'scan\.pdf:q0' has scores that are not finite: \[1\.0, nan\]"):
        write_trec(Rankings({"scan.pdf:q0": [0, 1]}, {"scan.pdf:q0": [1.0, math.nan]}), corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_the_corpus_is_not_written(corpus, tmp_path):
    (tmp_path / "run").write_text("before")
    with pytest.raises(RankingsError, match=r"no question 'c\.pdf:q0'"):
        write_trec(Rankings({"scan.pdf:q0": [0], "c.pdf:q0": [0]}), corpus, tmp_path / "run")
    with pytest.raises(RankingsError, match="must be one word"):
        write_trec(Rankings({"scan.pdf:q0": [0]}), corpus, tmp_path / "run", tag="two words")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir() if path.is_file()] == [("run", "before")]


def test_other_tools_read_our_files_alike(corpus, tmp_path):
    """ir_measures sorts by score: the ties at 0 must not lose our order, in which page 3 is fourth."""
    write_trec(retrieve(corpus), corpus, tmp_path / "run")
    write_qrels(corpus, tmp_path / "qrels")
    assert (tmp_path / "qrels").read_text().splitlines()[1:] == [
        "a%20b.pdf:q1 0 a%20b.pdf:0 1",
        "a%20b.pdf:q1 0 a%20b.pdf:3 1",
        "scan.pdf:q0 0 scan.pdf:1 1",
    ]
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels")))
    run = list(ir_measures.read_trec_run(str(tmp_path / "run")))
    values = {(m.query_id, str(m.measure)): m.value for m in ir_measures.iter_calc([R @ 1, R @ 3], qrels, run)}
    assert values == {
        ("a%20b.pdf:q0", "R@1"): 1.0,
        ("a%20b.pdf:q0", "R@3"): 1.0,
        ("a%20b.pdf:q1", "R@1"): 0.5,
        ("a%20b.pdf:q1", "R@3"): 0.5,
        ("scan.pdf:q0", "R@1"): 0.0,
        ("scan.pdf:q0", "R@3"): 1.0,
    }


@pytest.mark.parametrize("score", [0.0, -3.5, 500.0, 1e6])
def test_ties_survive_single_precision(corpus, tmp_path, score):
    """trec_eval keeps scores in 32 bits and would put page 2 first, by its name."""
    run = Rankings({"scan.pdf:q0": [1, 0, 2]}, {"scan.pdf:q0": [score] * 3})
    write_trec(run, corpus, tmp_path / "run")
    scores = ir_measures.read_trec_run(str(tmp_path / "run"))
    [value] = ir_measures.iter_calc([R @ 1], [ir_measures.Qrel("scan.pdf:q0", "scan.pdf:1", 1)], scores)
    assert value.value == 1
    assert read_trec(tmp_path / "run", corpus).pages == run.pages


def test_retrieval_is_silent(corpus, capfd):
    retrieve(corpus)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") <= 2  # at most the warnings about a document without words and no match
    assert "%|" not in captured.err
