"""An OpenAI-compatible endpoint on a real wire whose judge is a function of the conversation it is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.wire import listening

Judge = Callable[[str, str], "str | tuple[int, str]"]


class Endpoint(ThreadingHTTPServer):
    """The state that all requests share: every request's body, path and Authorization, as they came."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, judge: Judge) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.judge = judge
        self.asked: list[dict[str, Any]] = []
        self.heads: list[tuple[str, str | None]] = []

    @property
    def base_url(self) -> str:
        """As a config names it."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Chat completions."""

    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Let the judge see both answers; what it says is the completion, or (status, message) an error."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.heads.append((self.path, self.headers.get("Authorization")))
        said = self.server.judge(*answers_in(body["messages"][-1]["content"]))
        status, content = said if isinstance(said, tuple) else (200, said)
        answer: dict[str, Any] = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
        data = json.dumps(answer if status == 200 else {"error": {"message": content}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def answers_in(shown: str) -> tuple[str, str]:
    """The text between the marks of answer A and answer B."""
    texts = {
        name: text
        for name, _, text in re.findall(r"\[begin (answer [AB]) (\w+)\]\n(.*?)\n\[end \1 \2\]", shown, re.DOTALL)
    }
    return texts["answer A"], texts["answer B"]


@contextmanager
def endpoint(judge: Judge) -> Iterator[Endpoint]:
    """A judge that listens while the block runs."""
    server = Endpoint(judge)
    with listening(server):
        yield server


KEY = "sk-very-secret"


def verdict(winner: str) -> str:
    """A judge's usual answer."""
    return json.dumps({"reason": f"{winner} it is", "winner": winner})


def honest(first: str, second: str) -> str:
    """Prefers the longer answer, wherever it stands."""
    return verdict("tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B")
