from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.wire import fake_vllm, free_port

from pipeline.errors import ServingError
from pipeline.evaluation import client
from pipeline.evaluation.client import RequestFailed

ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)


def ask(url: str, **options) -> dict:
    async def work() -> dict:
        async with client.connect(url, options.pop("api_key", None), 1) as http:
            return await client.complete(http, "m", ASKED, **options)

    return asyncio.run(work())


class Scripted(BaseHTTPRequestHandler):
    """Answers with the statuses it was given, one a request, and notes what it was sent."""

    def do_POST(self):
        """Answer with the next status of the script."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(self.headers.get("Authorization"))
        status = self.server.script.pop(0)
        status, page = (200, True) if status == "page" else (status, False)
        body = b"<html>" if page else b'{"choices": []}' if status == 200 else b'{"error": {"message": "in words"}}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def scripted():
    server = HTTPServer(("127.0.0.1", 0), Scripted)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url_of(server: HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_a_completion_is_greedy_and_whole():
    """The server's answer comes back as it is, asked for at temperature 0."""
    with fake_vllm("m", answer="good day") as url:
        answer = ask(url, max_tokens=8, return_token_ids=True)
    assert answer["choices"][0]["message"]["content"] == "good day"
    assert answer["prompt_token_ids"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_faults_are_tried_again(scripted, status):
    """Two bad answers and a good one are a success in three requests."""
    scripted.script = [status, status, 200]
    assert ask(url_of(scripted)) == {"choices": []}
    assert len(scripted.seen) == 3


def test_a_fault_that_stays_is_the_requests_failure(scripted):
    """After the third try the server's own words are raised."""
    scripted.script = [500, 500, 500]
    with pytest.raises(RequestFailed, match="HTTP 500: in words"):
        ask(url_of(scripted))
    assert scripted.script == []


def test_a_page_in_an_answers_place_is_the_requests_failure(scripted):
    """As a proxy sends it; the beginning is told."""
    scripted.script = ["page"]
    with pytest.raises(RequestFailed, match="without a JSON object: '<html>'"):
        ask(url_of(scripted))


def test_a_bad_request_is_not_repeated(scripted):
    """What is wrong with the request itself won't get better."""
    scripted.script = [400, 200]
    with pytest.raises(RequestFailed, match="HTTP 400: in words"):
        ask(url_of(scripted))
    assert len(scripted.seen) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_everyone_stops_the_run(scripted, status):
    """A wrong key or model name is no failure of one item."""
    scripted.script = [status]
    with pytest.raises(ServingError, match=rf"refuses /v1/chat/completions: HTTP {status}: in words"):
        ask(url_of(scripted))


def test_the_key_is_sent_as_a_bearer_token(scripted):
    """And nothing is sent without one."""
    scripted.script = [200, 200]
    ask(url_of(scripted), api_key="secret")
    ask(url_of(scripted))
    assert scripted.seen == ["Bearer secret", None]


def test_a_silent_server_is_the_requests_failure(monkeypatch):
    """A time-out is counted and not repeated: it has cost enough."""
    monkeypatch.setattr(client, "TIMEOUT_S", 0.3)
    with fake_vllm("m", delay=5) as url, pytest.raises(RequestFailed, match="no answer within"):
        ask(url)


def test_nobody_listening_is_the_servers_failure():
    """The address is named."""
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServingError, match=rf"the server at {url} is gone: ConnectError"):
        ask(url)


def test_proxies_of_the_environment_are_not_followed(monkeypatch):
    """Traffic to our own server never leaves the machine."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with fake_vllm("m") as url:
        assert ask(url)["choices"]


def test_tokens_come_and_go_as_text():
    """What tokenize gives, detokenize reads; ids that are none are shown as such."""

    async def work(url: str) -> tuple[str, str]:
        async with client.connect(url, None, 1) as http:
            ids = await client.tokenize(http, "m", ASKED, prompt=True)
            return await client.detokenize(http, "m", ids), await client.detokenize(http, "m", ids[:4])

    with fake_vllm("m") as url:
        assert asyncio.run(work(url)) == (
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
            "<|im",
        )
