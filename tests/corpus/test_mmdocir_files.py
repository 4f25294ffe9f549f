"""MMDocIR itself: its annotations and some of its PDFs, which are not part of the project.

Read from the folder that the environment variable MMR5_SHARED names, or `shared` beside the repository.
"""

import json
import os
from pathlib import Path

import pypdfium2
import pytest
from transformers import Qwen2VLImageProcessor

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.ingest import build_corpus
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.construction import rl_dataset, training_candidates

SHARED = Path(os.environ.get("MMR5_SHARED", Path(__file__).resolve().parents[3] / "shared"))
MMDOCIR = SHARED / "mmdocir"

pytestmark = pytest.mark.skipif(
    not (MMDOCIR / "MMDocIR_annotations.jsonl").is_file(),
    reason=f"MMDocIR's files are not at {MMDOCIR}; set MMR5_SHARED to the folder that holds mmdocir/",
)


def test_the_annotations_are_the_published_set():
    corpus = load_corpus(MMDOCIR)
    questions = corpus.questions
    assert len(corpus.documents) == 313
    assert corpus.documents["num_pages"].sum() == 20_395
    assert len(questions) == 1_658
    assert questions["gold_pages"].map(len).sum() == 2_107
    assert (questions["type"].map(len) == 0).sum() == 17
    assert questions["boxes"].map(len).sum() == 2_638
    assert questions["question_id"].is_unique
    assert not questions["question_id"].str.contains(r"\s").any()
    assert questions["domain"].nunique() == 10
    # words of their own and lists written as text both become words
    assert {kind for kinds in questions["type"] for kind in kinds} == {
        *("text-only", "multimodal-t", "multimodal-f", "meta-data", "una-web"),
        *("Figure", "Table", "Chart", "Pure-text (Plain-text)", "Generalized-text (Layout)"),
    }
    # together the row ranges cover the page file once, which shows that their end is inclusive
    spans = corpus.documents.sort_values("first_row")
    assert (spans["first_row"] + spans["num_pages"]).tolist()[:-1] == spans["first_row"].tolist()[1:]
    with pytest.raises(CorpusError, match=r"MMDocIR_pages\.parquet is missing"):
        corpus.page_image("watch_d.pdf", 0)


def test_the_pdfs_have_as_many_pages_as_annotated():
    corpus = load_corpus(MMDOCIR)
    pdfs = sorted((MMDOCIR / "pdfs").glob("*.pdf"))
    assert len(pdfs) == 12
    counts = {}
    for path in pdfs:
        with pypdfium2.PdfDocument(path) as document:
            counts[path.name] = len(document)
    assert counts == {path.name: corpus.num_pages(path.name) for path in pdfs}
    assert sum(counts.values()) == 330


def test_a_real_pdf_becomes_a_corpus(tmp_path):
    """`watch_d.pdf`: a manual of 27 pages with a text layer and four questions."""
    (tmp_path / "pdfs").mkdir()
    (tmp_path / "pdfs" / "watch_d.pdf").symlink_to(MMDOCIR / "pdfs" / "watch_d.pdf")
    corpus = build_corpus(
        tmp_path / "pdfs", tmp_path / "out", MMDOCIR / "MMDocIR_annotations.jsonl", max_pixels=60_000, ocr="none"
    )
    annotated = load_corpus(MMDOCIR).subset(["watch_d.pdf"])
    assert corpus.questions.to_dict("records") == annotated.questions.to_dict("records")
    assert corpus.num_pages("watch_d.pdf") == 27
    assert corpus.pages["has_text"].all()
    assert "Turn off the screen" in corpus.page_text("watch_d.pdf", 3)
    width, height = corpus.page_image("watch_d.pdf", 3).size
    assert (width, height) == (206, 291)  # A4 within 60,000 pixels
    [report] = json.loads((tmp_path / "out" / "ingest_report.json").read_text())["documents"]
    assert report["pages"] == 27


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    return build_corpus(
        MMDOCIR / "pdfs",
        tmp_path_factory.mktemp("twelve"),
        MMDOCIR / "MMDocIR_annotations.jsonl",
        max_pixels=200_704,
        ocr="none",
    )


def test_prompts_of_real_pages_stay_within_the_pixel_budget(twelve):
    """200,704 pixels are 256 visual tokens of 28 × 28: five pages cannot take more than 1,280."""
    run = retrieve(twelve, "bm25", top_k=5)
    candidates = training_candidates(twelve, run, num_candidates=5)
    assert len(candidates) == 40  # of 68 questions have a right page among BM25's first five
    processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=200_704)
    for row, chosen in zip(rl_dataset(twelve, candidates), candidates, strict=True):
        parts = [part for message in build_messages(chosen.question["question"], 5) for part in message["content"]]
        stored = [part for message in row["prompt"] for part in message["content"]]  # absent keys are None in Arrow
        assert [{k: v for k, v in part.items() if v is not None} for part in stored] == parts
        assert len(row["images"]) == len(chosen.pages) == 5
        grid = processor(images=row["images"], return_tensors="pt")["image_grid_thw"]
        tokens = grid.prod(1) // 4
        assert ((tokens > 200) & (tokens <= 256)).all()
        assert all(chosen.pages[i - 1] in chosen.question["gold_pages"] for i in chosen.positive_ids)
