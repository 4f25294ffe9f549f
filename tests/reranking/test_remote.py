"""Ranking through servers: a real one with the same weights, and one with every fault, over real sockets."""

import base64
import io
import json
import sys
import time
from pathlib import Path

import pytest
from helpers.servers import ANSWER, ModelServer, Server, completion, failure, pages, started
from PIL import Image

from mmr5_lab.reranking.inputs import prompts_of
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.pages import Pages
from mmr5_lab.reranking.ranking import RemoteError
from mmr5_lab.reranking.remote import RemoteReranker
from mmr5_lab.reranking.strategies import Consensus, Windows

BASE = Path(__file__).parents[2] / "data" / "mini" / "base"


@pytest.fixture(scope="module")
def local():
    return Reranker.from_pretrained(BASE, max_new_tokens=40)


def test_every_passing_fault_is_overcome():
    turns = {
        "q0": [429, 500], "q1": ["hang"], "q2": ["cut", 503], "q3": [b"garbage", b"<html>", b"[1]"],
        "q4": [completion("no list")], "q5": [completion(ANSWER, "length")],
        "q6": [b'{"choices": {}}', completion(7), b"{}", b'{"choices": [{"message": 5}]}'],
    }  # fmt: skip
    with Server(turns, delay=0.1) as server:
        remote = RemoteReranker(server.url, "m", concurrency=3, timeout=1, retries=4, pause=0.01)
        rankings = remote.rank_many([(q, pages(2)) for q in turns])
    assert [r.order for r in rankings] == [[1, 0]] * 4 + [[0, 1], [1, 0], [1, 0]]
    assert [set(r.faults) for r in rankings[:4]] == [set()] * 4
    assert "no_answer" in rankings[4].faults
    assert rankings[5].faults == {"truncated"}
    assert rankings[0].tokens == 9
    assert all(not left for left in server.turns.values()), "each fault was met"
    assert server.most == 3


def test_what_fails_for_good_costs_nothing_else():
    with Server({"bad": [400], "dead": [500] * 3}) as server:
        remote = RemoteReranker(server.url, "m", retries=2, pause=0.01)
        finished = {}

        def take():
            for i, ranking in remote.rank_each([(q, pages(2)) for q in ("a", "bad", "dead", "b")]):
                finished[i] = ranking.order

        with pytest.raises(RemoteError, match=r"2 of 4 .* first is pair 1: BadRequestError 400") as error:
            take()
        assert finished == {0: [1, 0], 3: [1, 0]}
        assert set(error.value.failures) == {1, 2}
        assert len(server.bodies) == 1 + 1 + 3 + 1, "a refused request is not sent again"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_that_a_server_gives_apart_is_put_back(name):
    turns = {
        "q": [completion("<answer>[2, 1]</answer>", **{name: "Image 2 fits."})],
        "cut": [completion("", "length", **{name: "Image 1"})],
        "null": [completion(None, **{name: "Image 2 fits.</think><answer>[2, 1]</answer>"})],
        "tags": [completion(None, **{name: ANSWER})],
        "opened": [completion("Image 2 fits.</think><answer>[2, 1]</answer>")],
        "parts": [completion([
            {"type": "reasoning", "reasoning": "Image 2 fits."}, {"type": "text", "text": "<answer>[2, "}, "1]</answer>"
        ])],
    }  # fmt: skip
    with Server(turns) as server:
        whole, cut, *others = RemoteReranker(server.url, "m").rank_many([(q, pages(2)) for q in turns])
        assert len(server.bodies) == len(turns)
    assert (whole.text, whole.faults) == (ANSWER, frozenset())
    assert cut.text == "<think>Image 1"
    assert {"truncated", "no_answer"} <= cut.faults
    assert [(r.text, r.reasoning, r.order, r.faults) for r in others] == [
        (ANSWER, "Image 2 fits.", [1, 0], frozenset())
    ] * len(others)


def test_a_whole_answer_in_thinking_that_never_closes_is_read_with_a_fault():
    with Server({"q": [completion(None, reasoning="Image 2 fits. <answer>[2, 1]</answer>")]}) as server:
        ranking = RemoteReranker(server.url, "m").rank("q", pages(2))
    assert (ranking.order, ranking.reasoning) == ([1, 0], "Image 2 fits. ")
    assert ranking.faults
    assert not ranking.faults & {"truncated", "no_answer"}


