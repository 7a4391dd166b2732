"""The chat client of our own servers, over the fake vLLM's real wire."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.wire import fake_vllm, free_port, listening

from pipeline import chat
from pipeline.errors import ServingError

HELLO = [{"role": "user", "content": "hello"}]


class Canned(BaseHTTPRequestHandler):
    """Answers every POST with the same bytes, and keeps what it was sent."""

    body = b""

    def do_POST(self) -> None:
        """Answer."""
        self.server.headers = self.headers
        self.server.request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


def canned(body):
    """A server that answers with these bytes."""
    return HTTPServer(("127.0.0.1", 0), type("Handler", (Canned,), {"body": body}))


def url_of(server):
    """The server's address."""
    return f"http://127.0.0.1:{server.server_port}"


def test_an_answer_has_its_text_its_end_and_its_tokens():
    """As far as max_tokens lets it."""
    with fake_vllm("m", answer="all is well") as url, chat.client(url, 30) as http:
        assert chat.complete(http, "m", HELLO, 16) == chat.Answer("all is well", "stop", 3)
        assert chat.complete(http, "m", HELLO, 2) == chat.Answer("all is", "length", 2)


def test_a_stream_comes_in_pieces():
    """Each as soon as it is there; together they are the answer."""
    with fake_vllm("m", answer="one two three", token_delay=0.2) as url, chat.client(url, 30) as http:
        pieces = [(piece, time.monotonic()) for piece in chat.stream(http, "m", HELLO)]
        assert list(chat.stream(http, "m", HELLO, max_tokens=1)) == ["", "one"]
    assert "".join(piece for piece, _ in pieces) == "one two three"
    assert pieces[-1][1] - pieces[0][1] > 0.3


def test_requests_are_greedy_and_carry_the_key():
    """The key is a bearer token; without one no header is sent."""
    server = canned(b"{}")
    with listening(server):
        for key, header in (("s3cret", "Bearer s3cret"), (None, None)):
            with chat.client(url_of(server), 5, key) as http, pytest.raises(ServingError):
                chat.complete(http, "m", HELLO, 7)
            assert server.headers["Authorization"] == header
    assert server.request == {"model": "m", "messages": HELLO, "temperature": 0, "max_tokens": 7}


def test_no_proxy_of_the_environment_is_asked(monkeypatch):
    """HTTP_PROXY would send even loopback elsewhere."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with fake_vllm("m", answer="here") as url, chat.client(url, 30) as http:
        assert chat.complete(http, "m", HELLO, 4).text == "here"


def whole(http, model):
    """The answer at once."""
    return chat.complete(http, model, HELLO, 4)


def streamed(http, model):
    """The answer's pieces."""
    return list(chat.stream(http, model, HELLO))


@pytest.mark.parametrize("ask", [whole, streamed])
def test_an_error_of_the_server_is_told_in_its_words(ask):
    """With the status, the server's address and a remedy; a server that isn't there is an error of the same kind."""
    with fake_vllm("m", error_every=1) as url, chat.client(url, 30) as http:
        with pytest.raises(
            ServingError, match=r"a completion ended in 500: .*EngineCore encountered an issue"
        ) as caught:
            ask(http, "m")
        with pytest.raises(ServingError, match=r"404: .*`other` does not exist"):
            ask(http, "other")
    (problem,) = caught.value.problems
    assert (problem.key, problem.remedy) == (url, chat.REMEDY)
    with chat.client(f"http://127.0.0.1:{free_port()}", 5) as http, pytest.raises(ServingError, match="got no answer"):
        ask(http, "m")


def completion(**fields):
    """A chat completion in OpenAI's shape."""
    choice = {"message": {"content": None}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 1}, **fields}).encode()


def test_an_answer_of_another_shape_is_an_error():
    """Also an answer without a token; an answer without text is none."""
    for body, words in [
        (b"<html>", "isn't a completion"),
        (completion(choices=[]), "isn't a completion"),
        (completion(usage={"completion_tokens": 0}), "with 0 tokens"),
    ]:
        server = canned(body)
        with listening(server), chat.client(url_of(server), 5) as http, pytest.raises(ServingError, match=words):
            chat.complete(http, "m", HELLO, 4)
    server = canned(completion())
    with listening(server), chat.client(url_of(server), 5) as http:
        assert chat.complete(http, "m", HELLO, 4) == chat.Answer("", "stop", 1)


PIECE = b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {}}\n\n'
END = b"data: [DONE]\n\n"


def test_a_stream_that_breaks_off_is_an_error():
    """In the middle, or with the server's own error; token counts at its end are no piece of the answer."""
    broken = PIECE + b'data: {"error": "engine"}\n\n' + END
    for body, words in [(PIECE, "a stream ended in"), (b"", "a stream ended in ''"), (broken, "engine")]:
        server = canned(body)
        with listening(server), chat.client(url_of(server), 5) as http, pytest.raises(ServingError, match=words):
            streamed(http, "m")
    server = canned(PIECE + USAGE + END)
    with listening(server), chat.client(url_of(server), 5) as http:
        assert "".join(chat.stream(http, "m", HELLO)) == "half"


def test_a_server_that_dies_in_the_middle_is_an_error():
    """The first pieces came; then the connection is gone."""
    with (
        fake_vllm("m", answer="a b c d e f", die_after=0) as url,
        chat.client(url, 30) as http,
        pytest.raises(ServingError, match="got no answer"),
    ):
        streamed(http, "m")
