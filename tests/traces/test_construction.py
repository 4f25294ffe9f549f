"""Traces: labels decide the verdicts and the answer; finished lines survive an interruption."""

import json
import random
import time
from collections import Counter
from multiprocessing import get_context

import pytest
from helpers.killed_work import CONCURRENCY, by_server, make_by_server
from helpers.servers import Server, completion

from mmr5_lab.cli import main
from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.rankings import Rankings, read_trec
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.files import appending
from mmr5_lab.mini.documents import make_corpus
from mmr5_lab.mini.teacher import EvidenceTeacher
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.retrieval.retrieve import retrieve
from mmr5_lab.traces.account import BudgetError
from mmr5_lab.traces.construction import (
    make_traces,
    read_traces,
    rejected_path,
    rl_dataset,
    sft_dataset,
    training_candidates,
)
from mmr5_lab.traces.teachers import TeacherGoneError

KILLS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), seed=5, splits={"sft": (2, 5)})


@pytest.fixture(scope="module")
def candidates(corpus):
    return training_candidates(corpus, retrieve(corpus, top_k=5), num_candidates=5)


def test_a_direct_example_has_the_answer_and_no_reasoning(corpus, candidates, tmp_path):
    path = make_traces(corpus, candidates[:2], EvidenceTeacher(corpus), tmp_path / "traces.jsonl")
    shown, direct = sft_dataset(path)[0], sft_dataset(path, reasoning=False)[0]
    whole, short = (row["completion"][0]["content"][0]["text"] for row in (shown, direct))
    assert short == f"<think></think>{whole.partition('</think>')[2]}"
    assert direct["prompt"] == shown["prompt"]


def test_a_trace_is_well_formed_and_puts_positives_first(corpus, candidates, tmp_path):
    traces = read_traces(make_traces(corpus, candidates, EvidenceTeacher(corpus), tmp_path / "t.jsonl"))
    assert len(traces) == len(candidates)
    for trace in traces:
        parsed = parse_ranking(trace["messages"][-1]["content"], len(trace["images"]))
        assert not parsed.faults
        assert list(parsed.answer[: len(trace["positive_ids"])]) == trace["positive_ids"]
        rest = list(parsed.answer[len(trace["positive_ids"]) :])
        assert rest == sorted(rest), "the others follow in candidate order"
        lines = parsed.think.split("\n")
        right = [i for i, line in enumerate(lines, 1) if line.endswith("It answers the question.")]
        assert right == trace["positive_ids"]
        assert trace["messages"][1]["content"].count("<image>") == len(trace["images"])
        assert all((tmp_path / image).is_file() for image in trace["images"])


def test_a_half_written_line_is_made_again_and_nothing_twice(corpus, candidates, tmp_path):
    path = make_traces(corpus, candidates, EvidenceTeacher(corpus), tmp_path / "t.jsonl")
    whole = path.read_text()
    path.write_text(whole[: len(whole) * 2 // 3])
    make_traces(corpus, candidates, EvidenceTeacher(corpus), path)
    ids = [trace["query_id"] for trace in read_traces(path)]
    assert len(ids) == len(set(ids)) == len(candidates)
    assert path.read_text() == whole


def test_each_question_comes_in_as_many_orders_as_asked_for(corpus):
    run = retrieve(corpus, top_k=5)
    once, thrice = (training_candidates(corpus, run, 5, shuffles=count) for count in (1, 3))
    assert [c.pages for c in thrice[: len(once)]] == [c.pages for c in once]
    orders = [(c.question["question_id"], tuple(c.pages)) for c in thrice]
    assert len(orders) == len(set(orders)) > 2.5 * len(once)
    for chosen in thrice:
        question_id = chosen.question["question_id"]
        assert sorted(chosen.pages) == sorted(run.pages[question_id][:5])
        assert {chosen.pages[i - 1] for i in chosen.positive_ids} <= set(chosen.question["gold_pages"])
    kept = training_candidates(corpus, run, 5, shuffles=0)
    assert [c.pages for c in kept] == [run.pages[c.question["question_id"]][:5] for c in kept]


def test_a_line_that_is_not_a_trace_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [], "candidates": []}) + "\n")
    with pytest.raises(ValueError, match="line 1 is not a trace: it has no images"):
        read_traces(path)


