"""Traces written for other trainers and read back are the same traces; records of others are taken over."""

import base64
import json
import logging

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
        for form in ("swift", "swift-reranker", "vlm-r1", "trl")
    }
    assert [m["role"] for m in first["swift"]["messages"]] == ["system", "user", "assistant"]
    assert first["swift"]["messages"][1]["content"].count("<image>") == len(first["swift"]["images"]) == 5
    ranked = first["swift-reranker"]
    assert ranked["messages"] == [{"role": "user", "content": trace["query"]}]
    assert len(ranked["positive_messages"]) == len(ranked["positive_images"]) == len(trace["positive_ids"])
    assert len(ranked["negative_messages"]) == 5 - len(trace["positive_ids"])
    assert ranked["negative_messages"][0] == [{"role": "assistant", "content": "<image>"}]
    human, gpt = first["vlm-r1"]["conversations"]
    assert (human["from"], gpt["from"]) == ("human", "gpt")
    assert human["value"].count("<image>") == len(first["vlm-r1"]["image"])
    assert json.loads(gpt["value"]) == trace["positive_ids"]
    assert first["trl"]["prompt"] == build_messages(trace["query"], 5)
    assert all((tmp_path / image).is_file() for image in first["trl"]["images"]), "relative to the file"


def test_rankings_of_others_without_reasoning_make_no_traces(tmp_path):
    record = {
        "messages": [{"role": "user", "content": "What?"}],
        "positive_messages": [[{"role": "assistant", "content": "<image>"}]], "positive_images": [["a.png"]],
        "negative_messages": [[{"role": "assistant", "content": "<image>"}]], "negative_images": [["b.png"]],
    }  # fmt: skip
    (tmp_path / "other.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"record 1: its answer .* is not reasoning and a permutation of 1 to 2"):
        import_traces(tmp_path / "other.jsonl", "swift-reranker", tmp_path / "t.jsonl")
    (tmp_path / "other.jsonl").write_text(json.dumps({**record, "query": "What?", "negative_images": []}))
    with pytest.raises(ValueError, match="record 1: "):
        import_traces(tmp_path / "other.jsonl", "swift-reranker", tmp_path / "t.jsonl")


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


PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")


def swift(answer="[2, 1]", images=("a.png", "b.png"), tags=2, **more) -> dict:
    asked = "Rank.\nThe question is: What is it?\n\nThere are 2 images, id from 1 to 2" + "<image>" * tags
    said = f"<think>x</think><answer>{answer}</answer>"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": messages, "images": list(images), **more}


def imported(tmp_path, *records: dict, form="swift") -> list[dict]:
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, records)))
    return read_traces(import_traces(tmp_path / "other.jsonl", form, tmp_path / "t.jsonl"))


def test_the_last_line_needs_no_line_break_and_a_half_one_is_left_out_with_a_warning(tmp_path, caplog):
    assert len(imported(tmp_path, swift(), swift())) == 2
    (tmp_path / "other.jsonl").write_text(json.dumps(swift()) + "\n" + json.dumps(swift())[:50])
    with caplog.at_level(logging.WARNING):
        assert len(read_traces(import_traces(tmp_path / "other.jsonl", "swift", tmp_path / "t.jsonl"))) == 1
    assert "line 2 was not written to its end" in caplog.text
    (tmp_path / "t.jsonl").write_text((tmp_path / "t.jsonl").read_text().rstrip())
    assert len(read_traces(tmp_path / "t.jsonl")) == 1


def test_images_are_read_as_ms_swift_writes_them(tmp_path):
    text = base64.b64encode(PNG).decode()
    images = [{"path": "a.png", "bytes": None}, {"path": None, "bytes": text}]
    parts = [{"type": "text", "text": "The question is: What is it?\n\nThere are 2 images"}, *[{"type": "image"}] * 2]
    record = swift(images=images)
    record["messages"][0]["content"] = parts
    [first, second] = imported(tmp_path, record, swift(images=["/data/a.png", {"bytes": text}]))
    assert first["query"] == "What is it?"
    assert first["images"][0] == "a.png"
    assert first["images"][1] == second["images"][1]
    assert (tmp_path / first["images"][1]).read_bytes() == PNG
    assert second["images"][0] == "/data/a.png"


