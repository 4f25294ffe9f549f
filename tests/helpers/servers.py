"""Chat servers over real sockets: one that answers with any fault, one with a model behind it, and other programs."""

import base64
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import regex
from PIL import Image

from mmr5_lab.models.generation import GREEDY

ANSWER = "<think>Image 2 fits.</think><answer>[2, 1]</answer>"


def pages(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (140, 168), (40 * k % 255, 60, 200)) for k in range(count)]


USAGE = {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}


def completion(content, ended: str | None = "stop", usage=USAGE, **more) -> bytes:
    """The body of a chat completion; `more` goes into its message."""
    message = {"role": "assistant", "content": content, **more}
    return json.dumps({
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": ended}],
        "usage": usage,
    }).encode()  # fmt: skip


def as_teacher(body: dict) -> bytes:
    """What a teacher writes about a page whose label the prompt tells, or of all pages; other words each time."""
    text = body["messages"][-1]["content"][0]["text"]
    words = " ".join(hashlib.sha256(json.dumps(body).encode()).hexdigest()[:12])
    if images := re.search(r"sentence why (.*?) can help answer", text):
        return completion(f"{images[1]} can help answer it, by words about {words}. The other images do not help.")
    helps = "can help answer" in text
    return completion(f"It {'answers the question' if helps else 'does not help'}, with words about {words}.")


def failure(message: str, **more) -> str:
    """The body of an error, as OpenAI and vLLM write it."""
    return json.dumps({"error": {"message": message, **more}})


class Server:
    """Answers each question with its turns, one a request, then with `ANSWER`.

    A turn is a status, a status with Retry-After or with a JSON body, bytes, "hang", "cut", or a function of the
    request's body that returns one of these. `answer` makes what else is answered from the request's text.
    """

    def __init__(self, turns: dict[str, list], delay: float = 0.0, answer=lambda text: ANSWER, port: int = 0):
        self.turns, self.delay = {question: list(replies) for question, replies in turns.items()}, delay
        self.answer = answer
        self.bodies, self.served, self.keys, self.busy, self.most, self.closed = [], [], [], 0, 0, False
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):  # the list of models
                data = b'{"object": "list", "data": []}'
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                    server.bodies.append(body)
                    server.keys.append(self.headers["Authorization"])
                    turn = server.turn(body)
                if server.closed:  # of a connection that was kept open
                    self.close_connection = True
                    return
                time.sleep(server.delay)
                with lock:
                    server.busy -= 1
                if turn == "hang":
                    time.sleep(3)
                if turn in ("hang", "cut"):
                    self.close_connection = True
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
                    return
                status, data, wait = 200, turn, "0"
                if isinstance(turn, int):
                    status, data = turn, b"{}"
                elif isinstance(turn, tuple):
                    status, more = turn
                    data, wait = (more.encode(), None) if more.startswith("{") else (b"{}", more)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429 and wait:
                    self.send_header("Retry-After", wait)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()  # to end at once

    def turn(self, body: dict):
        """What is answered to a request."""
        # a reranking server's request has no messages
        text = f": {body['query']}" if "query" in body else body["messages"][-1]["content"][0]["text"]
        question = next((q for q in self.turns if re.search(rf": {re.escape(q)}(\n|$)", text)), "")
        turns = self.turns.get(question)
        turn = turns.pop(0) if turns else completion(self.answer(text))
        self.served.append(turn)
        return turn(body) if callable(turn) else turn

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True
        self.http.shutdown()
        self.http.server_close()


class ModelServer(Server):
    """Answers greedily with a loaded reranker's model, and says log-probabilities as vLLM does.

    As in vLLM they are those among the tokens that a structured output allows, at most 20 (one, if the token
    itself). lacks: fields of a request that are ignored. refuses: those that are an error.
    """

    def __init__(self, reranker, lacks=(), refuses=(), top=20):
        super().__init__({})
        self.model, self.processor, self.lacks, self.refuses, self.top = (
            reranker.model, reranker.processor, lacks, refuses, top
        )  # fmt: skip
        tokenizer = self.processor.tokenizer
        self.end = tokenizer.eos_token_id
        self.special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]

    def turn(self, body: dict):
        if wrong := next((field for field in self.refuses if field in body), None):
            return 400, failure(f"Unrecognized request argument supplied: {wrong}")
        asked = {name: value for name, value in body.items() if name not in self.lacks}
        inputs, form = self.inputs(asked), _form(asked.get("structured_outputs"))
        width = inputs["input_ids"].shape[1]
        output = self.model.generate(
            **inputs, **GREEDY, max_new_tokens=body["max_tokens"], output_scores=True, return_dict_in_generate=True,
            prefix_allowed_tokens_fn=form and (lambda _, ids: self.following(form, ids[width:].tolist())),
        )  # fmt: skip
        written = output.sequences[0, width:].tolist()
        log_probs = [scores[0].float().log_softmax(-1) for scores in output.scores]
        top = min(self.top, body.get("top_logprobs") or 0)
        steps = [self.step(each, top, token) for each, token in zip(log_probs, written, strict=True)]
        ended = written[-1] == self.end
        text = self.processor.tokenizer.decode(written[:-1] if ended else written)
        reply = json.loads(completion(text, "stop" if ended else "length"))
        reply["usage"] = {"prompt_tokens": width,
                          "completion_tokens": len(written)}  # fmt: skip
        if asked.get("logprobs"):
            reply["choices"][0]["logprobs"] = {"content": steps}
        return json.dumps(reply).encode()

    def inputs(self, asked: dict) -> dict:
        urls = []
        messages = [{**message, "content": [_part(part, urls) for part in message["content"]]}
                    if isinstance(message["content"], list) else message for message in asked["messages"]]  # fmt: skip
        begun = asked.get("continue_final_message", False)
        prompt = self.processor.apply_chat_template(
            messages, tokenize=False, continue_final_message=begun, add_generation_prompt=not begun
        )
        images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        return dict(self.processor(text=[prompt], images=images or None, return_tensors="pt"))

    def following(self, form: str, written: list[int]) -> list[int]:
        begun = self.processor.tokenizer.decode(written)
        plain = [token for token, text in enumerate(self.texts) if text and token not in self.special]
        fitting = [token for token in plain if regex.fullmatch(form, begun + self.texts[token], partial=True)]
        return fitting + [self.end] * bool(regex.fullmatch(form, begun))

    def step(self, log_probs, top: int, token: int) -> dict:
        said = lambda k: {"token": self.texts[k], "logprob": max(float(log_probs[k]), -9999.0)}  # noqa: E731
        return {
            **said(token),
            "top_logprobs": [said(k) for k in log_probs[: len(self.texts)].topk(top).indices.tolist()],
        }


def _form(structured: dict | None) -> str | None:
    if structured is None:
        return None
    return structured.get("regex") or "|".join(map(re.escape, structured["choice"]))


def _part(part: dict, urls: list[str]) -> dict:
    if part["type"] != "image_url":
        return part
    urls.append(part["image_url"]["url"])
    return {"type": "image"}


@contextmanager
def started(command: list, log: Path, seconds: float, **environment: str):
    """Start a server with `--port N`, and yield its address up to /v1 when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=output, env=environment)
    try:
        until = time.monotonic() + seconds
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, f"no server after {seconds} s: {log.read_text()[-3000:]}"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()