def test_questions_without_a_positive_candidate_are_left_out(corpus):
    question = corpus.questions.iloc[0]
    wrong = next(k for k in range(corpus.num_pages(question["doc_name"])) if k not in question["gold_pages"])
    with pytest.raises(ValueError, match="no question has a positive"):
        training_candidates(corpus, Rankings({question["question_id"]: [wrong]}))
    with pytest.raises(ValueError, match="belongs to another corpus"):
        training_candidates(corpus, Rankings({"nobody": [0]}))


def test_datasets_hold_prompts_images_and_labels(corpus, candidates, tmp_path):
    sft = sft_dataset(make_traces(corpus, candidates, EvidenceTeacher(corpus), tmp_path / "t.jsonl"))
    rl = rl_dataset(corpus, candidates)
    assert sft.column_names == ["prompt", "completion", "images"]
    assert rl[0]["positive_ids"] == candidates[0].positive_ids
    assert rl[0]["num_candidates"] == len(rl[0]["images"]) == len(candidates[0].pages)
    assert rl[0]["images"][0].size == sft[0]["images"][0].size == (140, 168)


def test_prompts_come_in_new_orders_each_epoch_and_the_same_in_any_run(corpus):
    kept = training_candidates(corpus, retrieve(corpus, top_k=5), 5, shuffles=0)
    epochs = []
    for _ in range(2):  # two runs
        data = rl_dataset(corpus, kept, seed=3)
        reader = data.format["format_kwargs"]["transform"]
        for reader.epoch in (0, 1, 2):
            epochs.append([row["candidates"] for row in data])
            for row, chosen in zip(data, kept, strict=True):
                assert sorted(row["candidates"]) == sorted(chosen.pages)
                assert [row["candidates"][i - 1] for i in row["positive_ids"]] == [
                    page for page in row["candidates"] if page in chosen.question["gold_pages"]
                ]
    assert epochs[:3] == epochs[3:]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] == [c.pages for c in training_candidates(corpus, retrieve(corpus, top_k=5), 5, seed=3)]
    row = rl_dataset(corpus, kept, seed=3)[0]
    page = corpus.page_image(kept[0].question["doc_name"], row["candidates"][2])
    assert row["images"][2].tobytes() == page.tobytes()


class Says:
    """A teacher that says the same of every page, after failing in given ways, one a page."""

    name = "says"

    def __init__(self, text: str, *errors: Exception):
        self.text, self.errors, self.asked = text, list(errors), 0

    def explain(self, question, page, positive):
        self.asked += 1
        if self.errors:
            raise self.errors.pop()
        return self.text

    refine = explain


def said_of(text: str) -> str:
    """What a good teacher answers, with words of its own for each question."""
    said = "This answers it" if "why the information in this picture can help" in text else "It does not help"
    return f"{said}: {text[-60:]}"


def test_several_workers_write_what_one_writes(corpus, candidates, tmp_path):
    paths = []
    for workers in (1, 8):
        teacher = EvidenceTeacher(corpus)
        teacher.workers = workers
        paths.append(make_traces(corpus, candidates, teacher, tmp_path / str(workers) / "t.jsonl"))
    assert paths[0].read_text() == paths[1].read_text(), "in the order of the candidates"