def test_what_is_no_answer_is_named_by_kind_and_asked_again_by_the_next_call():
    turns = {
        "failed": completion(ANSWER[:30], "error"),
        "filtered": completion(None, "content_filter"),
        "refused": completion(None, refusal="I cannot rank these"),
        "empty": completion(""),
        "error": failure("no such page").encode(),
    }
    with Server({question: [turn] for question, turn in turns.items()}) as server:
        remote = RemoteReranker(server.url, "m")
        asked = [(question, pages(2)) for question in ("fine", *turns)]
        finished = {}
        with pytest.raises(RemoteError, match=r"5 of 6 requests failed; .* By kind: 2 failed, ") as error:
            finished.update(remote.rank_each(asked))
        assert finished[0].order == [1, 0]
        assert [reason.split(":")[0] for _, reason in sorted(error.value.failures.items())] == [
            "failed", "filtered", "refused", "empty", "failed"
        ]  # fmt: skip
        assert "I cannot rank these" in error.value.failures[3]
        assert "no such page" in error.value.failures[5]
        assert len(server.bodies) == 6, "a reply is final"
        assert [r.order for r in remote.rank_many(asked)] == [[1, 0]] * 6


def test_a_wrong_key_costs_few_requests():
    with Server({"q": [(401, failure("Incorrect API key provided"))] * 60}, delay=0.05) as server:
        remote = RemoteReranker(server.url, "m", concurrency=4)
        with pytest.raises(RemoteError, match=r"60 of 60 requests .* By kind: 60 AuthenticationError 401") as error:
            remote.rank_many([("q", pages(2))] * 60)
        assert len(server.bodies) <= 8
    assert error.value.fatal
    assert all("Incorrect API key provided" in reason for reason in error.value.failures.values())


@pytest.mark.parametrize(
    "strategy", [lambda r: Windows(r, 2, 1), lambda r: Consensus(r, 3), lambda r: Windows(r, 5, 1)]
)
def test_what_fails_under_a_strategy_costs_nothing_else(strategy):
    """Pairs of one and of three windows; the second and the fourth fail, in their first and in their last turn."""
    shown = [("short", pages(2)), ("bad", pages(4)), ("long", pages(4)), ("late", pages(4))]
    turns = {"bad": [400] * 3, "late": [completion("<think>x</think><answer>[2, 1]</answer>"), 400, 400]}
    with Server(turns) as server:
        ranker = strategy(RemoteReranker(server.url, "m"))
        finished = {}
        with pytest.raises(
            RemoteError, match=r"\d of 4 requests failed; the first is pair 1: BadRequestError"
        ) as error:
            finished.update(ranker.rank_each(shown))
        turns_each = 1 if isinstance(ranker, Windows) and ranker.size == 5 else 3
        failed = {1} if turns_each == 1 else {1, 3}
        assert set(error.value.failures) == failed
        assert set(finished) == {0, 1, 2, 3} - failed
        sent = [body["messages"][1]["content"][0]["text"] for body in server.bodies]
        assert sum(": bad\n" in text for text in sent) == 1, "no further turn of it"
        assert sum(": long\n" in text for text in sent) == turns_each


def test_a_wrong_key_ends_a_strategy_at_once():
    with Server({"q": [401] * 9}) as server:
        with pytest.raises(RemoteError, match="AuthenticationError 401") as error:
            Windows(RemoteReranker(server.url, "m", concurrency=2), 2, 1).rank_many([("q", pages(6))] * 3)
        assert error.value.fatal
        assert len(server.bodies) <= 2


def test_pages_are_brought_into_a_pixel_budget_before_they_are_sent():
    def reply(body: dict):
        small = len(json.dumps(body)) < 12_000
        return completion(ANSWER) if small else (413, failure("Request Entity Too Large"))

    noise = [Image.effect_noise((140, 168), 90).convert("RGB") for _ in range(2)]
    with Server({"q": [reply, reply]}) as server:
        with pytest.raises(RemoteError, match=r"lower the pixels of a page \(max_pixels\)"):
            RemoteReranker(server.url, "m").rank("q", noise)
        assert RemoteReranker(server.url, "m", max_pixels=1000).rank("q", noise).order == [1, 0]


