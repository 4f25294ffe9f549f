"""A chat server of this process that answers with any fault, over real sockets."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

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
        self.bodies, self.keys, self.busy, self.most, self.closed = [], [], 0, 0, False
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                    server.bodies.append(body)
                    server.keys.append(self.headers["Authorization"])
                    text = body["messages"][-1]["content"][0]["text"]
                    question = next((q for q in server.turns if re.search(rf": {re.escape(q)}(\n|$)", text)), "")
                    turns = server.turns.get(question)
                    turn = turns.pop(0) if turns else completion(answer(text))
                    turn = turn(body) if callable(turn) else turn
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

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True
        self.http.shutdown()
        self.http.server_close()
