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


def completion(text: str, ended: str = "stop", **more: str) -> bytes:
    message = {"role": "assistant", "content": text, **more}
    return json.dumps({
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": ended}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10},
    }).encode()  # fmt: skip


class Server:
    """Answers each question with its turns, one a request, then with `ANSWER`.

    A turn is a status, a status with what Retry-After says or with a JSON body, bytes, "hang" or "cut". `answer` makes
    what else is answered from the request's text.
    """

    def __init__(self, turns: dict[str, list], delay: float = 0.0, answer=lambda text: ANSWER):
        self.turns, self.delay = {question: list(given) for question, given in turns.items()}, delay
        self.bodies, self.keys, self.busy, self.most = [], [], 0, 0
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
                    asked = next((q for q in server.turns if re.search(rf": {re.escape(q)}(\n|$)", text)), None)
                    turn = server.turns[asked].pop(0) if asked and server.turns[asked] else completion(answer(text))
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

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