def test_a_page_beyond_every_models_budget_is_made_smaller():
    """Qwen3-VL looks at 16,777,216 pixels at most; 4,200 × 4,200 are 17,640,000."""
    with Server({}) as server:
        RemoteReranker(server.url, "m").rank("q", [Image.new("RGB", (4200, 4200)), *pages(1)])
        [body] = server.bodies
    urls = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    sent = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]
    assert sent == [(4088, 4088), (140, 168)]


@pytest.mark.parametrize("size", [(140, 168), (100, 168), (168, 90), (300, 60)])
def test_a_page_within_a_budget_makes_as_many_tokens_as_here(local, size):
    here = Reranker.from_pretrained(BASE, max_pixels=9408)
    pair = ("q", [Image.new("RGB", size)])
    [prompt] = prompts_of([pair], Pages([pair]), "reason", here.model, here.processor, 40)
    with ModelServer(local) as server:
        assert RemoteReranker(server.url, "m", max_pixels=9408).prompt_tokens(*pair) == prompt.tokens


def test_stopping_early_does_not_wait_for_what_hangs():
    with Server({"slow": ["hang"] * 9}) as server:
        ranked = RemoteReranker(server.url, "m", concurrency=2, retries=8).rank_each(
            [("quick", pages(2)), ("slow", pages(2))]
        )
        assert next(ranked)[0] == 0
        started = time.monotonic()
        ranked.close()
        assert time.monotonic() - started < 1
        sent = len(server.bodies)
        time.sleep(4)
        assert len(server.bodies) <= sent + 1, "it is not tried again"


def test_the_key_comes_from_the_environment_and_the_page_is_sent_as_it_is(monkeypatch, tmp_path):
    pages(1)[0].save(tmp_path / "page.jpg")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    with Server({}) as server:
        remote = RemoteReranker(server.url, "m", max_new_tokens=33, seed=5)
        remote.rank("q", [tmp_path / "page.jpg", pages(1)[0]])
        [body] = server.bodies
    assert server.keys == ["Bearer secret-7"]
    assert "secret-7" not in repr(vars(remote))
    assert (body["max_tokens"], body["temperature"], body["seed"], body["model"]) == (33, 0.0, 5, "m")
    urls = [p["image_url"]["url"] for p in body["messages"][1]["content"] if p["type"] == "image_url"]
    assert urls[0].startswith("data:image/jpeg;base64,/9j/")
    assert urls[1].startswith("data:image/png;base64,")


@pytest.mark.parametrize(("bad", "message"), [([], "no pages"), ([b"x"], "page 0 is not a readable image")])
def test_bad_pages_are_named_before_anything_is_sent(bad, message):
    with Server({}) as server, pytest.raises(ValueError, match=f"pair 1 .'q'.*{message}"):
        list(RemoteReranker(server.url, "m").rank_each([("p", pages(1)), ("q", bad)]))
    assert server.bodies == []


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="concurrency is 0"):
        RemoteReranker("http://127.0.0.1:9/v1", "m", concurrency=0)
    with pytest.raises(ValueError, match="'localhost:8000/v1' is not the address of a server: it must begin with http"):
        RemoteReranker("localhost:8000/v1", "m")
    with pytest.raises(ValueError, match="a server cannot be asked for mode 'guess': choose one of reason, direct"):
        RemoteReranker("http://127.0.0.1:9/v1", "m").rank("q", pages(1), "guess")
    with pytest.raises(ValueError, match="mode 'direct' decodes greedily: leave out the temperature"):
        RemoteReranker("http://127.0.0.1:9/v1", "m", temperature=0.3).rank("q", pages(1), "direct")


def shown(count: int = 3) -> list:
    """Questions with 3 pages and with 12, whose ids begin alike."""
    return [(f"What was the staff of Orion in {2014 + k}?", pages((3, 12)[k % 2])) for k in range(count)]


