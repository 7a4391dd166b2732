"""The webhook that hears of a waiting review, over a real wire."""

from __future__ import annotations

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.wire import free_port

from pipeline.config.schema import NotifyConfig
from pipeline.registry import notify

FINISHED = {
    "name": "tickets", "version": "3", "run_id": "r1", "unit_digest": "d" * 64, "outcome": "pass",
    "page": "http://127.0.0.1:5000/#/models/tickets/versions/3",
}  # fmt: skip
SETTINGS = NotifyConfig(webhook_env="REVIEW_WEBHOOK")


@pytest.fixture
def receiver():
    """An HTTP server that keeps what it is sent and answers with the status that the test chose."""

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.got.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(server.status)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.status = [], 200
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server):
    return f"http://127.0.0.1:{server.server_address[1]}/hooks/top-secret?token=hush"


def test_the_webhook_gets_what_finished(receiver, monkeypatch):
    """One JSON POST with a sentence for people and the fields for programs."""
    monkeypatch.setenv("REVIEW_WEBHOOK", address(receiver))
    assert notify.review_waits(FINISHED, SETTINGS)
    [(path, kind, body)] = receiver.got
    assert (path, kind) == ("/hooks/top-secret?token=hush", "application/json")
    assert {key: body[key] for key in FINISHED} == FINISHED
    assert body["text"] == (
        "tickets version 3 passed its gate and waits for review: http://127.0.0.1:5000/#/models/tickets/versions/3"
    )


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_webhook_that_refuses_fails_nothing_and_shows_no_secret(receiver, monkeypatch, caplog, status):
    """The build goes on; the log has status and variable, never the address; redirects aren't followed."""
    receiver.status = status
    monkeypatch.setenv("REVIEW_WEBHOOK", address(receiver))
    with caplog.at_level(logging.DEBUG, logger="pipeline"), caplog.at_level(logging.INFO):
        assert not notify.review_waits(FINISHED, SETTINGS)
    assert f"the webhook of REVIEW_WEBHOOK answered {status}" in caplog.text
    assert "secret" not in caplog.text
    assert "hush" not in caplog.text
    assert len(receiver.got) == 1


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}/top-secret", "ftp://top-secret", "http://[top-secret", "top-secret"]
)
def test_an_address_that_nobody_answers_fails_nothing(monkeypatch, caplog, url):
    """A dead host, a wrong scheme, an address that is none: a warning without the address."""
    monkeypatch.setenv("REVIEW_WEBHOOK", url.format(port=free_port()))
    assert not notify.review_waits(FINISHED, SETTINGS)
    assert "the webhook of REVIEW_WEBHOOK can't be reached" in caplog.text
    assert "secret" not in caplog.text


def test_nobody_is_told_when_nobody_is_named(monkeypatch, caplog):
    """Without the setting there is silence; with a setting whose variable is missing, a warning."""
    monkeypatch.delenv("REVIEW_WEBHOOK", raising=False)
    assert not notify.review_waits(FINISHED, NotifyConfig())
    assert caplog.text == ""
    assert not notify.review_waits(FINISHED, SETTINGS)
    assert "REVIEW_WEBHOOK of notify.webhook_env isn't set" in caplog.text
