"""One question to a corpus, in Python and from the command line, with a real model and with a known one."""

import json
import re

import pandas as pd
import pytest

from mmr5_lab.cli import main
from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.evaluation.tradeoffs import compare_modes
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.reranking.ranking import Ranker, Ranking
from mmr5_lab.reranking.strategies import Consensus, Windows
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.views.ask import as_text, ask, write_page

EVIL = "<script>alert(1)</script> \x1b[31m \u202egnp"


class Last(Ranker):
    """Puts the last page first and says something of two images."""

    def rank_each(self, pairs, mode="reason", batch_size=16):
        for i, (_, pages) in enumerate(pairs):
            n = len(pages)
            think = f"Image 1: {EVIL}\nImage {n} answers."
            yield i, Ranking([n - 1, *range(n - 1)], think, f"<think>{think}", frozenset({"truncated"}), None, 5, 0.1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), seed=5, splits={"eval": (2, 3)})


def test_pages_come_with_what_was_said_of_them(corpus):
    question = corpus.questions["question"][0]
    answer = ask(corpus, question, Last(), candidates=4)
    assert len(answer.pages) == 4
    assert answer.pages == [answer.candidates[3], *answer.candidates[:3]]
    assert answer.reasons == ["Image 4 answers.", EVIL, "", ""]


def test_one_document_may_be_asked(corpus):
    answer = ask(corpus, "staff", Last(), document="eval-001", candidates=3)
    assert {name for name, _ in answer.pages} == {"eval-001"}
    with pytest.raises(CorpusError, match="has no document 'eval-9'"):
        ask(corpus, "staff", Last(), document="eval-9")
    with pytest.raises(ValueError, match="the question is empty"):
        ask(corpus, "  ", Last())


def test_windows_keep_reasons_with_their_pages(corpus):
    answer = ask(corpus, corpus.questions["question"][0], Windows(Last(), 2, 1), candidates=4)
    assert answer.ranking.order == [3, 0, 1, 2]
    assert answer.reasons == ["Image 2 answers.", EVIL, "", ""], "image 2 of the last window was candidate 4"


def test_a_bad_page_is_named_by_its_place_before_the_first_window(tiny_model):
    from PIL import Image

    from mmr5_lab.reranking.local import Reranker
    from mmr5_lab.reranking.strategies import Consensus

    pages = [b"not a page", *[Image.new("RGB", (140, 168))] * 7]
    wide = Consensus(Windows(Reranker.from_pretrained(tiny_model), 4, 2), 2)
    with pytest.raises(ValueError, match=r"pair 1 .'q'., page 0 is not a readable image"):
        wide.rank_many([("p", pages[1:]), ("q", pages)], "score")


