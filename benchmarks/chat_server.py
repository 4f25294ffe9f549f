"""A stand-in for a model's API, in a process of its own: answers after a fixed time, and fails now and then.

    python benchmarks/chat_server.py LATENCY FAILING [ANSWER]    # seconds, share, text; prints the port

Without ANSWER it is a teacher. Of the failures three fifths are status 503, the rest connections cut before an answer.
"""

import json
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

latency, failing, answer = float(sys.argv[1]), float(sys.argv[2]), " ".join(sys.argv[3:])
draw, lock = random.Random(0), threading.Lock()
CAN, CANNOT = "It answers the question, by words about {}.", "It does not help, for it is about {}."


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(latency)
        with lock:
            fate, word = draw.random(), "".join(draw.choices("abcdefghij", k=30))
        if fate < 0.4 * failing:
            self.close_connection = True
            return
        said = answer or (CAN if b" can help answer" in body[:2000] else CANNOT).format(" ".join(word))
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1300, "completion_tokens": 40, "total_tokens": 1340}
        whole = {"id": "", "object": "chat.completion", "created": 0, "model": "", "choices": [choice], "usage": usage}
        status, data = (503, b"{}") if fate < failing else (200, json.dumps(whole).encode())
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
