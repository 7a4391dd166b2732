"""`tunegate chat`: talk to the live release through its proxy, or to a candidate that is started for this chat alone."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from flows import progress
from flows.commands.review import one_name, waiting
from pipeline import loopback, store
from pipeline.deployment import promote
from pipeline.environments import interpreters
from pipeline.errors import ReviewError, ServingError
from pipeline.registry import versions
from pipeline.serving import serve


def chat(options: argparse.Namespace) -> int:
    """Send messages, of a conversation or the one of --message, and print the answers as they stream.

    Raises ServingError when nothing serves or answers, ReviewError when no candidate waits.
    """
    name = one_name(options.name)
    with _chat_server(name, candidate=options.candidate) as (url, headers, model):
        messages = [{"role": "system", "content": options.system}] if options.system else []
        for text in [options.message] if options.message else _typed():
            messages.append({"role": "user", "content": text})
            answer = _stream(url, headers, {"model": model, "messages": messages, "stream": True, "temperature": 0})
            messages.append({"role": "assistant", "content": answer})
    return 0


@contextmanager
def _chat_server(name: str, *, candidate: bool) -> Iterator[tuple[str, dict[str, str], str]]:
    """The URL to ask, its headers, and the model's name there."""
    if not candidate:
        live = promote.status(name)
        if live.url is None:
            raise ServingError(
                "no release is live", key=name, remedy=f"tunegate promote {name}, or tunegate chat {name} --candidate"
            )
        assert live.version is not None  # noqa: S101 - a release is live
        config = versions.config_of(versions.version(name, live.version).run_id)
        key = os.environ.get(config.promote.api_key_env)
        yield live.url, {"Authorization": f"Bearer {key}"} if key else {}, config.serve.served_model_name or name
        return
    version = waiting(name)
    if version is None:
        raise ReviewError("no version waits for review", key=name, remedy=f"tunegate chat {name}")
    config = versions.config_of(version.run_id)
    environment = interpreters.serving(config.model_dump(mode="json"))
    folder = store.home() / "work" / "chat" / name
    with (
        progress.shown() as on_event,
        serve.running(
            version.unit, versions.model_path(version), config.serve, name, folder, environment, on_event
        ) as server,
    ):
        yield server.url, {}, server.model


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


def _stream(url: str, headers: dict[str, str], body: dict[str, object]) -> str:
    said = ""
    try:
        with (
            loopback.client(url, 600) as http,
            http.stream("POST", "/v1/chat/completions", headers=headers, json=body) as response,
        ):
            if response.is_error:
                response.read()
                raise ServingError(
                    f"{url} answered {response.status_code}: {response.text[:300]}", remedy="tunegate status"
                )
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    piece = json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
                    said += piece
                    print(piece, end="", flush=True)
    except httpx.HTTPError as error:
        raise ServingError(f"{url} did not answer: {error}", remedy="tunegate status, tunegate logs") from error
    print()
    return said
