"""Requests lost while versions are promoted and rolled back under load, counted by clients of the proxy.

python benchmarks/promotion_under_load.py                          fake vLLM, real Caddy: a minute python
benchmarks/promotion_under_load.py --model A --model B      two model folders on the real vLLM python
benchmarks/promotion_under_load.py --reload                 for comparison: switch by loading a new Caddy
config

Clients keep their connections open and ask without a pause, half of them for streams. A request is dropped
when it gets no connection, no 200, or a stream that doesn't end in [DONE]. Prints one JSON object; exits 1
when one was dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.released import a_model

from pipeline.artifacts import Approval, Release
from pipeline.config.schema import Config
from pipeline.deployment import promote as deployment
from pipeline.deployment import proxy as routing
from pipeline.deployment import state
from pipeline.deployment.steps import Promotion
from pipeline.environments import interpreters
from pipeline.environments.interpreters import Environment
from pipeline.serving import serve as serving

NAME = "under-load"
Switch = Callable[[routing.Proxy, str | None], None]


class Load:
    """Clients that ask until they are told to stop, and what they saw."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.url, self.max_tokens = url, max_tokens
        self.seconds: list[float] = []
        self.dropped: list[str] = []
        self.answered_by: dict[str, int] = {}
        self.done = threading.Event()
        self.lock = threading.Lock()

    def client(self, *, stream: bool) -> None:
        """Ask over one kept connection, again and again."""
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.done.is_set():
                started = time.monotonic()
                try:
                    text = self._streamed(client, body) if stream else self._whole(client, body)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self._note(None, repr(error), time.monotonic() - started)
                else:
                    self._note(text, None, time.monotonic() - started)

    def _whole(self, client: httpx.Client, body: dict[str, Any]) -> str:
        response = client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])

    def _streamed(self, client: httpx.Client, body: dict[str, Any]) -> str:
        text, last = "", ""
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                last = line or last
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        if last != "data: [DONE]":
            raise ValueError(f"the stream ended in {last!r}")
        return text

    def _note(self, text: str | None, problem: str | None, seconds: float) -> None:
        with self.lock:
            self.seconds.append(seconds)
            if problem is not None:
                self.dropped.append(problem)
            else:
                self.answered_by[str(text)] = self.answered_by.get(str(text), 0) + 1


def fake_model(folder: Path, answer: str) -> Path:
    """A model folder for the fake vLLM, whose answers take a tenth of a second."""
    return a_model(folder, answer=" ".join([answer] * 4), token_delay=0.025)


def release(model: Path, version: str, config: Config, environment: Environment) -> Release:
    """The folder as an approved version; the approval is part of the set-up here, not of what is measured."""
    unit = serving.served_unit(model, config.serve, NAME, environment)
    approval = Approval(
        decision="approved", reviewer="benchmark", reason="", unit_digest=unit.digest, at=datetime.now(UTC)
    )
    return Release(name=NAME, version=version, run_id=version, model_path=model, unit=unit, approval=approval)


def reload_instead_of_rename(rename: Switch) -> Switch:
    """Switch in the usual way: the address stands in Caddy's config, and a new config is loaded."""

    def switch(proxy: routing.Proxy, upstream: str | None) -> None:
        rename(proxy, upstream)  # promotion reads there what is switched to
        dial = json.dumps({"dial": str(upstream).removeprefix("http://")})
        config = json.dumps(routing.read_config(proxy.folder)).replace('{"dial": "{file.upstream}"}', dial)
        with routing.admin(proxy.folder) as caddy:
            caddy.post("/load", json=json.loads(config)).raise_for_status()

    return switch


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Promote to and fro under load and return what the clients saw."""
    environment = (
        interpreters.find("serve")
        if options.model
        else Environment("serve", Path(sys.executable), (ROOT / "tests/fakes/fake_site",))
    )
    models = options.model or [fake_model(folder / answer, answer) for answer in ("one", "two")]
    serve = {"max_model_len": 512, "enforce_eager": True, "shutdown_timeout": 30}
    config = Config.model_validate(
        {
            "name": NAME,
            "data": {"datasets": [{"path": "-"}]},
            "serve": serve,
            "promote": {"port": options.port or free_port()},
        }
    )
    releases = [release(model.resolve(), str(number), config, environment) for number, model in enumerate(models, 1)]
    champions: list[str] = []

    def promote(target: Release) -> float:
        started = time.monotonic()
        deployment.promote(
            Promotion(target, config, environment, lambda _, version: champions.append(version), lambda _: None)
        )
        return time.monotonic() - started

    promote(releases[0])
    load = Load(routing.client_url(config.promote), options.max_tokens)
    took = []
    with ThreadPoolExecutor(options.clients) as pool:
        clients = [pool.submit(load.client, stream=bool(number % 2)) for number in range(options.clients)]
        try:
            for number in range(options.switches):
                earlier = deployment.previous(NAME)
                target = earlier.release if number % 2 and earlier else releases[(number + 1) % 2]
                took.append(promote(target))
            time.sleep(1)
        finally:
            load.done.set()
        for client in clients:
            client.result()
    live = state.read(NAME).live
    return {
        "vllm": "real" if options.model else "fake",
        "switch": "config reload" if options.reload else "file rename",
        "clients": options.clients,
        "promotions": (len(took) + 1) // 2,
        "rollbacks": len(took) // 2,
        "requests": len(load.seconds),
        "dropped": len(load.dropped),
        "why": sorted(set(load.dropped)),
        "answers": load.answered_by if not options.model else len(load.answered_by),
        "p50_ms": round(1000 * statistics.median(load.seconds), 1),
        "p99_ms": round(1000 * statistics.quantiles(load.seconds, n=100)[98], 1),
        "max_ms": round(1000 * max(load.seconds), 1),
        "promotion_s": [round(seconds, 2) for seconds in took],
        "live": live.release.version if live else None,
        "champion": champions[-1],
    }


def main() -> None:
    """Measure in a home of its own and stop everything that was started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="a model folder for the real vLLM; give two"
    )
    parser.add_argument("--switches", type=int, default=12, help="promotions and rollbacks in turn")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--port", type=int, default=None, help="the proxy's; default: a free one")
    parser.add_argument("--reload", action="store_true", help="switch by loading a new Caddy config, for comparison")
    options = parser.parse_args()
    if options.reload:
        routing.switch = reload_instead_of_rename(routing.switch)
        # Else each promotion would first load the config without an address.
        routing.running_config = routing.read_config
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNEGATE_HOME"] = f"{folder}/home"
        try:
            figures = measure(options, Path(folder))
        finally:
            deployment.stop(NAME)
    print(json.dumps(figures, indent=1))
    sys.exit(1 if figures["dropped"] else 0)


if __name__ == "__main__":
    main()
