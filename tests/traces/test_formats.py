"""Traces written for other trainers and read back are the same traces; records of others are taken over."""

import json

import datasets
import pytest

from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.mini.teacher import EvidenceTeacher
from mmr5_lab.prompting.prompts import PROMPT_VERSION, build_messages
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.construction import make_traces, read_traces, sft_dataset, training_candidates
from mmr5_lab.traces.formats import FORMATS, export_traces, import_traces


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    corpus = make_corpus(folder / "corpus", seed=5, splits={"sft": (2, 4)})
    candidates = training_candidates(corpus, retrieve(corpus, top_k=5))
    return make_traces(corpus, candidates, EvidenceTeacher(corpus), folder / "traces.jsonl")


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_exported_comes_back_the_same(path, tmp_path, form):
    out = export_traces(path, tmp_path / "there" / "out", form)
    back = import_traces(out, form, tmp_path / "back" / "traces.jsonl")
    for old, new in zip(read_traces(path), read_traces(back), strict=True):
        files = [(path.parent / a).read_bytes() == (back.parent / b).read_bytes()
                 for a, b in zip(old["images"], new["images"], strict=True)]  # fmt: skip
        assert all(files)
        assert {**new, "images": old["images"]} == old
    assert sft_dataset(back)[0]["completion"] == sft_dataset(path)[0]["completion"]


def test_each_format_has_its_trainer_s_fields(path, tmp_path):
    trace = read_traces(path)[0]
    first = {
        form: json.loads(export_traces(path, tmp_path / form, form).read_text().splitlines()[0])
        for form in ("swift", "vlm-r1", "trl")
    }
    assert [m["role"] for m in first["swift"]["messages"]] == ["system", "user", "assistant"]
    assert first["swift"]["messages"][1]["content"].count("<image>") == len(first["swift"]["images"]) == 5
    human, gpt = first["vlm-r1"]["conversations"]
    assert (human["from"], gpt["from"]) == ("human", "gpt")
    assert human["value"].count("<image>") == len(first["vlm-r1"]["image"])
    assert json.loads(gpt["value"]) == trace["positive_ids"]
    assert first["trl"]["prompt"] == build_messages(trace["query"], 5)
    assert all((tmp_path / image).is_file() for image in first["trl"]["images"]), "relative to the file"


def test_a_datasets_folder_is_loaded_with_its_images_and_card(path, tmp_path):
    folder = export_traces(path, tmp_path / "hub", "datasets")
    data = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == len(read_traces(path))
    assert data[0]["images"][0].size == (140, 168)
    assert "Teacher: evidence." in (folder / "README.md").read_text()


def test_records_of_others_are_taken_over_as_far_as_they_tell(tmp_path):
    asked = "\n".join(["Rank.", "The question is: What is it?", "", "There are 2 images, id from 1 to 2"])
    said = "<think>x</think><answer>[2, 1]</answer>"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    record = {"messages": messages, "images": ["/data/a.png", "b.png"]}
    (tmp_path / "other.jsonl").write_text(json.dumps(record) + "\n")
    [trace] = read_traces(import_traces(tmp_path / "other.jsonl", "swift", tmp_path / "deep" / "t.jsonl"))
    assert trace["query"] == "What is it?"
    assert trace["images"] == ["/data/a.png", "../b.png"]
    assert (trace["positive_ids"], trace["prompt_version"]) == ([], PROMPT_VERSION)
    assert "<answer>[2, 1]</answer>" in trace["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("swift", {"messages": []}, "record 1: no images and no question and no reasoning"),
        ("vlm-r1", {"image": "a.png", "query": "q", "conversations": [
            {"from": "human", "value": "x"}, {"from": "gpt", "value": "[1]"}]}, "record 1: no reasoning"),
        ("trl", {"prompt": 5, "completion": 5, "images": []}, "record 1: no images"),
        ("json", {}, "unknown format 'json': choose one of swift"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, form, record, message):
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message):
        import_traces(tmp_path / "x.jsonl", form, tmp_path / "t.jsonl")
    assert not (tmp_path / "t.jsonl").exists()


def test_nothing_to_export_is_said(tmp_path):
    (tmp_path / "t.jsonl").touch()
    with pytest.raises(ValueError, match="holds no traces"):
        export_traces(tmp_path / "t.jsonl", tmp_path / "o", "swift")
