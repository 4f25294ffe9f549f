"""Requests over real sockets: what passes is tried again, what does not ends at once, keys are not repeated."""

import base64
import io
import socket
import threading
import time
from email.utils import formatdate

import pytest
from helpers.servers import Server, completion, failure
from PIL import Image

from mmr5_lab.models.chat import Chat, RequestError, page_url

NOT_TAKEN = failure(
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    param="max_tokens", code="unsupported_parameter",
)  # fmt: skip
ONLY_DEFAULT = failure(
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
    param="temperature", code="unsupported_value",
)  # fmt: skip


def prompt(question: str) -> list[dict]:
    text = f"The question is: {question}\n"
    return [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": text}]}]


def ask_all(chat: Chat, questions: list[str]) -> list[float]:
    """Seconds until each answer, all asked at once."""
    started, seconds = time.monotonic(), [0.0] * len(questions)

    def ask(k: int) -> None:
        chat.ask(prompt(questions[k]))
        seconds[k] = time.monotonic() - started

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def refused(chat: Chat, question: str = "q") -> RequestError:
    with pytest.raises(RequestError) as error:
        chat.ask(prompt(question))
    return error.value


def test_a_rate_limit_holds_back_all_requests():
    with Server({"q0": [(429, "0.6")]}) as server:
        chat = Chat(server.url, "m", concurrency=1)
        assert all(0.6 <= s < 2 for s in ask_all(chat, ["q0"]))
        server.turns["q1"] = [(429, "0.6")]
        thread = threading.Thread(target=chat.ask, args=(prompt("q1"),))
        thread.start()
        time.sleep(0.2)
        assert ask_all(chat, ["q2"])[0] > 0.2, "q2 was not refused itself"
        thread.join()


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_asks_to_wait_for_hours_ends_the_work(form):
    wait = "90000" if form == "seconds" else formatdate(time.time() + 90010, usegmt=True)
    with Server({"q": [(429, wait)]}) as server:
        chat = Chat(server.url, "m")
        error = refused(chat)
        assert error.fatal
        assert "it asks to wait 25.0 hours, start again then" in str(error)
        assert str(refused(chat, "other")) == str(error), "which is not sent"
        assert len(server.bodies) == 1


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
        assert "closed" in str(refused(chat))
    assert server.bodies == []


def test_a_key_that_the_server_repeats_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    says = failure("wrong key secret-7")
    with Server({"q": [(401, says)], "in a 200": [says.encode()], "odd": [b"secret-7"]}) as server:
        error = refused(Chat(server.url, "m"))
        assert len(server.bodies) == 1
        reply = Chat(server.url, "m").ask(prompt("in a 200"))
        unreadable = refused(Chat(server.url, "m", retries=0), "odd")
    assert error.fatal
    assert str(error) == f"AuthenticationError 401: {server.url}: wrong key (key)"
    assert reply.detail == "wrong key (key)"
    assert "secret-7" not in str(unreadable)


@pytest.mark.parametrize(
    "turn",
    [
        (429, failure("no money", code="insufficient_quota")),
        (429, failure("no money", type="insufficient_quota")),
        (400, failure("pay", code="billing_hard_limit_reached")),
        (402, failure("Insufficient Balance")),
        (404, failure("The model `m` does not exist")),
    ],
)
def test_what_every_request_would_meet_is_met_once(turn):
    with Server({"q": [turn]}) as server:
        chat = Chat(server.url, "m")
        error = refused(chat)
        assert (error.fatal, error.billable) == (True, False)
        assert refused(chat, "another").fatal
        assert len(server.bodies) == 1


def test_a_page_that_moderation_refuses_does_not_end_the_work():
    with Server({"q": [(403, failure("Your input was flagged by moderation"))]}) as server:
        chat = Chat(server.url, "m")
        assert not refused(chat).fatal
        assert chat.ask(prompt("another")).problem is None


@pytest.mark.parametrize(
    ("turn", "kind"),
    [
        ((413, failure("Request Entity Too Large")), "APIStatusError 413"),
        ((400, failure("This model's maximum context length is 32768 tokens")), "BadRequestError 400"),
        ((400, failure("the request exceeds the available context size")), "BadRequestError 400"),
    ],
)
def test_what_is_too_large_says_what_to_lower(turn, kind):
    with Server({"q": [turn]}) as server:
        error = refused(Chat(server.url, "m"))
        assert len(server.bodies) == 1
    assert str(error).startswith(f"{kind}: {server.url}: too much for it, lower the pixels of a page (max_pixels)")


@pytest.mark.parametrize(
    ("status", "message", "sent"),
    [
        (400, NOT_TAKEN, {"max_completion_tokens": 7, "temperature": 0.0, "top_p": 1.0, "seed": 3}),
        (400, ONLY_DEFAULT, {"max_tokens": 7, "top_p": 1.0, "seed": 3}),
        (422, '{"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}',
         {"max_tokens": 7, "temperature": 0.0, "top_p": 1.0}),
        (400, failure("`temperature` and `top_p` cannot both be specified for this model"),
         {"max_tokens": 7, "temperature": 0.0, "seed": 3}),
    ],
)  # fmt: skip
def test_an_option_that_the_model_does_not_take_is_changed_once(status, message, sent):
    options = {"max_tokens": 7, "temperature": 0.0, "top_p": 1.0, "seed": 3}
    with Server({"q0": [(status, message)]}) as server:
        chat = Chat(server.url, "m", retries=0)
        assert chat.ask(prompt("q0"), **options).problem is None, "it does not count as a try"
        chat.ask(prompt("q1"), **options)
    assert [{k: v for k, v in body.items() if k not in ("model", "messages")} for body in server.bodies] == [
        options, sent, sent
    ]  # fmt: skip


def test_an_option_that_is_refused_for_its_value_is_not_changed():
    too_large = "'max_tokens' or 'max_completion_tokens' is too large: 9000. The maximum context length is 4096 tokens"
    with Server({"q": [(400, failure(too_large)), (400, failure("temperature must be at most 2"))]}) as server:
        chat = Chat(server.url, "m")
        assert "too large: 9000" in str(chat_refusal(chat, max_tokens=9000))
        assert "at most 2" in str(chat_refusal(chat, temperature=3.0))
        assert len(server.bodies) == 2


def chat_refusal(chat: Chat, **options) -> RequestError:
    with pytest.raises(RequestError) as error:
        chat.ask(prompt("q"), **options)
    return error.value


def test_each_try_is_passed_to_whoever_books_it():
    tries = []

    def book(send):
        try:
            reply = send()
        except RequestError as error:
            tries.append((str(error).partition(":")[0], error.billable))
            raise
        tries.append(reply.prompt_tokens)
        return reply

    with Server({"q": [500, b"odd", "cut", 429]}) as server:
        Chat(server.url, "m", pause=0.01).ask(prompt("q"), book)
    billable = [("unreadable", True), ("no connection", True)]
    assert tries == [("InternalServerError 500", False), *billable, ("RateLimitError 429", False), 1]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sk-a\nb", r"character 5 of 6 is '\\n'"),
        ("sk-ab\n", r"character 6 of 6 is '\\n'"),
        ("sk–ab", r"character 3 of 5 is '\\u2013'"),
        ("sk ab", "character 3 of 5 is ' '"),
    ],
)
def test_a_key_that_no_header_holds_is_named(monkeypatch, key, message):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=f"OPENAI_API_KEY is not a key: {message}") as error:
        Chat("http://127.0.0.1:9/v1", "m")
    assert "sk" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "127.0.0.1:8000/v1", "", "http://", "ftp://a/v1", "http://a b/v1", "http://a:99999/v1"]
)
def test_an_address_without_scheme_or_host_is_named(url):
    with pytest.raises(ValueError, match="is not the address of a server") as error:
        Chat(url, "m")
    assert repr(url) in str(error.value)


