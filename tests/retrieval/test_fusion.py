"""Reciprocal rank fusion, by hand."""

import pytest

from mmr5_lab.cli import main
from mmr5_lab.corpus.rankings import Rankings, read_trec, write_trec
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.retrieval.fusion import fuse
from mmr5_lab.retrieval.retrieve import retrieve


def test_a_page_that_both_rank_well_comes_first():
    """Page 4 is second twice: 2/62 = .0323; pages 1 and 7 are first once: 1/61 = .0164; 9 is third once."""
    fused = fuse([Rankings({"q": [7, 4]}), Rankings({"q": [1, 4, 9]})])
    assert fused.pages == {"q": [4, 1, 7, 9]}  # 1 and 7 tie, in page order
    assert fused.scores["q"] == pytest.approx([2 / 62, 1 / 61, 1 / 61, 1 / 63])


def test_weights_and_questions_of_one_run_alone():
    fused = fuse([Rankings({"q": [7, 4]}), Rankings({"q": [4, 7], "r": [2]})], weights=[2, 1], top_k=1)
    assert fused.pages == {"q": [7], "r": [2]}
    assert fused.scores["q"] == pytest.approx([2 / 61 + 1 / 62])


@pytest.mark.parametrize(("runs", "weights"), [(0, None), (2, [1.0]), (1, [0.0]), (1, [-1.0])])
def test_weights_that_fit_no_runs_are_refused(runs, weights):
    with pytest.raises(ValueError, match="one weight above 0 for each run"):
        fuse([Rankings({"q": [1]})] * runs, weights)


def test_the_command_writes_a_run(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", 3, {"dev": (2, 6)})
    bm25 = retrieve(corpus, "bm25", top_k=6)
    backwards = Rankings({q: pages[::-1] for q, pages in bm25.pages.items()})
    for name, run in (("a", bm25), ("b", backwards)):
        write_trec(run, corpus, tmp_path / f"{name}.trec")
    files = [str(tmp_path / f"{name}.trec") for name in ("a", "b", "out")]
    assert main(["fuse", str(tmp_path / "corpus"), *files[:2], "--weights", "3", "1", "--out", files[2]]) == 0
    assert read_trec(files[2], corpus).pages == fuse([bm25, backwards], [3, 1], 10).pages
    assert f"{len(bm25.pages)} questions" in capsys.readouterr().out
