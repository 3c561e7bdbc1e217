"""A stand-in for an OpenAI-compatible chat server: what it says is a function of the request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, object]


def said(text: str, *, tokens: int = 7, finish_reason: str = "stop", **message: object) -> Answer:
    """The answer of a chat completion."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    return 200, {"choices": [choice], "usage": {"completion_tokens": tokens}}


class ChatStub:
    """Answers chats as `chat(text, body)` says, and keeps the requests; `models` is what it serves."""

    def __init__(self, chat: Callable[[str, dict], Answer], models: object = None) -> None:
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.models: object = models or {"data": [{"id": "teacher", "root": "org/teacher"}]}
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200 if self.path in ("/health", "/v1/models") else 404, stub.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions", self.path
                stub.asked.append(body)
                stub.keys.append(self.headers.get("Authorization"))
                self.answer(*chat(body["messages"][0]["content"], body))

            def answer(self, status: int, content: object) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that was killed closes its socket
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
