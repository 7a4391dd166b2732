"""A model server as records: to start, started, and in its condition now; and its health and load, asked over HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from pipeline import chat
from pipeline.artifacts import Record, RuntimeName, ServedUnit
from pipeline.config.schema import ServeConfig
from pipeline.environments.interpreters import Environment
from pipeline.errors import ServingError

BUSY = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)

METRICS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ToServe:
    """A server to start: the unit that was judged, and all that starts it here.

    `model` is the model's folder. Clients ask for `name` unless `serve` names another. `folder` keeps the server's log and
    state. `environment` has vLLM; it is None for a runtime that brings its own.
    """

    unit: ServedUnit
    model: Path
    serve: ServeConfig
    name: str
    folder: Path
    environment: Environment | None


class Server(Record):
    """A model server that was started: enough to find, ask and stop it from another process.

    `pid` and `started` (clock ticks since boot) are the supervisor's of a process server, `container` is a
    container's id. `model` is the name that clients ask for, `folder` where its log and its state lie.
    """

    runtime: RuntimeName
    unit_digest: str
    url: str
    model: str
    folder: Path
    log: Path
    pid: int | None = None
    started: int | None = None
    container: str | None = None


class Condition(Record):
    """A server's condition now.

    `uptime_s` counts from its last start. `pid` and `container` are of the running server. `in_flight` is None when the
    server doesn't tell. `why` is the reason of a death, where it is known.
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
        with chat.client(url, timeout_s) as http:
            return http.get("/health").status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def in_flight(url: str) -> int:
    """Requests that the server is working on or has waiting, by its own metrics; raises ServingError."""
    try:
        with chat.client(url, METRICS_TIMEOUT_S) as http:
            response = http.get("/metrics")
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise ServingError(f"the server's metrics can't be read: {error!r}", key=url, remedy=chat.REMEDY) from error
    counts = BUSY.findall(response.text)
    if not counts:
        raise ServingError(
            "the server's metrics don't name its requests",
            key=f"{url}/metrics",
            allowed="vllm:num_requests_running and vllm:num_requests_waiting",
            remedy="remove flags from serve.extra_args that turn vLLM's metrics off, or use a vLLM that has them",
        )
    return int(sum(float(count) for count in counts))