def test_rejected_traces_are_kept_with_their_faults_and_not_asked_for_again(corpus, candidates, tmp_path):
    teacher = Says("As the ground truth says, </think> <|im_end|> it cannot help.")
    path = make_traces(corpus, candidates, teacher, tmp_path / "t.jsonl")
    asked = teacher.asked
    assert read_traces(path) == []
    rejected = read_traces(rejected_path(path))
    assert [trace["query_id"] for trace in rejected] == [c.question["question_id"] for c in candidates]
    assert all(trace["faults"] == ["label_leaked", "contradicts_label"] for trace in rejected)
    assert "< /think> < |im_end|>" in rejected[0]["messages"][-1]["content"], "what the teacher wrote is text"
    make_traces(corpus, candidates, teacher, path)
    assert teacher.asked == asked
    assert read_traces(rejected_path(path)) == rejected


def test_a_looser_check_takes_rejected_traces_back_without_the_teacher(corpus, candidates, tmp_path):
    teacher = Says(" ".join(f"word{k}" for k in range(70)))
    path = make_traces(corpus, candidates[:1], teacher, tmp_path / "t.jsonl")
    assert [trace["faults"] for trace in read_traces(rejected_path(path))] == [["too_long"]]
    make_traces(corpus, candidates[:1], teacher, path, max_words=80)
    assert len(read_traces(path)) == 1
    assert read_traces(rejected_path(path)) == []
    assert teacher.asked == len(candidates[0].pages)


def test_repeated_reasoning_is_rejected_and_names_what_it_repeats(corpus, candidates, tmp_path):
    path = make_traces(corpus, candidates, Says("a page of a report, with words"), tmp_path / "t.jsonl")
    first, again = read_traces(path)[0], read_traces(rejected_path(path))
    assert {trace["faults"][0] for trace in again} == {"near_duplicate"}
    assert {trace["repeats"] for trace in again} == {first["query_id"]}
    assert len(read_traces(path)) + len(again) == len(candidates)


def test_another_teacher_does_not_go_on_with_the_file(corpus, candidates, tmp_path):
    path = make_traces(corpus, candidates[:2], EvidenceTeacher(corpus), tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=r"made otherwise .teacher 'evidence', now 'says'.: choose another file"):
        make_traces(corpus, candidates, Says("x"), path)
    with pytest.raises(ValueError, match="refined False, now True"):
        make_traces(corpus, candidates, EvidenceTeacher(corpus), path, refined=True)


def test_a_page_s_file_has_a_short_name_whatever_the_document_is_called(tmp_path):
    pages = make_corpus(tmp_path / "made", seed=5, splits={"sft": (1, 2)})
    names = ["年" * 40, "年" * 39 + "月", "short"]
    records = [{"doc_name": name, "domain": "x", "questions": [
        {"Q": f"What is {name}?", "A": "", "page_id": [0], "type": ""}]} for name in names]  # fmt: skip
    image = pages.page_bytes("sft-000", 0)
    write_corpus(tmp_path, records, [{"doc_name": n, "image_binary": image, "ocr_text": n} for n in names])
    corpus = load_corpus(tmp_path)
    candidates = training_candidates(corpus, Rankings({q: [0] for q in corpus.questions["question_id"]}))
    traces = read_traces(make_traces(corpus, candidates, Says("the page \x02 says \x00so"), tmp_path / "t.jsonl"))
    traces += read_traces(rejected_path(tmp_path / "t.jsonl"))
    files = {trace["doc_name"]: trace["images"][0] for trace in traces}
    assert sorted(files) == sorted(names)
    assert files["short"] == "pages/short:0.png"
    assert len(set(files.values())) == 3
    assert all((tmp_path / file).is_file() and len(file) < 80 for file in files.values())
    assert "the page  says so" in traces[0]["messages"][-1]["content"], "without control characters"


def test_two_processes_on_one_file_are_refused(corpus, candidates, tmp_path):
    with appending(tmp_path / "t.jsonl"), pytest.raises(RuntimeError, match="another process is writing"):
        make_traces(corpus, candidates, EvidenceTeacher(corpus), tmp_path / "t.jsonl")


