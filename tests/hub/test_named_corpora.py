"""MMDocIR by name, from a stand-in of the hub: the documented commands, verbatim and without a network."""

import json
import random
import shlex
import subprocess
import sys

import pytest
from hub.stand_in import environment

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.mmdocir import SUBSETS, load_training
from mmr5_lab.corpus.rankings import Rankings
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.mini.documents import DOMAINS, make_document
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.construction import training_candidates, within_quota


@pytest.fixture
def mmr5(hub, tmp_path):
    """Runs a command line of the documents in a new folder."""

    def run(line: str) -> str:
        program, *arguments = shlex.split(line)
        assert program == "mmr5"
        done = subprocess.run(
            [sys.executable, "-m", "mmr5_lab.cli", *arguments],
            cwd=tmp_path, env=environment(hub), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def training_folder(hub):
    [folder] = hub.glob("datasets--MMDocIR--MMDocIR_Train_Dataset/snapshots/*")
    return folder


def test_the_evaluation_set_is_retrieved_reranked_and_evaluated_by_name(mmr5, tmp_path):
    assert (
        mmr5("mmr5 retrieve mmdocir --method bm25 --out bm25.trec") == "bm25.trec: 4 questions, up to 10 pages each\n"
    )
    assert "4 questions" in mmr5(
        "mmr5 rerank mmdocir bm25.trec --model i2vec/MM-R5 --mode score --candidates 3 --out reranked.trec"
    )
    shown = mmr5("mmr5 evaluate mmdocir bm25.trec reranked.trec")
    assert shown.count("of 4 questions") == 2
    assert "ceiling_macro" in shown


def test_two_corpora_are_retrieved_as_one(mmr5, tmp_path):
    """MMDocIR's evaluation set from the hub, and a folder of one's own."""
    write_corpus(tmp_path / "mine", *own_document())
    said = mmr5("mmr5 retrieve 'mmdocir + mine' --method clip --out clip.trec")
    assert said == "clip.trec: 5 questions, up to 10 pages each\n"
    questions = {line.split()[0] for line in (tmp_path / "clip.trec").read_text().splitlines()}
    assert "mine%2Fown.pdf:q0" in questions
    assert "mmdocir%2Fstand%20in%200.pdf:q0" in questions
    assert "of 5 questions" in mmr5("mmr5 evaluate 'mmdocir + mine' clip.trec")
    assert (tmp_path / "runs" / "vectors").is_dir(), "neither corpus's folder is taken for the whole"


def own_document():
    annotation, rows = make_document("own.pdf", next(iter(DOMAINS)), "eval", 1, random.Random(5))
    return [annotation], rows


def test_traces_are_made_of_training_subsets_without_a_text(mmr5, tmp_path):
    """The published training files have images alone, so a retriever looks at them."""
    mmr5("mmr5 retrieve mmdocir-train --method clip --split sft --vectors vectors --out clip.trec")
    mmr5("mmr5 traces mmdocir-train clip.trec --split sft --max-traces 7 --max-per-domain 1 --out traces.jsonl")
    kept = [
        json.loads(line)
        for name in ("traces.jsonl", "traces.rejected.jsonl")
        for line in (tmp_path / name).read_text().splitlines()
    ]
    subsets = [trace["doc_name"].partition("/")[0] for trace in kept]
    assert len(subsets) == len(set(subsets)) > 3


def test_the_training_subsets_are_one_corpus_whose_splits_share_no_document(hub):
    corpus = load_corpus(training_folder(hub))
    sft, rl = corpus.split("sft"), corpus.split("rl")
    assert set(corpus.questions["domain"]) == set(SUBSETS)
    assert len(sft.questions) + len(rl.questions) == len(corpus.questions) == 7 * 4 * 2
    assert set(sft.documents["doc_name"]).isdisjoint(rl.documents["doc_name"])
    assert corpus.questions["question_id"].is_unique
    assert set(corpus.by_id) == {q for q in corpus.questions["question_id"] if "%2F" in q}
    name = corpus.documents["doc_name"].iloc[-1]  # the last row of the last file
    assert corpus.page_image(name, corpus.num_pages(name) - 1).size == (140, 168)
    assert corpus.page_text(name, 0) == ""
    with pytest.raises(CorpusError, match=r"have no text .ocr_text., which bm25 reads"):
        retrieve(corpus, "bm25")


def test_a_quota_takes_as_many_of_each_subset(hub):
    corpus = load_training(training_folder(hub))
    ranking = Rankings({q["question_id"]: [*q["gold_pages"], 0, 1, 2][:3] for _, q in corpus.questions.iterrows()})
    candidates = training_candidates(corpus, ranking, 3)
    assert len(candidates) == 56
    of_quota = within_quota(candidates, 40, per_domain=3)
    counts = [c.question["domain"] for c in of_quota]
    assert {counts.count(subset) for subset in SUBSETS} == {3}
    assert [c.question["domain"] for c in within_quota(candidates, 7, per_domain=3)] == list(SUBSETS)
    assert within_quota(candidates, 5) == candidates[:5]


def test_subsets_that_are_not_there_are_left_out(hub, tmp_path, caplog):
    folder = training_folder(hub)
    for part in ("annotations_top1_negative", "parquet"):
        (tmp_path / part).mkdir()
        for file in (folder / part).glob("SciQAG*"):
            (tmp_path / part / file.name).symlink_to(file)
    assert set(load_corpus(tmp_path, "sft").questions["domain"]) == {"SciQAG"}
    assert "does not hold the training subset MP-DocVQA: it is left out" in caplog.text
    for file in (tmp_path / "parquet").iterdir():
        file.unlink()
    with pytest.raises(CorpusError, match="holds no training subset"):
        load_training(tmp_path)
