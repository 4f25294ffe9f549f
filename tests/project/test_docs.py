"""The documents: what they show as an example of a format is one."""

import json
import re
from pathlib import Path

import pytest

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.corpus.rankings import read_trec
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.traces.formats import OWN

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCKS = re.findall(
    r"^```(\w*)\n(.*?)^```$", (DOCS / "formats.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
FULL, SHORTEST, TRACE = [json.loads(text) for language, text in BLOCKS if language == "json"]
(RUN,) = [text for language, text in BLOCKS if not language]


@pytest.mark.parametrize("line", [FULL, SHORTEST], ids=["full", "shortest"])
def test_an_annotation_in_the_formats_page_makes_a_corpus(line, tmp_path):
    """Twelve pages, as its `page_indices` say."""
    pages = [{"doc_name": "report.pdf", "image_binary": b"x"}] * 12
    write_corpus(tmp_path, [line], pages)
    corpus = load_corpus(tmp_path)
    assert corpus.questions["question_id"].tolist() == ["report.pdf:q0"]
    assert corpus.questions["gold_pages"].tolist() == [line["questions"][0]["page_id"]]


def test_the_run_in_the_formats_page_can_be_read(tmp_path):
    write_corpus(tmp_path, [FULL], [{"doc_name": "report.pdf", "image_binary": b"x"}] * 12)
    (tmp_path / "run.trec").write_text(RUN)
    assert read_trec(tmp_path / "run.trec", load_corpus(tmp_path)).pages == {"report.pdf:q0": [6, 9]}


def test_the_trace_in_the_formats_page_has_the_fields_of_one():
    assert list(TRACE) == ["messages", "images", *OWN]
    assert [message["role"] for message in TRACE["messages"]] == ["system", "user", "assistant"]
    assert [TRACE["candidates"][k - 1] for k in TRACE["positive_ids"]] == [6]
