"""Requests against a real socket: rate limits hold for all, refusals end at once, keys are not repeated."""

import base64
import io
import json
import threading
import time
from email.utils import formatdate

import openai
import pytest
from helpers.servers import Server, completion
from PIL import Image

from mmr5_lab.models.chat import Chat, StoppedError, page_url, refuses_all, told


def asked(question: str) -> list[dict]:
    text = f"The question is: {question}\n"
    return [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": text}]}]


def ask_all(chat: Chat, questions: list[str]) -> list[float]:
    """Seconds until each answer, all asked at once."""
    started, seconds = time.monotonic(), [0.0] * len(questions)

    def ask(k: int) -> None:
        chat.ask(asked(questions[k]))
        seconds[k] = time.monotonic() - started

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


@pytest.mark.parametrize("told_to_wait", ["0.6", formatdate(time.time() + 1e6, usegmt=True)])
def test_a_rate_limit_holds_back_all_requests(told_to_wait, monkeypatch):
    monkeypatch.setattr("mmr5_lab.models.chat.LONGEST_PAUSE", 0.6)
    with Server({"q0": [(429, told_to_wait)]}) as server:
        chat = Chat(server.url, "m", concurrency=1)
        assert all(0.6 <= s < 2 for s in ask_all(chat, ["q0"]))
        server.turns["q1"] = [(429, told_to_wait)]
        thread = threading.Thread(target=chat.ask, args=(asked("q1"),))
        thread.start()
        time.sleep(0.2)
        assert ask_all(chat, ["q2"])[0] > 0.2, "q2 was not refused itself"
        thread.join()


def test_what_waits_to_be_tried_again_takes_no_place():
    with Server({"q0": [500]}) as server:
        chat = Chat(server.url, "m", concurrency=1, pause=1.0)
        waiting, *others = ask_all(chat, ["q0", "q1", "q2"])
    assert waiting >= 0.5
    assert max(others) < 0.5


def test_requests_a_minute_are_spread():
    with Server({}) as server:
        seconds = sorted(ask_all(Chat(server.url, "m", per_minute=600), [f"q{k}" for k in range(6)]))
    assert seconds[-1] >= 0.5, "one every tenth of a second"


def test_a_closed_chat_asks_nothing():
    with Server({}) as server:
        chat = Chat(server.url, "m")
        chat.close()
        with pytest.raises(StoppedError):
            chat.ask(asked("q"))
    assert server.bodies == []


def test_a_key_that_the_server_repeats_is_not_told(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    with Server({"q": [(401, json.dumps({"error": {"message": "wrong key secret-7"}}))]}) as server:
        with pytest.raises(openai.AuthenticationError) as error:
            Chat(server.url, "m").ask(asked("q"))
        assert len(server.bodies) == 1
    assert refuses_all(error.value)
    assert "wrong key (key)" in told(error.value)
    assert "secret-7" not in told(error.value)


def test_an_empty_account_is_not_a_rate_limit():
    with Server({"q": [(429, json.dumps({"error": {"code": "insufficient_quota", "message": "no money"}}))]}) as server:
        with pytest.raises(openai.RateLimitError) as error:
            Chat(server.url, "m").ask(asked("q"))
        assert len(server.bodies) == 1
    assert refuses_all(error.value)


def test_tokens_are_counted_and_reasoning_kept_apart():
    with Server({"q": [completion("yes", reasoning="hm")]}) as server:
        reply = Chat(server.url, "m").ask(asked("q"))
    assert (reply.text, reply.apart, reply.prompt_tokens, reply.completion_tokens) == ("yes", "hm", 1, 9)


@pytest.mark.parametrize(("kind", "mode", "same"), [("JPEG", "RGB", True), ("PNG", "RGB", True), ("PNG", "LA", False)])
def test_page_files_are_sent_as_they_are_where_every_server_takes_them(kind, mode, same):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, kind)
    head, data = page_url(buffer.getvalue()).split(",")
    sent = base64.b64decode(data)
    assert (sent == buffer.getvalue()) == same
    assert head == f"data:image/{kind.lower()};base64"
    assert Image.open(io.BytesIO(sent)).mode in ("RGB", "L")


@pytest.mark.parametrize(("options", "message"), [({"concurrency": 0}, "concurrency is"), ({"per_minute": 0}, "per_m")])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Chat("http://127.0.0.1:9/v1", "m", **options)