def test_what_a_model_wrote_is_text_everywhere(corpus, tmp_path):
    answer = ask(corpus, EVIL + " staff", Last(), candidates=2)
    printed = as_text(answer)
    assert "\\x1b[31m \\u202egnp" in printed
    assert "faults: truncated" in printed
    page = write_page(answer, corpus, tmp_path / "ask.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3, "in the question, a reason and the text as written"
    assert not re.search("[\x1b\u202e]", page)
    assert page.count('src="data:image/jpeg;base64,') == 2


def test_a_corpus_without_words_is_refused_where_a_choice_is_needed(tmp_path):
    made = make_corpus(tmp_path, seed=6, splits={"eval": (1, 2)})
    pages = pd.read_parquet(tmp_path / "MMDocIR_pages.parquet").assign(ocr_text="")
    pages.to_parquet(tmp_path / "MMDocIR_pages.parquet", row_group_size=8)
    blank = load_corpus(tmp_path)
    total = made.num_pages("eval-000")
    with pytest.raises(CorpusError, match=f"has {total} pages and no words"):
        ask(blank, "staff", Last(), candidates=total - 1)
    assert len(ask(blank, "staff", Last(), candidates=total).pages) == total


def test_ask_from_the_command_line(corpus, tiny_model, tmp_path, capsys):
    out = tmp_path / "answer.html"
    arguments = ["ask", str(corpus.folder), "What was the staff of Orion?", "--model", str(tiny_model), "--mode"]
    assert main([*arguments, "direct", "--out", str(out), "--shuffles", "2", "--window", "3"]) == 0
    assert len(re.findall(r"^[1-5]\. eval-00[01], page ", capsys.readouterr().out, re.MULTILINE)) == 5
    assert out.read_text().count("<li>") == 5


def test_rerank_from_the_command_line_resumes_and_refuses_other_settings(corpus, tiny_model, tmp_path, capsys):
    run, out = str(tmp_path / "bm25.trec"), tmp_path / "out.trec"
    assert main(["retrieve", str(corpus.folder), "--out", run]) == 0
    command = ["rerank", str(corpus.folder), run, "--model", str(tiny_model), "--out", str(out), "--mode", "score"]
    assert main([*command, "--candidates", "4"]) == 0
    assert "6 questions, 100.0% of the answers without a fault" in capsys.readouterr().out
    rows = (tmp_path / "out.jsonl").read_text().splitlines()
    (tmp_path / "out.jsonl").write_text("\n".join([*rows[:2], rows[2][:30]]))  # killed while writing the third
    assert main([*command, "--candidates", "4"]) == 0
    again = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["pages"] for row in again] == [json.loads(row)["pages"] for row in rows]
    assert [row["seconds"] for row in again][:2] == [json.loads(row)["seconds"] for row in rows][:2], "kept"
    assert len(pd.read_parquet(tmp_path / "out.generations.parquet")) == 6

    assert main([*command, "--candidates", "3"]) == 0, "other candidates are ranked anew"
    assert {len(order) for order in pd.read_parquet(tmp_path / "out.generations.parquet")["order"]} == {3}
    capsys.readouterr()
    assert main([*command[:-1], "direct"]) == 2
    assert "made with other settings (mode 'score', now 'direct')" in capsys.readouterr().err


def test_parts_of_a_run_joined_are_the_whole_run(corpus, tiny_model, tmp_path, capsys):
    """As on several GPUs, a process each; 6 questions in 4 parts."""
    run = str(tmp_path / "bm25.trec")
    assert main(["retrieve", str(corpus.folder), "--out", run]) == 0
    command = ["rerank", str(corpus.folder), run, "--model", str(tiny_model), "--mode", "direct", "--candidates", "3"]
    assert main([*command, "--out", str(tmp_path / "whole.trec")]) == 0
    for k in range(1, 5):
        assert main([*command, "--shard", f"{k}/4", "--out", str(tmp_path / f"part{k}.trec")]) == 0
    parts = [(tmp_path / f"part{k}.trec").read_text() for k in range(1, 5)]
    assert all(parts)
    assert "".join(parts) == (tmp_path / "whole.trec").read_text()
    assert main([*command, "--shard", "1/7", "--out", str(tmp_path / "part.trec")]) == 2
    assert "6 questions: too few for 7 parts" in capsys.readouterr().err


def test_rerank_without_a_model_is_bad_input(corpus, tmp_path, capsys):
    assert main(["rerank", str(corpus.folder), "x.trec", "--out", str(tmp_path / "o.trec")]) == 2
    assert "Name it with --model" in capsys.readouterr().err


def test_ways_to_rank_are_compared_on_the_same_questions(corpus):
    run = retrieve(corpus, "bm25", top_k=3)
    gold = dict(zip(corpus.questions["question_id"], corpus.questions["gold_pages"], strict=True))
    table = compare_modes({"last": (Last(), "reason"), "twice": (Consensus(Last(), 2), "reason")}, corpus, run)
    expected = [len({pages[-1]} & set(gold[q])) / len(gold[q]) for q, pages in run.pages.items()]
    assert table.loc["last", "R@1"] == pytest.approx(sum(expected) / len(expected))
    assert pd.isna(table.loc["last", "stability"])
    assert -1 <= table.loc["twice", "stability"] <= 1
    assert (table["seconds a query"] > 0).all()
