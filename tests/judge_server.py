"""A server that speaks OpenAI's chat completions and grades by a rule: `python tests/judge_server.py PORT [SECONDS]`."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def grade(prompt: str) -> str:
    """Full marks for an answer that has a letter e."""
    return f"It says something.\nMark: {10 if 'e' in prompt.rpartition('Answer to grade:')[2].partition('Reply')[0] else 2}"


class JudgeServer(ThreadingHTTPServer):
    """Keeps what it was asked, and how many requests were under way at the same time.

    Args:
        reply: from what it is told to the content of its message, or to (status, body), with the length that it says it has.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, seconds: float = 0.0, reply: Callable[[str], object] = grade):
        super().__init__(("127.0.0.1", port), _Handler)
        self.seconds, self.reply = seconds, reply
        self.models = ["a-judge"]
        self.asked: list[dict] = []
        self.most, self._running, self._lock = 0, 0, threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def count(self, change: int) -> None:
        with self._lock:
            self._running += change
            self.most = max(self.most, self._running)


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """One that answers until the context is left."""
    with JudgeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body["authorization"] = self.headers.get("Authorization")
        self.server.asked.append(body)
        self.server.count(1)
        time.sleep(self.server.seconds)
        reply = self.server.reply(body["messages"][0]["content"])
        self.server.count(-1)
        if isinstance(reply, tuple):
            self._send(*reply)
        else:
            self._send(200, {"choices": [{"message": {"role": "assistant", "content": reply}}]})

    def _send(self, status: int, content: object, length: int | None = None) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    JudgeServer(int(sys.argv[1]), *(float(value) for value in sys.argv[2:])).serve_forever()
