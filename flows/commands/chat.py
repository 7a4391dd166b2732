"""`tunegate chat`: talk to the live release through its proxy, or to a candidate that is started for this chat alone."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from flows import progress
from flows.commands.review import one_name, waiting
from pipeline import store
from pipeline.chat import client, stream
from pipeline.deployment import promote
from pipeline.errors import ReviewError, ServingError
from pipeline.registry import versions
from pipeline.serving import runtimes, serve
from pipeline.serving.server import ToServe

ANSWER_TIMEOUT_S = 600.0


def chat(options: argparse.Namespace) -> int:
    """Send messages, of a conversation or the one of --message, and print the answers as they stream.

    Raises ServingError when nothing serves or answers, ReviewError when no candidate waits.
    """
    name = one_name(options.name)
    with (
        _chat_server(name, candidate=options.candidate) as (url, key, model),
        client(url, ANSWER_TIMEOUT_S, key) as http,
    ):
        messages = [{"role": "system", "content": options.system}] if options.system else []
        for text in [options.message] if options.message else _typed():
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _say(http, model, messages)})
    return 0


@contextmanager
def _chat_server(name: str, *, candidate: bool) -> Iterator[tuple[str, str | None, str]]:
    """The URL to ask, its API key, and the model's name there."""
    if not candidate:
        live = promote.status(name)
        if live.url is None:
            raise ServingError(
                "no release is live", key=name, remedy=f"tunegate promote {name}, or tunegate chat {name} --candidate"
            )
        assert live.version is not None  # noqa: S101 - a release is live
        config = versions.config_of(versions.version(name, live.version).run_id)
        yield live.url, os.environ.get(config.promote.api_key_env), config.serve.served_model_name or name
        return
    version = waiting(name)
    if version is None:
        raise ReviewError("no version waits for review", key=name, remedy=f"tunegate chat {name}")
    config = versions.config_of(version.run_id)
    environment = runtimes.environment_of(config.model_dump(mode="json"))
    folder = store.home() / "work" / "chat" / name
    to_serve = ToServe(version.unit, versions.model_path(version), config.serve, name, folder, environment)
    with progress.shown() as on_event, serve.running(to_serve, on_event) as server:
        yield server.url, None, server.model


def _typed() -> Iterator[str]:
    print("an empty line or Ctrl-D ends the chat")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        yield text


def _say(http: httpx.Client, model: str, messages: list[dict[str, str]]) -> str:
    """Print an answer piece by piece; returns the whole."""
    answer = ""
    for piece in stream(http, model, messages):
        answer += piece
        print(piece, end="", flush=True)
    print()
    return answer
