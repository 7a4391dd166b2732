"""A server's answers about itself, over the fake vLLM's real wire."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.wire import fake_vllm, free_port, listening, stream_chat, wait_for

from pipeline.errors import ServingError
from pipeline.serving import server


class NoMetrics(BaseHTTPRequestHandler):
    """Is up, but its metrics say nothing of requests."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(503 if self.path == "/health" else 200)
        self.end_headers()
        self.wfile.write(b"python_gc_objects_collected_total 1.0\n")

    def log_message(self, *_: object) -> None:
        """Stay silent."""


def test_only_a_200_is_healthy():
    """A refusal and silence aren't."""
    with fake_vllm("m") as url:
        assert server.is_healthy(url)
    assert not server.is_healthy(url)
    unwell = HTTPServer(("127.0.0.1", 0), NoMetrics)
    with listening(unwell):
        assert not server.is_healthy(f"http://127.0.0.1:{unwell.server_port}")


def test_requests_in_flight_are_those_of_its_metrics():
    """Running and waiting together; none once all are answered."""
    with fake_vllm("m", answer="one two three four", token_delay=0.3) as url, ThreadPoolExecutor(2) as pool:
        assert server.in_flight(url) == 0
        streams = [pool.submit(stream_chat, url) for _ in range(2)]
        wait_for(lambda: server.in_flight(url) == 2)
        assert all(stream.result()[2] for stream in streams)
        wait_for(lambda: server.in_flight(url) == 0)


def test_metrics_that_do_not_tell_are_an_error_with_a_remedy():
    """A server that isn't there, and one whose metrics lack vLLM's counts."""
    silent = HTTPServer(("127.0.0.1", 0), NoMetrics)
    with listening(silent), pytest.raises(ServingError, match="don't name its requests") as caught:
        server.in_flight(f"http://127.0.0.1:{silent.server_port}")
    assert "serve.extra_args" in caught.value.problems[0].remedy
    with pytest.raises(ServingError, match="can't be read"):
        server.in_flight(f"http://127.0.0.1:{free_port()}")
