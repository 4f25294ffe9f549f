"""Answer 100,000 requests as servers do, valid, cut, refused and odd: no good answer is lost or asked for twice.

    python benchmarks/replies.py [--replies 100000] [--sockets 3000] [--seed 0] [--json OUT]

A teacher and a remote reranker ask for everything, run after run, until nothing is missing. Most replies go through the
real client on a transport in memory, the last `--sockets` of them through real sockets. Each run also asks for what was
answered before. Checked at the end, for each request: its good answer was kept as it was written, and served once; what
is no answer was served at most once a run; and the account holds what the replies said, to the token.
"""

import argparse
import base64
import json
import logging
import random
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import openai

from mmr5_lab.models.chat import Chat
from mmr5_lab.reranking.ranking import RemoteError
from mmr5_lab.reranking.remote import RemoteReranker
from mmr5_lab.traces.account import Account
from mmr5_lab.traces.teachers import ServerTeacher, TeacherError, TeacherGoneError

RETRIES = 2
MOST = 300  # completion tokens that a request may take
THREADS = 8
PAGE = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")

Turn = tuple[str, int, bytes]  # what it is; HTTP status, 0: the connection is cut, 1: no word comes; body


def completion(message: Any, ended: Any = "stop", usage: Any = None, **more: Any) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": ended}], "usage": usage, **more}).encode()


def failure(message: Any, **more: Any) -> bytes:
    return json.dumps({"error": {"message": message, **more}}).encode()


def usage_of(draw: random.Random) -> tuple[dict[str, int], int]:
    """A count of tokens as a server writes it, and the completion tokens that it means."""
    prompt, written, thought = draw.randrange(1, 2000), draw.randrange(0, 200), draw.choice([0, 0, 50])
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written + thought}, (
        written + thought
    )


def good(draw: random.Random, answer: str) -> tuple[bytes, int]:
    """A good answer in one of the shapes that servers write, and the completion tokens to pay for."""
    think = draw.choice(["Hm.", "Image 1, then.\nImage 2.", "日本 «é» 😀"])
    messages: list[Any] = [
        {"content": f"<think>{think}</think>{answer}"},
        {"content": f"{think}</think>{answer}"},
        {"content": answer, "reasoning": think, "refusal": None},
        {"content": answer, "reasoning_content": think},
        {"content": None, "reasoning": f"{think}</think>{answer}"},
        {"content": "", "reasoning_content": f"<think>{think}</think>{answer}"},
        {"content": f"<think>{think}</think>{answer}", "reasoning": think},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": think}]},
                {"type": "text", "text": answer},
            ]
        },
        {"content": [{"type": "text", "text": f"<think>{think}"}, {"type": "text", "text": f"</think>{answer}"}]},
    ]
    usage, tokens = usage_of(draw)
    usage, tokens = draw.choice([(usage, tokens)] * 5 + [(None, MOST), ({"prompt_tokens": "many"}, MOST)])
    ended = draw.choice(["stop", "stop", "eos", None, "end_turn"])
    body = completion(
        draw.choice(messages), ended, usage, **draw.choice([{}, {"error": None}, {"id": "x", "model": 5}])
    )
    return draw.choice([b"", b"", b"\n", b"\xef\xbb\xbf"]) + body, tokens


def no_answer(draw: random.Random, answer: str, cut: bool) -> tuple[bytes, int]:
    """A well-formed 200 that is no answer, and the completion tokens to pay for."""
    usage, tokens = usage_of(draw)
    half = answer[: draw.randrange(len(answer))]
    reported = draw.choice([True, False])
    bodies = [
        completion({"content": half}, "content_filter", usage),
        completion({"content": half}, "error", usage),
        completion({"content": None, "refusal": "I cannot help with this."}, "stop", usage),
        completion({"content": [{"type": "refusal", "refusal": "No."}]}, "stop", usage),
        completion({"content": None}, "stop", usage),
        completion({"content": half if cut else ""}, "length", usage),
        completion(None, "stop", usage),
        json.dumps({"choices": draw.choice([[], None]), "usage": usage}).encode(),
        json.dumps({"error": draw.choice(["overloaded", {"code": 502, "message": "x"}]),
                    **({"usage": usage} if reported else {})}).encode(),
    ]  # fmt: skip
    k = draw.randrange(len(bodies))
    return bodies[k], 0 if k == len(bodies) - 1 and not reported else tokens


