"""MMDocIR's training subsets, in files of the published form; and fetching without a network."""

import io
import json
import logging
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmr5_lab.corpus import mmdocir
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.mmdocir import SUBSETS, fetch, load_training_subset

LAYOUT = pa.struct([("type", pa.string()), ("bbox", pa.list_(pa.float64()))])
SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("page", pa.int64()),
        ("image", pa.binary()),
        ("page_size", pa.list_(pa.float64())),
        ("layouts", pa.list_(LAYOUT)),
        ("domain", pa.string()),
    ]
)


def picture(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 10), grey).save(buffer, "PNG")
    return buffer.getvalue()


def page(name: str, number: int, grey: int) -> dict:
    layouts = [{"type": "text", "bbox": [0.0, 0.0, 4.0, 5.0]}]
    return {"file_name": name, "page": number, "image": picture(grey), "page_size": [8.0, 10.0], "layouts": layouts}


def passage(name: str, number: int) -> dict:
    return {"doc_name": name, "page_id": number}


def query(text: str, positives: list, negatives: list, **more) -> dict:
    return {"query_id": text, "query": text, "positive_passages": positives, "negative_passages": negatives} | more


def write(folder, stem: str, pages: list[dict], queries: list[dict], group: int = 2) -> None:
    for name in ("parquet", "annotations_top1_negative"):
        (folder / name).mkdir(exist_ok=True)
    table = pa.Table.from_pylist(pages, SCHEMA)
    pq.write_table(table, folder / "parquet" / f"{stem}_filter.parquet", row_group_size=group)
    lines = "".join(json.dumps(record) + "\n" for record in queries)
    (folder / "annotations_top1_negative" / f"{stem}_train.jsonl").write_text(lines)


@pytest.fixture
def folder(tmp_path):
    """b's pages stand apart and are numbered from 1; a question is there twice, one asks for a page that is not."""
    write(
        tmp_path,
        "DUDE_long",
        [page("b", 2, 22), page("a", 0, 10), page("b", 1, 21), page("a", 1, 11), page("b", 3, 23)],
        [
            query("Second of b?", [passage("b", 2)], [passage("b", 1)]),
            query("Both of a?", [passage("a", 1), passage("a", 0)], [passage("b", 1)]),
            query("Second of b?", [passage("b", 2)], [passage("b", 1)]),
            query(" Last of b, and a? ", [passage("b", 3), passage("a", 0)], [passage("c", 1)]),
            query("Nowhere?", [passage("b", 9)], [passage("b", 1)]),
        ],
    )
    return tmp_path


def test_a_subset_is_a_corpus(folder, caplog):
    with caplog.at_level(logging.WARNING):
        corpus = load_training_subset(folder, "DUDE")
    assert corpus.documents[["doc_name", "domain", "split", "num_pages"]].to_numpy().tolist() == [
        ["a", "DUDE", "train", 2],
        ["b", "DUDE", "train", 3],
    ]
    frame = corpus.questions
    assert frame["question_id"].tolist() == ["b:q0", "a:q0", "b:q1"]
    assert frame["question"].tolist() == ["Second of b?", "Both of a?", "Last of b, and a?"]
    assert frame["gold_pages"].tolist() == [[1], [0, 1], [2]]  # pages count from 0, whatever the file says
    assert frame["extra"][0] == {"query_id": "Second of b?", "hard_negatives": [("b", 0)]}
    assert frame["extra"][2]["other_positives"] == [("a", 0)]
    assert "1 questions of DUDE name pages" in caplog.text
    assert "1 hard negatives of DUDE are pages that" in caplog.text
    assert frame["extra"][2]["hard_negatives"] == []
    assert "line 5" in caplog.text


def test_pages_are_found_wherever_their_rows_stand(folder):
    corpus = load_training_subset(folder, "DUDE")
    greys = [corpus.page_image("b", number).getpixel((0, 0))[0] for number in range(3)]
    assert greys == [21, 22, 23]
    assert corpus.page_image("a", 1).getpixel((0, 0))[0] == 11
    assert corpus.page_text("a", 0) == ""
    with pytest.raises(CorpusError, match="lacks the column vlm_text"):
        corpus.page_text("a", 0, "vlm_text")


def test_images_may_be_kept_as_the_datasets_library_does(tmp_path):
    write(tmp_path, "SciQAG", [page("a", 0, 40)], [query("?", [passage("a", 0)], [])])
    path = tmp_path / "parquet" / "SciQAG_filter.parquet"
    rows = [{"file_name": "a", "page": 0, "image": {"bytes": picture(40), "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert load_training_subset(tmp_path, "SciQAG").page_image("a", 0).getpixel((0, 0))[0] == 40


def test_all_seven_subsets_have_names():
    assert set(SUBSETS) == {"ArxivQA", "DUDE", "SciQAG", "SlideVQA", "TAT-DQA", "Wiki-SS", "MP-DocVQA"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": 3}, "query is not a text"),
        (query("?", [], []), "positive_passages is not a list with at least one entry"),
        (query("?", [{"doc_name": "a"}], []), "lacks doc_name or page_id"),
        (query("?", ["a"], []), "lacks doc_name or page_id"),
        (query("?", [passage("a", 0)], ["a"]), "an entry of negative_passages lacks doc_name or page_id"),
    ],
)
def test_a_malformed_question_is_named(tmp_path, record, message):
    write(tmp_path, "SciQAG", [page("a", 0, 1)], [query("?", [passage("a", 0)], []), record])
    with pytest.raises(CorpusError, match=f"SciQAG_train.jsonl, line 2: .*{message}"):
        load_training_subset(tmp_path, "SciQAG")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"does not hold .*Wiki-ss_train.jsonl and .*fetch\('Wiki-SS'\)"):
        load_training_subset(tmp_path, "Wiki-SS")
    with pytest.raises(ValueError, match="unknown training subset 'CUAD'; there is: ArxivQA, DUDE"):
        load_training_subset(tmp_path, "CUAD")
    write(tmp_path, "SciQAG", [page("a", 0, 1), page("a", 0, 2)], [query("?", [passage("a", 0)], [])])
    with pytest.raises(CorpusError, match="has page 0 of 'a' twice"):
        load_training_subset(tmp_path, "SciQAG")
    write(tmp_path, "SciQAG", [page("a", 0, 1)], [query("?", [passage("a", 7)], [])])
    with pytest.raises(CorpusError, match="has no question about a page of"):
        load_training_subset(tmp_path, "SciQAG")


@pytest.mark.parametrize("subset", [None, "DUDE"])
def test_without_a_network_the_command_to_run_elsewhere_is_told(tmp_path, subset):
    """In a process of its own, since the hub's library reads its settings when it is imported."""
    code = f"from mmr5_lab.corpus.mmdocir import fetch; fetch({subset!r}, {str(tmp_path)!r})"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1
    name = mmdocir.EVALUATION if subset is None else mmdocir.TRAINING
    assert f"RuntimeError: {name} is not here and cannot be fetched" in done.stderr
    assert f"hf download {name} --repo-type dataset --local-dir FOLDER" in done.stderr
    with pytest.raises(ValueError, match="unknown training subset"):
        fetch("CUAD")
