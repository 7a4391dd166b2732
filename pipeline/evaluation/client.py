"""The HTTP calls of an evaluation: a chat completion, tokenize and detokenize, with a few retries.

A request that fails for reasons of its own raises RequestFailed, which its caller counts; a server that is
gone or refuses everyone raises ServingError, which stops the run. Proxy variables of the environment are not
followed unless the server is somebody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from pipeline.errors import ServingError

Message = dict[str, str]

ATTEMPTS = 3
BACKOFF_S = 0.5
TIMEOUT_S = 600.0
PASSING = {408, 425, 429, 500, 502, 503, 504}
REFUSED = {401, 403, 404}


class RequestFailed(Exception):
    """One request failed for good; the message says how."""


def connect(url: str, api_key: str | None, connections: int, *, proxies: bool = False) -> httpx.AsyncClient:
    """A client for the server at `url`, to be closed by `async with`; `proxies`: the environment's are used."""
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(TIMEOUT_S, connect=10.0),
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        trust_env=proxies,
    )


async def post(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON and return the JSON answer; passing faults are tried ATTEMPTS times, time-outs only once.

    Raises RequestFailed, or ServingError when nobody listens or the key, model or path is refused.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            response = await http.post(path, json=body)
        except httpx.TimeoutException as error:
            raise RequestFailed(f"no answer within {TIMEOUT_S:.0f} s ({type(error).__name__})") from None
        except httpx.TransportError as error:
            if attempt == ATTEMPTS:
                raise _gone(http, error) from None
        else:
            if response.is_success:
                return _answer(response)
            if response.status_code in REFUSED:
                raise _refused(http, path, response)
            if response.status_code not in PASSING or attempt == ATTEMPTS:
                raise RequestFailed(f"HTTP {response.status_code}: {_reason(response)}")
        await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _answer(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON object; raises RequestFailed for anything else, such as a page that a proxy puts in its place."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise RequestFailed(f"HTTP {response.status_code} without a JSON object: {response.text.strip()[:100]!r}")
    return answer


async def complete(http: httpx.AsyncClient, model: str, messages: Sequence[Message], **options: Any) -> dict[str, Any]:
    """A greedy chat completion: the server's whole answer."""
    body = {"model": model, "messages": list(messages), "temperature": 0.0, **options}
    return await post(http, "/v1/chat/completions", body)


def shown(messages: Sequence[Message]) -> str:
    """A prompt as a person reads it in a report: the one message's words, or each message with its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


async def tokenize(http: httpx.AsyncClient, model: str, messages: Sequence[Message], *, prompt: bool) -> list[int]:
    """The ids of a conversation as the server renders it; `prompt`: with what opens the model's turn."""
    body = {
        "model": model,
        "messages": list(messages),
        "add_generation_prompt": prompt,
        "add_special_tokens": False,
    }
    return [int(token) for token in (await post(http, "/tokenize", body))["tokens"]]


async def detokenize(http: httpx.AsyncClient, model: str, tokens: Sequence[int]) -> str:
    """The text of token ids, or the ids themselves where the server can't decode them."""
    try:
        return str((await post(http, "/detokenize", {"model": model, "tokens": list(tokens)}))["prompt"])
    except RequestFailed:
        return f"<undecodable {list(tokens)}>"


def _reason(response: httpx.Response) -> str:
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = response.text
    return str(reason).strip()[:300] or response.reason_phrase


def _gone(http: httpx.AsyncClient, error: httpx.TransportError) -> ServingError:
    return ServingError(
        f"the server at {http.base_url} is gone: {type(error).__name__} {error}".rstrip(),
        remedy="read the server's log for why it ended; the same command again keeps the finished answers",
    )


def _refused(http: httpx.AsyncClient, path: str, response: httpx.Response) -> ServingError:
    return ServingError(
        f"the server at {http.base_url} refuses {path}: HTTP {response.status_code}: {_reason(response)}",
        remedy="check the served model's name and the variable that holds the API key",
    )