def passing(draw: random.Random) -> tuple[int, bytes, int]:
    """Status and body of what passes, and the completion tokens that may be billed for it."""
    if draw.random() < 0.5:
        body = draw.choice(
            [b"", b"{}", b"[]", b"<html>busy</html>", failure("busy"), failure(None, code=[5]), b"\xff\x00"]
        )
        return draw.choice([408, 409, 429, 500, 502, 503, 504, 529]), body, 0
    odd: list[bytes] = [
        b"", b"garbage", b"<!doctype html>", b"[1]", b"null", b"5", b"{}", b'{"choices": {}}', b'{"choices": [null]}',
        completion({"content": 7}), completion({"content": [7]}), completion(5), completion({"content": "x"})[:-5],
        completion({"content": "x", "reasoning": ["y"]}), b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe{\x00}\x00",
    ]  # fmt: skip
    status = draw.choice([200] * 4 + [0, 1])
    return status, draw.choice(odd), MOST


def refused(draw: random.Random) -> tuple[int, bytes]:
    """What the server says no to, this once."""
    return draw.choice([
        (400, failure("bad page")), (400, failure("maximum context length is 4096 tokens")), (400, b"[]"), (400, b""),
        (413, b"<html>Too Large</html>"), (422, b'{"detail": [{"msg": 5}]}'), (403, failure("flagged by moderation")),
        (400, failure("filtered", code="content_filter")), (451, b"null"), (418, b'"tea"'),
    ])  # fmt: skip


FATAL = [
    (401, failure("wrong key")), (402, failure("no money")), (429, failure("no money", code="insufficient_quota")),
    (404, failure("no model")),
]  # fmt: skip


class Script:
    """What the server answers, drawn for each request from its own seed; and what of it must hold at the end."""

    def __init__(self, seed: int, answer: Callable[[str], str], cut: bool, fatal: float = 2e-4):
        """cut: an answer cut off at its token limit is none, which a reranker takes as its model's own"""
        self.seed, self.answer, self.cut, self.fatal, self.lock = seed, answer, cut, fatal, threading.Lock()
        self.draws: dict[str, random.Random] = {}
        self.kinds: Counter[str] = Counter()
        self.good: Counter[str] = Counter()  # good answers served, by request
        self.final: Counter[str] = Counter()  # what is no answer, by request, in this run
        self.tokens = 0  # of completions, to pay for
        self.errors: list[str] = []

    def turn(self, body: bytes) -> Turn:
        request = json.loads(body)
        content = request["messages"][-1]["content"]
        key = f"{re.search(r'Q[0-9]+[?]', content[0]['text'])[0]} {sum('image_url' in part for part in content)}"  # type: ignore[index]
        with self.lock:
            turn = self._draw(key, request)
            self.kinds[turn[0]] += 1
            return turn

    def _draw(self, key: str, request: dict[str, Any]) -> Turn:
        draw = self.draws.setdefault(key, random.Random(f"{self.seed} {key}"))
        if self.good[key]:
            self.errors.append(f"{key} was asked for after its good answer")
        fate = draw.random()
        if fate < self.fatal:
            return "fatal", *draw.choice(FATAL)
        if fate < 0.01 and "max_tokens" in request:
            return "option", 400, failure("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead")
        if fate < 0.3:
            status, body, tokens = passing(draw)
            self.tokens += tokens
            return "passing", status, body
        if fate < 0.35:
            return "refused", *refused(draw)
        kind, counts = ("no answer", self.final) if fate < 0.5 else ("good", self.good)
        answer = self.answer(key)
        body, tokens = good(draw, answer) if kind == "good" else no_answer(draw, answer, self.cut)
        self.tokens += tokens
        counts[key] += 1
        if counts[key] > 1:
            self.errors.append(f"{key} was asked for again after a well-formed reply")
        return kind, 200, body


@contextmanager
def in_memory(script: Script) -> Iterator[Callable[[Chat], Chat]]:
    """What puts a chat's client on a transport without sockets."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        _, status, body = script.turn(request.read())
        if status < 2:
            raise httpx2.ReadTimeout("no word") if status else httpx2.RemoteProtocolError("cut")
        return httpx2.Response(status, content=body, headers={"Retry-After": "0"} if status == 429 else None)

    def connect(chat: Chat) -> Chat:
        client = httpx2.Client(transport=httpx2.MockTransport(handle))
        chat._client = openai.OpenAI(base_url="http://memory/v1", api_key="k", max_retries=0, http_client=client)
        return chat

    yield connect


@contextmanager
def on_sockets(script: Script) -> Iterator[Callable[[Chat], Chat]]:
    """What puts a chat's client on a server of this process."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            _, status, body = script.turn(self.rfile.read(int(self.headers["Content-Length"])))
            if status < 2:  # before the head, or within the body
                self.close_connection = True
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{" if status else b"")
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def connect(chat: Chat) -> Chat:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        chat._client = openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=20)
        return chat

    yield connect
    server.shutdown()
    server.server_close()


