"""A running model server as a record, and what it is asked over HTTP: is it up, answering, busy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import httpx

from pipeline import loopback
from pipeline.artifacts import Record
from pipeline.errors import ServingError

BUSY = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)

METRICS_TIMEOUT_S = 5.0


class Server(Record):
    """A model server that was started: enough to find, ask and stop it from another process.

    `pid` and `started` (clock ticks since boot) are the supervisor's of a process server, `container` is a
    container's id. `model` is the name that clients ask for, `folder` where its log and its state lie.
    """

    runtime: Literal["process", "docker"]
    unit_digest: str
    url: str
    model: str
    folder: Path
    log: Path
    pid: int | None = None
    started: int | None = None
    container: str | None = None


class Condition(Record):
    """How a server is now.

    `uptime_s` counts from its last start, `pid` and `container` are what runs, `in_flight` is None when it
    doesn't tell, `why` says what a dead one ended of, where that is known.
    """

    state: Literal["starting", "running", "restarting", "dead"]
    healthy: bool = False
    restarts: int = 0
    pid: int | None = None
    container: str | None = None
    uptime_s: float | None = None
    in_flight: int | None = None
    why: str = ""


def is_healthy(url: str, timeout_s: float = 5.0) -> bool:
    """Whether /health says 200; a generation may fail all the same."""
    try:
        with loopback.client(url, timeout_s) as http:
            return http.get("/health").status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def complete(url: str, model: str, timeout_s: float) -> str:
    """One real, short, greedy chat completion; its text. Raises ServingError when there is none."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    try:
        with loopback.client(url, timeout_s) as http:
            response = http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        if answer["usage"]["completion_tokens"] < 1:
            raise ServingError(f"the server answers with no token: {response.text[:300]}", key=url)
        return str(answer["choices"][0]["message"]["content"] or "")
    except httpx.HTTPStatusError as error:
        text = error.response.text[:300]
        raise ServingError(f"a completion ended in {error.response.status_code}: {text}", key=url) from error
    except httpx.HTTPError as error:
        raise ServingError(f"a completion got no answer: {error!r}", key=url) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ServingError(f"a completion isn't one: {response.text[:300]}", key=url) from error


def in_flight(url: str) -> int:
    """Requests that the server is working on or has waiting, by its own metrics; raises ServingError."""
    try:
        with loopback.client(url, METRICS_TIMEOUT_S) as http:
            response = http.get("/metrics")
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise ServingError(f"the server's metrics can't be read: {error!r}", key=url) from error
    found = BUSY.findall(response.text)
    if not found:
        raise ServingError("the server's metrics don't name its requests", key=f"{url}/metrics")
    return int(sum(float(value) for value in found))