@pytest.mark.parametrize("top", [20, 6])
@pytest.mark.parametrize("mode", ["direct", "score", "calibrated", "pointwise"])
def test_each_mode_gives_the_local_orders_and_scores(local, mode, top):
    """Where the server tells only the six most probable tokens, the others are asked for as choices."""
    calibrate, mode = mode == "calibrated", mode.replace("calibrated", "score")
    own = Reranker(local.model, local.processor, calibrate=calibrate)
    with ModelServer(local, top=top) as server:
        remote = RemoteReranker(server.url, "m", calibrate=calibrate).rank_many(shown(2), mode)
    expected = own.rank_many(shown(2), mode)
    assert [(r.order, r.text, r.faults, r.tokens) for r in remote] == [
        (r.order, r.text, r.faults, r.tokens) for r in expected
    ]
    assert [r.scores for r in remote] == [r.scores and pytest.approx(r.scores, abs=1e-3) for r in expected]


def test_a_permutation_that_the_model_writes_by_itself_is_one_request(local):
    with ModelServer(local) as server:
        remote = RemoteReranker(server.url, "m")
        remote.rank(*shown()[0], "direct")
        asked = len(server.bodies)
        assert remote.rank(*shown()[0], "direct").order == local.rank(*shown()[0], "direct").order
    assert asked == 4, "and three small ones, once, that find out what the server can do"
    assert len(server.bodies) == 5
    assert not any("image_url" in json.dumps(body) for body in server.bodies[:3])


@pytest.mark.parametrize("mode", ["direct", "score", "pointwise"])
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"lacks": ["logprobs"]}, r"it gives no log-probabilities \(logprobs\)"),
        ({"refuses": ["top_logprobs"]}, "Unrecognized request argument supplied: top_logprobs"),
        ({"lacks": ["continue_final_message"]}, "it does not go on with an answer that was begun"),
        ({"refuses": ["continue_final_message"]}, "it does not go on with an answer that was begun"),
    ],
)
def test_what_a_server_lacks_is_named_before_pages_are_sent(local, mode, missing, message):
    """Mode "pointwise" begins no answer; but True and False, several tokens of this model, are not taken apart then."""
    named = r"no log-probabilities of \[.*'True', 'False'\] as choices"
    expected = named if mode == "pointwise" and "begun" in message else message
    with ModelServer(local, **missing) as server:
        with pytest.raises(RemoteError, match=f"1 of 1 requests failed; .*{expected}.* vLLM 0.12 or newer can"):
            RemoteReranker(server.url, "m").rank(*shown()[0], mode)
        assert expected == named or not any("image_url" in json.dumps(body) for body in server.bodies)


def test_structured_outputs_are_needed_only_for_what_a_server_does_not_tell_by_itself(local):
    with ModelServer(local, lacks=["structured_outputs"], top=1) as server:
        remote = RemoteReranker(server.url, "m")
        assert remote.rank(*shown()[0], "direct").order == local.rank(*shown()[0], "direct").order
        with pytest.raises(RemoteError, match=r"no log-probabilities of \['1', .* as choices \(structured_outputs\)"):
            remote.rank(*shown()[0], "score")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`transformers serve` with the miniature's base: (url, model name)."""
    command = [Path(sys.executable).parent / "transformers", "serve", BASE, "--device", "cpu", "--dtype", "float32"]
    with started(command, tmp_path_factory.mktemp("served") / "log", seconds=60) as url:
        yield url, str(BASE)


def test_a_server_with_the_same_weights_writes_the_same(served):
    url, model = served
    shown = [(f"What was the staff of Orion in {2014 + k}?", pages(2 + k % 2)) for k in range(3)]
    local = Reranker.from_pretrained(model, max_new_tokens=40).rank_many(shown)
    remote = RemoteReranker(url, model, max_new_tokens=40, concurrency=2).rank_many(shown)
    assert [r.reasoning for r in remote] == [r.reasoning for r in local]
    assert any(r.reasoning for r in local), "the server gives reasoning apart from the text"
    assert [r.order for r in remote] == [r.order for r in local]
    assert [r.faults for r in remote] == [r.faults for r in local]
    with pytest.raises(RemoteError, match=r"lacking: .* it gives no log-probabilities \(logprobs\)"):
        RemoteReranker(url, model).rank(*shown[0], "score")