class Pages:
    """As much of a corpus as a teacher needs."""

    def page_bytes(self, doc_name: str, page: int) -> bytes:
        return PAGE


def ask_teacher(script: Script, connect: Callable[[Chat], Chat], count: int, folder: Path) -> tuple[int, int]:
    """Runs until a teacher has explained a page for each of `count` questions, and refined every tenth; the account's
    sum in completion tokens."""
    questions = [{"question": f"What is Q{k}?", "doc_name": "d"} for k in range(count)]
    for run in range(1, 100):
        script.final.clear()
        chat = connect(Chat("http://memory/v1", "m", concurrency=THREADS, retries=RETRIES, pause=0.0))
        account = Account(folder / "answers.sqlite", price_out=1e6)
        teacher = ServerTeacher(Pages(), chat, account)  # type: ignore[arg-type]
        missing = []

        def ask(question: Any, teacher=teacher, missing=missing) -> None:
            number = int(question["question"][9:-1])
            try:
                said = {1: teacher.explain(question, 0, True)}
                if number % 10 == 0:
                    said[0] = teacher.refine(question, [0], [1])
                for shown, text in said.items():
                    if text != script.answer(f"Q{number}? {shown}"):
                        script.errors.append(f"Q{number}? {shown} was kept as {text!r}")
            except (TeacherError, TeacherGoneError):
                missing.append(question)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(ask, questions))
        spent = account.spent
        teacher.account.close()
        chat.close()
        if not missing:
            return run, round(spent)
    raise AssertionError(f"{len(missing)} questions were never explained")


def ask_reranker(script: Script, connect: Callable[[Chat], Chat], count: int) -> int:
    """Runs until a remote reranker has ranked for each of `count` questions, as `rerank_run` goes on."""
    remote = RemoteReranker("http://memory/v1", "m", concurrency=THREADS, retries=RETRIES, pause=0.0)
    open_chat = remote._open_chat
    remote._open_chat = lambda: connect(open_chat())  # type: ignore[assignment]
    missing = list(range(count))
    for run in range(1, 100):
        script.final.clear()
        done = set()
        try:
            for place, ranking in remote.rank_each([(f"What is Q{k}?", [PAGE] * 3) for k in missing]):
                done.add(missing[place])
                expected = script.answer(f"Q{missing[place]}? 3")
                if expected not in ranking.text or ranking.faults or not ranking.reasoning:
                    script.errors.append(f"Q{missing[place]}? was kept as {ranking.text!r}")
        except RemoteError as error:
            if len(done) + len(error.failures) != len(missing):
                script.errors.append("a question is neither ranked nor named")
        missing = [k for k in missing if k not in done]
        if not missing:
            return run
    raise AssertionError(f"{len(missing)} questions were never ranked")


def ranking_of(key: str) -> str:
    return f"<answer>{random.Random(key).sample([1, 2, 3], 3)}</answer>"


def fuzz(replies: int, sockets: bool, seed: int = 0) -> list[dict[str, Any]]:
    """At least `replies` replies to a teacher and a reranker, half each; a row for each of them."""
    rows = []
    for who, answer in (("teacher", lambda key: f"Because of {key}."), ("reranker", ranking_of)):
        kinds: Counter[str] = Counter()
        runs = 0
        while kinds.total() < replies // 2:
            script = Script(seed + runs, answer, cut=who == "teacher")
            with (on_sockets if sockets else in_memory)(script) as connect, tempfile.TemporaryDirectory() as folder:
                count = max(10, replies // 20)  # a question takes two or three replies
                if who == "teacher":
                    made, spent = ask_teacher(script, connect, count, Path(folder))
                    assert spent == script.tokens, f"{spent} tokens are booked, {script.tokens} were served"
                else:
                    made = ask_reranker(script, connect, count)
            assert not script.errors, script.errors[:5]
            kinds += script.kinds
            runs += made
        name = f"{who}{', real sockets' if sockets else ''}"
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        print(f"{name:24}{kinds.total():>8} replies in {runs} runs: {counts}", flush=True)
        row = {"name": f"{name}: good answers kept", "baseline": kinds["good"], "ours": kinds["good"], "ratio": 1.0}
        rows.append(row | {"unit": "answers", "kinds": dict(kinds)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=int, default=100_000)
    parser.add_argument("--sockets", type=int, default=3000, help="how many of them over real sockets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="OUT", type=Path)
    options = parser.parse_args()
    logging.getLogger("mmr5_lab").setLevel(logging.ERROR)  # options that are renamed
    rows = fuzz(options.replies - options.sockets, False, options.seed)
    if options.sockets:
        rows += fuzz(options.sockets, True, options.seed)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
