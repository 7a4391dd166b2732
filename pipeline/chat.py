"""HTTP to our own servers on this machine, and one client of their OpenAI chat API.

No request goes through a proxy of the environment: HTTP_PROXY would send even 127.0.0.1 elsewhere. No certificate is read: a
client that may meet TLS takes 70 ms to make.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from pipeline.errors import ServingError

COMPLETIONS = "/v1/chat/completions"
LAST = "data: [DONE]"
REMEDY = "read the server's log, which `tunegate logs` shows of a promoted model"
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Answer:
    """One chat completion: its text, why it ended (stop, length, …) and how many tokens it has, at least 1."""

    text: str
    finish_reason: str
    tokens: int


def client(url: str, timeout_s: float, key: str | None = None) -> httpx.Client:
    """A client whose requests start at `url`, an http:// address of ours, and carry the API key if there is one."""
    headers = {"Authorization": f"Bearer {key}"} if key else None
    return httpx.Client(base_url=url, timeout=timeout_s, headers=headers, verify=False, trust_env=False)  # noqa: S501 - no TLS here


def complete(http: httpx.Client, model: str, messages: Messages, max_tokens: int) -> Answer:
    """One greedy chat completion. Raises ServingError when the server doesn't answer with at least one token."""
    with _as_serving_errors(http):
        response = http.post(COMPLETIONS, json={**_body(model, messages), "max_tokens": max_tokens})
        _raise_for_status(response)
        completion = response.json()
        choice = completion["choices"][0]
        answer = Answer(
            str(choice["message"]["content"] or ""),
            str(choice["finish_reason"]),
            completion["usage"]["completion_tokens"],
        )
        if answer.tokens < 1:
            raise ServingError(
                f"the server answers with 0 tokens: {response.text[:300]}", key=_url(http), remedy=REMEDY
            )
    return answer


def stream(http: httpx.Client, model: str, messages: Messages, max_tokens: int | None = None) -> Iterator[str]:
    """The pieces of one greedy chat completion as they come. Raises ServingError unless the stream ends with [DONE]."""
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    body = {**_body(model, messages), **limit, "stream": True}
    with _as_serving_errors(http), http.stream("POST", COMPLETIONS, json=body) as response:
        _raise_for_status(response)
        line = ""
        for line in filter(None, response.iter_lines()):
            if line.startswith("data: ") and line != LAST:
                yield _piece(line)
        if line != LAST:
            raise ServingError(f"a stream ended in {line[:300]!r}", key=_url(http), allowed=LAST, remedy=REMEDY)


def _piece(line: str) -> str:
    """The text in one event of a stream; an event with token counts alone has none. Raises ValueError for an error's event."""
    event = json.loads(line.removeprefix("data: "))
    if "choices" not in event:
        raise ValueError(line[:300])
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _body(model: str, messages: Messages) -> dict[str, object]:
    return {"model": model, "messages": list(messages), "temperature": 0}


def _url(http: httpx.Client) -> str:
    return str(http.base_url).rstrip("/")


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_error:
        response.read()
        response.raise_for_status()


@contextmanager
def _as_serving_errors(http: httpx.Client) -> Iterator[None]:
    """Turn an error of HTTP, and an answer of another shape, into a ServingError."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        status, text = error.response.status_code, error.response.text[:300]
        raise ServingError(f"a completion ended in {status}: {text}", key=_url(http), remedy=REMEDY) from error
    except httpx.HTTPError as error:
        raise ServingError(f"a completion got no answer: {error!r}", key=_url(http), remedy=REMEDY) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ServingError(f"an answer isn't a completion: {error!r}", key=_url(http), remedy=REMEDY) from error
