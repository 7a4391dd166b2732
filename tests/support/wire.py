"""Loopback helpers for tests: a free port, a fake vLLM of our own, and clients that stream through it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import httpx

from pipeline.serving import process

# Below those that servers of a promotion take, and below what Linux gives of its own accord.
PORTS = range(10000, 20000)
# One client for all: making one reads the machine's certificates, which no test here needs.
HTTP = httpx.Client(verify=False, timeout=30)
FAKE = Path(__file__).parents[1] / "fakes" / "fake_vllm.py"


def free_port() -> int:
    """A port that nobody listened on a moment ago, and that the system gives no outgoing connection."""
    return process.free_port(PORTS)


@contextmanager
def listening(server: HTTPServer) -> Iterator[None]:
    """The server answers in a thread of its own while the block runs."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def fake_vllm(name: str, port: int | None = None, **behaviour: Any) -> Iterator[str]:
    """A fake vLLM that serves `name` and answers with that word unless told otherwise; yields its URL."""
    port = port or free_port()
    chosen = {"answer": name, **behaviour}
    flags = [f"--fake-{key.replace('_', '-')}={value}" for key, value in chosen.items()]
    command = [sys.executable, str(FAKE), "--model", name, "--port", str(port), *flags]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{url}/health"))
        yield url
    finally:
        child.kill()
        child.wait()


def answers(url: str) -> bool:
    """Whether a GET gets a 200."""
    try:
        return HTTP.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def running(url: str) -> int:
    """Requests that a server is working on, by its own metrics."""
    metrics = HTTP.get(f"{url}/metrics").text
    return int(float(re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.MULTILINE)[0]))


def wait_for(condition, timeout_s: float = 30.0) -> None:
    """Poll until the condition holds; fail after the timeout."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def under_way(pool: Executor, send: Callable[[], Any], seen: Callable[[], bool], timeout_s: float = 60.0) -> Future:
    """A request that was seen in flight a moment ago.

    Polling misses a short answer on a machine that is busy with something else; then it is asked for again.
    """
    until = time.monotonic() + timeout_s
    sent = pool.submit(send)
    while not seen():
        assert time.monotonic() < until, "no request was seen in flight"
        if sent.done():
            sent.result()
            sent = pool.submit(send)
        time.sleep(0.02)
    return sent


def chat(url: str, client: httpx.Client = HTTP, **fields: Any) -> httpx.Response:
    """One chat completion."""
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    return client.post(f"{url}/v1/chat/completions", json=body)


def said(response: httpx.Response) -> str:
    """The text of a chat completion."""
    return str(response.json()["choices"][0]["message"]["content"])


def stream_chat(url: str) -> tuple[str, list[float], bool]:
    """One streamed completion: its text, when each piece came (monotonic s), whether it ended properly."""
    text, times, ended = "", [], False
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                times.append(time.monotonic())
    return text, times, ended
