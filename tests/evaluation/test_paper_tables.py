"""The paper's tables from run files: figures by hand on a corpus of two questions."""

import json
import math
import re

import pytest

from mmr5_lab.cli import main
from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import Rankings, RankingsError, write_trec
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.evaluation.paper_tables import (
    CEILING,
    RERANKERS,
    as_html,
    as_latex,
    as_text,
    find_runs,
    gains,
    paper_results,
    paper_tables,
    run_name,
)


@pytest.fixture
def corpus(tmp_path):
    """Laws: a question with gold page 0; News: one with gold pages 0 and 1."""

    def document(name, domain, gold):
        asked = {"Q": "What?", "A": "", "page_id": gold, "type": "text-only", "layout_mapping": []}
        return {"doc_name": name, "domain": domain, "questions": [asked]}

    write_corpus(
        tmp_path / "corpus",
        [document("a.pdf", "Laws", [0]), document("b.pdf", "News", [0, 1])],
        [{"doc_name": name, "image_binary": b"x"} for name in ("a.pdf", "b.pdf") for _ in range(4)],
    )
    return load_corpus(tmp_path / "corpus")


@pytest.fixture
def folder(corpus, tmp_path):
    """ColQwen (wrong, right), MM-R5 on it (right, right), and a run of our own."""
    runs = {"colqwen": ([1, 0], [0, 1]), "colqwen_mm-r5": ([0, 1], [0, 1]), "mine <b>": ([1, 0], [2, 3])}
    for name, (a, b) in runs.items():
        write_trec(Rankings({"a.pdf:q0": a, "b.pdf:q0": b}), corpus, tmp_path / "runs" / "deep" / f"{name}.trec")
    return tmp_path / "runs"


def test_every_row_of_the_paper_has_a_name_of_its_own():
    paper = paper_results()
    assert len(paper) == 20
    names = [run_name(a, b) for a, b in zip(paper["first_stage"], paper["method"], strict=True)]
    assert len(set(names)) == 19  # ColQwen + MM-R5 is in both tables
    assert names[3:5] + names[-2:] == ["gme", "colqwen", "gme_mm-r5", "colqwen_mm-r5"]
    assert set(paper["method"]) - set(RERANKERS) == {"retriever only", "RagVL"}


def test_our_figures_the_papers_and_the_difference(corpus, folder):
    tables = paper_tables(find_runs([folder]), corpus)
    assert list(tables) == ["main", "retrievers", "other"]
    assert tables["main"].shape[0] == 15 + 1
    row = tables["main"].loc["ColQwen"]
    # Laws 0, News 1/2 at rank 1
    assert row[["macro R@1", "macro_ex_news R@1", "micro R@1", "micro R@3"]].tolist() == [0.25, 0, 0.25, 1]
    assert (row["paper macro R@1"], row["paper micro R@5"]) == (0.6481, 0.8667)
    assert row["Δ macro R@1"] == pytest.approx(0.25 - 0.6481)
    for table in ("main", "retrievers"):
        assert tables[table].loc["ColQwen + MM-R5", "micro R@1"] == 0.75
        assert tables[table].loc[CEILING, ["micro R@1", "micro R@3"]].tolist() == [0.75, 1]
    missing = tables["main"].loc["CLIP"]
    assert math.isnan(missing["micro R@1"])
    assert math.isnan(missing["Δ micro R@1"])
    assert missing["paper micro R@1"] == 0.3227
    assert tables["other"].loc["mine <b>", ["macro R@1", "macro R@3"]].tolist() == [0, 0.5]