def test_what_fails_for_good_costs_one_trace_and_a_wrong_key_ends_the_work(corpus, candidates, tmp_path):
    refused = candidates[0].question["question"]
    with Server({refused: [400]}, answer=said_of) as server:
        with pytest.raises(RuntimeError, match=rf"1 of {len(candidates)} traces were not made; .*BadRequestError 400"):
            make_traces(corpus, candidates, by_server(corpus, server.url, tmp_path), tmp_path / "t.jsonl")
        assert len(read_traces(tmp_path / "t.jsonl")) == len(candidates) - 1
        sent = len(server.bodies)
        path = make_traces(corpus, candidates, by_server(corpus, server.url, tmp_path), tmp_path / "t.jsonl")
        assert len(read_traces(path)) == len(candidates)
        assert len(server.bodies) <= sent + len(candidates[0].pages), "only what is missing"
    questions = {c.question["question"]: [401] * 99 for c in candidates}
    with Server(questions) as server:
        teacher = by_server(corpus, server.url, tmp_path / "other")
        with pytest.raises(TeacherGoneError, match="AuthenticationError 401"):
            make_traces(corpus, candidates, teacher, tmp_path / "other" / "t.jsonl")
        assert len(server.bodies) <= 4 * len(candidates[0].pages), "two traces, and those begun before they had ended"


def test_what_is_no_answer_is_counted_by_kind_and_made_by_the_next_run(corpus, candidates, tmp_path):
    orders = training_candidates(corpus, retrieve(corpus, top_k=5), 5, shuffles=3)
    cut, filtered = (c.question["question"] for c in candidates[:2])
    turns = {cut: [completion("Half an", "length")] * 99, filtered: [completion("", "content_filter")] * 99}
    with Server(turns, answer=said_of) as server:
        teacher = by_server(corpus, server.url, tmp_path)
        with pytest.raises(RuntimeError, match=r"6 of \d+ traces were not made; the first is .* By kind: 3 \w+, 3 \w+"):
            make_traces(corpus, orders, teacher, tmp_path / "t.jsonl")
        calls = Counter(json.dumps(body["messages"]) for body in server.bodies)
        assert set(calls.values()) == {1}, "three orders of a question share what each page got"
        server.turns.clear()
        made = make_traces(corpus, orders, by_server(corpus, server.url, tmp_path), tmp_path / "t.jsonl")
        assert len(read_traces(made)) + len(read_traces(rejected_path(made))) == len(orders)
        again = Counter(json.dumps(body["messages"]) for body in server.bodies) - calls
        assert all(cut in call or filtered in call for call in again), "nothing else is asked again"
    summary = teacher.account.summary().loc["m"]
    assert summary["tries without"] == summary["cut"] + summary["filtered"] > 0
    assert summary["answers"] == len({(c.question["question_id"], page) for c in orders for page in c.pages})


def test_a_budget_ends_the_work_and_a_larger_one_goes_on(corpus, candidates, tmp_path):
    with Server({}, answer=said_of) as server:
        prices = {"price_in": 100.0, "price_out": 100.0}
        teacher = by_server(corpus, server.url, tmp_path, concurrency=1, budget=0.25, **prices)
        with pytest.raises(BudgetError, match="Raise the budget"):
            make_traces(corpus, candidates, teacher, tmp_path / "t.jsonl")
        made = read_traces(tmp_path / "t.jsonl")
        assert 0 < len(made) < len(candidates)
        teacher = by_server(corpus, server.url, tmp_path, budget=50.0, **prices)
        make_traces(corpus, candidates, teacher, tmp_path / "t.jsonl")
        assert [t["query_id"] for t in read_traces(tmp_path / "t.jsonl")[: len(made)]] == [t["query_id"] for t in made]
        calls = {json.dumps(body["messages"]) for body in server.bodies}
        assert len(server.bodies) == len(calls), "nothing is paid for twice"