def test_a_wrong_port_or_host_is_named_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.monotonic()
    chat = Chat(url, "m")
    error = refused(chat)
    assert str(error) == f"no connection: {url.replace('user:secret@', '')}: [Errno 111] Connection refused"
    assert (error.fatal, error.billable) == (True, False)
    assert refused(chat).fatal
    assert "no connection: http://nohost.invalid/v1: " in str(refused(Chat("http://nohost.invalid/v1", "m")))
    assert time.monotonic() - started < 2, "nothing was tried again"


def test_a_server_that_starts_again_is_waited_for():
    with Server({}) as server:
        chat = Chat(server.url, "m", retries=8, pause=0.2)
        chat.ask(prompt("q"))
        port = server.http.server_port
    threading.Timer(0.5, lambda: again.append(Server({}, port=port))).start()
    again: list[Server] = []
    assert chat.ask(prompt("q")).problem is None
    again[0].__exit__()


def test_a_reply_is_final_whatever_it_says():
    turns = [completion("half", "length"), completion(None, refusal="no"), completion(""), failure("broken").encode()]
    with Server({f"q{k}": [turn] * 9 for k, turn in enumerate(turns)}) as server:
        replies = [Chat(server.url, "m").ask(prompt(f"q{k}")) for k in range(len(turns))]
        assert len(server.bodies) == len(turns)
    assert [reply.problem for reply in replies] == ["cut", "refused", "empty", "failed"]
    assert replies[3].reason == "failed: the server reports an error (broken)"


@pytest.mark.parametrize(("kind", "mode", "same"), [("JPEG", "RGB", True), ("PNG", "RGB", True), ("PNG", "LA", False)])
def test_page_files_are_sent_as_they_are_where_every_server_takes_them(kind, mode, same):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, kind)
    head, data = page_url(buffer.getvalue()).split(",")
    sent = base64.b64decode(data)
    assert (sent == buffer.getvalue()) == same
    assert head == f"data:image/{kind.lower()};base64"
    assert Image.open(io.BytesIO(sent)).mode in ("RGB", "L")


@pytest.mark.parametrize(
    ("size", "budget", "sent"),
    [
        ((200, 100), 5000, (84, 28)),  # as Qwen2.5-VL's processor would, in whole tokens
        ((200, 100), 20_000, (200, 100)),
        ((200, 100), None, (200, 100)),
        ((9, 1), 1, (3, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pages_are_brought_into_a_pixel_budget(size, budget, sent, kind):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    head, data = page_url(buffer.getvalue(), budget).split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == sent
    assert head == f"data:image/{kind.lower()};base64"
    assert image.convert("RGB").getpixel((0, 0))[0] > 250


@pytest.mark.parametrize(
    ("options", "message"), [({"concurrency": 0}, "concurrency is"), ({"per_minute": 0}, "per_minute 0")]
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Chat("http://127.0.0.1:9/v1", "m", **options)