def test_runs_of_the_inference_notebook_are_rows_and_seeds_are_averaged(corpus, tmp_path):
    """Of ColQwen .25 alone; MM-R5 with one seed .75, with the other .25."""
    right, wrong = (
        Rankings({"a.pdf:q0": [0, 1], "b.pdf:q0": [0, 1]}),
        Rankings({"a.pdf:q0": [1, 0], "b.pdf:q0": [0, 1]}),
    )
    for seed, ranked in enumerate((right, wrong)):
        folder = tmp_path / "04_inference" / str(seed)
        write_trec(wrong, corpus, folder / "retriever.trec")
        write_trec(ranked, corpus, folder / "SFT + RL.trec")
        (folder / "results.json").write_text(json.dumps({"retriever": "colqwen", "asked": "reason"}))
    files = find_runs([tmp_path / "04_inference"])
    assert {name: len(paths) for name, paths in files.items()} == {"colqwen_mm-r5": 2, "colqwen": 1}
    table = paper_tables(files, corpus)["main"]
    assert table.loc[["ColQwen", "ColQwen + MM-R5"], "micro R@1"].tolist() == [0.25, 0.5]
    [compared] = gains(files, corpus)
    assert compared.loc["colqwen_mm-r5", ["seeds", "difference"]].tolist() == [2, 0.25]
    assert "colqwen_mm-r5" in as_text(paper_tables(files, corpus), corpus, [compared])
    for seed, candidates in enumerate((5, 10)):
        parameters = {"SEED": seed, "GRPO_RUN": f"runs/03_grpo/{seed}", "NUM_CANDIDATES": candidates, "MODE": "reason"}
        (tmp_path / f"04_inference/{seed}/manifest.json").write_text(json.dumps({"parameters": parameters}))
    with pytest.raises(
        RankingsError, match=r"are of one row, but differ in NUM_CANDIDATES: give the runs of one sweep"
    ):
        find_runs([tmp_path / "04_inference"])
    (folder / "results.json").write_text(json.dumps({"retriever": "BM25", "asked": "reason text"}))
    assert "bm25_sft + rl reason text" in find_runs([folder]), "a way to ask that the paper has not"


def test_shown_as_text_html_and_latex(corpus, folder):
    tables = paper_tables(find_runs([folder]), corpus)
    text = as_text(tables, corpus)
    assert re.search(r"\nColQwen +0\.2500 +0\.6481 +-0\.3981 +1\.0000 +0\.8331 +\+0\.1669 ", text)
    assert re.search(r"\nCLIP +– +0\.3334 +– ", text)
    assert "1658 questions, ours of another set of 2" in text
    page = as_html(tables, corpus)
    assert '<th scope="row">ColQwen</th><td>0.2500</td><td>0.6481</td><td>-0.3981</td>' in page
    assert "mine &lt;b&gt;" in page
    assert "<b>" not in page
    assert r"mine \textless{}b\textgreater{} & 0.0000 & 0.5000 & 0.5000 \\" in as_latex(tables, corpus)


def test_runs_are_found_in_files_and_folders(folder, tmp_path):
    file = folder / "deep" / "colqwen.trec"
    assert list(find_runs([file])) == ["colqwen"]
    assert len(find_runs([folder, file])) == 3  # the same file twice is one run
    (tmp_path / "ColQwen.trec").write_text("")
    with pytest.raises(RankingsError, match="have the same name: give the one that is meant"):
        find_runs([folder, tmp_path / "ColQwen.trec"])
    with pytest.raises(RankingsError, match="nowhere does not exist"):
        find_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RankingsError, match=r"no \.trec files in .*empty: write some with mmr5 retrieve"):
        find_runs([tmp_path / "empty"])


def test_runs_that_do_not_fit_are_named(corpus, tmp_path):
    part = tmp_path / "gme.trec"
    part.write_text("a.pdf:q0 Q0 a.pdf:1 1 1.0 x\n")
    with pytest.raises(ValueError, match=r"gme\.trec: the run lacks questions of the corpus: b\.pdf:q0"):
        paper_tables({"gme": [part]}, corpus)
    part.write_text("a.pdf:q0 Q0 a.pdf:1 1 nan x\n")
    with pytest.raises(RankingsError, match=r"gme\.trec, line 1"):
        paper_tables({"gme": [part]}, corpus)


def test_command_line(corpus, folder, tmp_path, capsys):
    out = [str(tmp_path / "t.html"), str(tmp_path / "t.tex")]
    assert main(["tables", str(corpus.folder), str(folder), "--html", out[0], "--latex", out[1]]) == 0
    assert "main, macro without News\n" in capsys.readouterr().out
    assert (tmp_path / "t.html").read_text().count("<table") == 3 * 3 + 1
    assert r"\toprule" in (tmp_path / "t.tex").read_text()
    assert main(["tables", str(corpus.folder), str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