def test_twenty_kills_lose_at_most_the_calls_in_flight(tmp_path):
    """A process is started, killed at some moment of its work, started again; the server fails now and then too."""
    corpus = make_corpus(tmp_path / "corpus", seed=5, splits={"sft": (6, 9)})
    path, draw = tmp_path / "made" / "t.jsonl", random.Random(0)
    expected = training_candidates(corpus, retrieve(corpus, top_k=5), 5, shuffles=4)
    turns = {c.question["question"]: [503] for c in expected[::3]}
    context = get_context("forkserver")  # each process is forked from one that has imported everything
    context.set_forkserver_preload(["mmr5_lab.traces.teachers", "mmr5_lab.traces.construction"])

    def start():
        process = context.Process(target=make_by_server, args=(corpus.folder, server.url, path))
        process.start()
        return process

    finished = 0
    with Server(turns, delay=0.06, answer=said_of) as server:
        kept: set[str] = set()
        for _ in range(KILLS):
            sent, process = len(server.bodies), start()
            while len(server.bodies) == sent and process.is_alive():
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.15))
            finished += not process.is_alive()
            process.kill()
            process.join()
            both = [*read_traces(path), *read_traces(rejected_path(path))]
            made = [(t["query_id"], *t["candidates"]) for t in both]
            assert len(made) == len(set(made)), "nothing twice"
            assert kept <= set(made), "nothing lost"
            kept = set(made)
        last = start()
        last.join()
        assert last.exitcode == 0
    assert finished == 0, "every kill fell into the work"
    made = [*read_traces(path), *read_traces(rejected_path(path))]
    assert sorted((t["query_id"], *t["candidates"]) for t in made) == sorted(
        (c.question["question_id"], *c.pages) for c in expected
    )
    calls = Counter(json.dumps(body["messages"]) for body in server.bodies)
    again = sum(calls.values()) - len(calls) - sum(map(len, turns.values()))
    assert len(calls) == len({(c.question["question_id"], page) for c in expected for page in c.pages})
    assert again <= KILLS * CONCURRENCY, "at most the calls in flight are made again"
    for trace in made:
        assert all((path.parent / image).stat().st_size for image in trace["images"])


def test_traces_from_the_command_line(corpus, tmp_path, capsys):
    run, out = str(tmp_path / "bm25.trec"), tmp_path / "t.jsonl"
    assert main(["retrieve", str(corpus.folder), "--out", run]) == 0
    command = ["traces", str(corpus.folder), run, "--out", str(out)]
    with Server({}, answer=said_of) as server:
        asked = [*command, "--server", server.url, "--model", "m", "--max-traces", "3", "--price-in", "2.5"]
        assert main([*asked, "--price-out", "10", "--budget", "0.02"]) == 1
        assert "the budget of 0.02 would be passed" in capsys.readouterr().err
        assert main([*asked, "--price-out", "10", "--budget", "1"]) == 0
        sent = len(server.bodies)
        assert main([*asked, "--price-out", "10"]) == 0
        assert len(server.bodies) == sent == 15
    printed = capsys.readouterr().out
    assert "accepted       3 100.0%" in printed
    assert len(read_traces(out)) == 3
    assert "Teacher: m." in (tmp_path / "t.card.md").read_text()
    assert main(command) == 2, "the offline teacher does not go on with another's file"
    assert "made otherwise (teacher 'm', now 'evidence')" in capsys.readouterr().err
    assert main([*command, "--model", "m"]) == 2
    assert "needs both" in capsys.readouterr().err
    with appending(out):
        assert main(asked) == 1
    assert "another process is writing" in capsys.readouterr().err
    assert main([*command[:3], "--out", str(tmp_path / "kept.jsonl"), "--shuffles", "0"]) == 0
    ranked = read_trec(run, corpus).pages
    assert all(t["candidates"] == ranked[t["query_id"]][:5] for t in read_traces(tmp_path / "kept.jsonl"))