def test_images_of_one_name_stay_apart(path, tmp_path):
    rows = [{"images": [{"path": "page.png", "bytes": PNG}, {"path": "page.png", "bytes": PNG + b" "}]}]
    record = datasets.Dataset.from_list([
        {"prompt": [{"role": "user", "content": "The question is: What?\n\nThere are 2 images"}],
         "completion": [{"role": "assistant", "content": "<think>x</think><answer>[1, 2]</answer>"}], **rows[0]}
    ])  # fmt: skip
    (tmp_path / "hub").mkdir()
    record.cast_column("images", datasets.List(datasets.Image())).to_parquet(tmp_path / "hub" / "train.parquet")
    [trace] = read_traces(import_traces(tmp_path / "hub", "datasets", tmp_path / "t.jsonl"))
    assert len(set(trace["images"])) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (swift(tags=3), "it has 3 <image> tags and 2 images"),
        (swift(tags=1), "it has 1 <image> tags and 2 images"),
        (swift(images=["a.png"], tags=2), "it has 2 <image> tags and 1 images"),
        (swift("[5, 1]"), r"its answer \[5, 1\] is not reasoning and a permutation of 1 to 2 .*missing, out_of_range"),
        (swift("[1, 0]"), r"its answer .* in the form asked for \(zero_based"),
        (swift("[2]"), r"its answer \[2\] is not .*missing"),
        (swift("[1, 1]"), r"its answer \[1, 1\] is not .*duplicate"),
        (swift("none"), r"its answer \[\] is not .*no_answer"),
        (swift("2 > 1"), r"its answer \[2, 1\] is not .*extra_text"),
        (swift(images=["a.png", None]), "image 2 is None; expected the path"),
        (swift(images=["a.png", {}]), "image 2 is {}; expected the path"),
        (swift(images=["a.png", 5]), "image 2 is 5; expected the path"),
        (swift(images=["https://a.b/c.png", "a.png"]), "image 1 is 'https://a.b/c.png'; expected the path"),
        (swift(images=["data:image/png;base64,iVBO", "a.png"]), "image 1 is 'data:image"),
        (swift(images=[base64.b64encode(PNG).decode(), "a.png"]), "image 1 is 'iVBOR"),
        (swift(images=["a.png", {"bytes": "not base64"}]), "record 2: "),
        (swift(images=["a.png", {"bytes": base64.b64encode(b"no image").decode()}]), "image 2 .* not a readable image"),
        (swift(candidates=[4]), "its candidates or positive_ids do not belong to 2 images"),
        (swift(positive_ids=[3]), "its candidates or positive_ids do not belong to 2 images"),
        (swift(candidates=7), "record 2: "),
        (swift(query=["q"]), "no images or no question to be found"),
        ({"messages": "x", "images": ["a"]}, "no images or no question"),
        ({"messages": [{"role": "user", "content": [5]}], "images": ["a"]}, "no images or no question"),
    ],
)
def test_what_would_teach_nonsense_is_refused_with_the_record_s_number(tmp_path, record, message):
    with pytest.raises(ValueError, match=rf"other.jsonl, record 2: .*{message}|{message}") as error:
        imported(tmp_path, swift(), record)
    assert "other.jsonl, record 2: " in str(error.value)
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("swift", {"messages": []}, "record 1: no images or no question"),
        ("vlm-r1", {"image": "a.png", "query": "q", "conversations": [
            {"from": "human", "value": "x"}, {"from": "gpt", "value": "[1]"}]}, "record 1: its answer .*no_think"),
        ("trl", {"prompt": 5, "completion": 5, "images": []}, "record 1: no images"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, form, record, message):
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message):
        import_traces(tmp_path / "x.jsonl", form, tmp_path / "t.jsonl")
    assert not (tmp_path / "t.jsonl").exists()


def test_nothing_to_export_is_said(path, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'json': choose one of swift"):
        export_traces(path, tmp_path / "o", "json")
    (tmp_path / "t.jsonl").touch()
    with pytest.raises(ValueError, match="holds no traces"):
        export_traces(tmp_path / "t.jsonl", tmp_path / "o", "swift")


def test_an_unknown_format_is_refused_on_import(tmp_path):
    """A misspelt name was read as trl's, without a word."""
    with pytest.raises(ValueError, match="unknown format 'swfit': choose one of swift, swift-reranker, vlm-r1, "):
        import_traces(tmp_path / "records.jsonl", "swfit", tmp_path / "out.jsonl")
