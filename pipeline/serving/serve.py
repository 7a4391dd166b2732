"""Serving a model with vLLM, in any of the runtimes, behind one interface.

A server is started as a ServedUnit says, and only if the same lies here now: other bytes, packages, flags or hardware are
refused. A server is ready once a real completion came back and everything still is as it was before vLLM read it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline import chat, hardware
from pipeline.artifacts import ServedUnit
from pipeline.config.schema import ServeConfig
from pipeline.environments.interpreters import Environment
from pipeline.errors import Problem, ServingError
from pipeline.files import write_json
from pipeline.model.base import check_folder
from pipeline.program import Event
from pipeline.serving import command, diagnosis, digests, gpu_room
from pipeline.serving import server as server_http
from pipeline.serving.progress import Progress
from pipeline.serving.runtimes import RUNTIMES, Operations
from pipeline.serving.server import Condition, Server, ToServe

ADDRESS_TRIES = 3
GREETING = [{"role": "user", "content": "Hello!"}]
REMEDY = "restore it, or build and approve anew"


def served_unit(model: Path, serve: ServeConfig, name: str, environment: Environment | None) -> ServedUnit:
    """The unit that would serve this model folder on this machine now: everything that decides an answer.

    Clients ask for `name` unless the config says otherwise. `environment` has vLLM; it is None for a runtime that brings its
    own. Raises ConfigError for flags and variables that are refused, EnvironmentMissing without vLLM, ServingError when the
    image isn't there.
    """
    device = hardware.device()
    identity = _operations(serve.runtime).identity(serve, environment)
    return ServedUnit(
        **digests.model_digests(model),
        runtime=serve.runtime,
        runtime_digest=identity.digest,
        vllm_version=identity.vllm_version,
        flags=command.unit_flags(serve, name, _auto_dtype(model, device)),
        env=command.unit_env(serve, on_cpu=device.kind == "cpu"),
        device=device.device_class,
    )


def _auto_dtype(model: Path, device: hardware.Device) -> str:
    """The meaning of `dtype: auto` for this model here; vLLM takes AutoAWQ's format in 16 bits alone."""
    quantization = json.loads((model / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    only_16_bits = quantization.get("quant_method") == "awq" and device.serving_dtype == "float32"
    return "float16" if only_16_bits else device.serving_dtype


def start(to_serve: ToServe, *, keep: bool, on_event: Callable[[Event], None]) -> Server:
    """Start a server and return it once it has answered a real chat completion.

    A server of the same unit that runs in the folder already is taken over; a server of another unit is stopped. With `keep`
    the server outlives this process and is started again when it dies, else it ends with this process.

    Raises ModelError for an unsafe folder. Raises ServingError

    - when the folder, packages or flags aren't the unit's, before or after vLLM read them;
    - when a GPU lacks room;
    - when the server dies, or isn't ready within serve.startup_timeout.
    """
    to_serve = replace(to_serve, model=to_serve.model.resolve(), folder=to_serve.folder.resolve())
    to_serve.folder.mkdir(parents=True, exist_ok=True)
    files = _verify(to_serve)
    before = find(to_serve.folder)
    if before is not None and before.unit_digest == to_serve.unit.digest and is_alive(before):
        return _until_ready(before, to_serve, files, on_event)
    if before is not None:
        stop(before, 1)
    gpu_room.check(to_serve.unit, to_serve.model, gpu_room.WAIT_S)
    for tries_left in reversed(range(ADDRESS_TRIES)):
        server = _operations(to_serve.serve.runtime).spawn(to_serve, files, keep=keep)
        try:
            write_json(to_serve.folder / "server.json", server.model_dump(mode="json"))
            return _until_ready(server, to_serve, files, on_event)
        except ServingError as error:
            stop(server, 1)
            if not tries_left or "Address already in use" not in str(error):
                raise
        except BaseException:
            stop(server, 1)
            raise
    raise AssertionError("the loop returns or raises")


def stop(server: Server, timeout_s: float) -> None:
    """Let requests in flight finish for `timeout_s` seconds, then end whatever is left; idempotent."""
    _operations(server.runtime).stop(server, timeout_s)


def find(folder: Path) -> Server | None:
    """The server that was last started in this folder, running or not, also one whose start was cut short."""
    file = folder / "server.json"
    return Server.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def is_alive(server: Server) -> bool:
    """Whether it runs or is being started again; not whether it answers."""
    return _operations(server.runtime).is_alive(server)


def is_running(server: Server) -> bool:
    """Whether vLLM itself runs now; a server that is dead, or waits to be started again, has nothing to finish."""
    return _operations(server.runtime).condition(server).state in ("starting", "running")


def refresh_log(server: Server) -> None:
    """Bring the server's log file up to date."""
    _operations(server.runtime).refresh_log(server)


def in_flight(server: Server) -> int:
    """Requests it works on or has waiting; raises ServingError when it doesn't tell."""
    return server_http.in_flight(server.url)


def condition(server: Server) -> Condition:
    """The server's condition now, asked of the system and of the server itself; never raises for a dead one.

    A server that was started again isn't healthy before its supervisor has seen that it serves what was judged.
    """
    seen_by_system = _operations(server.runtime).condition(server)
    if seen_by_system.state in ("dead", "restarting") or not server_http.is_healthy(server.url):
        return seen_by_system
    try:
        busy: int | None = in_flight(server)
    except ServingError:
        busy = None
    return seen_by_system.model_copy(update={"healthy": True, "in_flight": busy})


@contextmanager
def running(to_serve: ToServe, on_event: Callable[[Event], None]) -> Iterator[Server]:
    """A server for the time of a `with` block; see `start`."""
    server = start(to_serve, keep=False, on_event=on_event)
    try:
        yield server
    finally:
        stop(server, 1)


def _operations(runtime: str) -> Operations:
    return RUNTIMES[runtime].operations()


def _verify(to_serve: ToServe) -> dict[str, str]:
    """Refuse to serve anything but the unit that was judged; returns the digests of the model's files."""
    check_folder(to_serve.model)
    files = digests.model_files(to_serve.model)
    unit_here = served_unit(to_serve.model, to_serve.serve, to_serve.name, to_serve.environment)
    unit_here = unit_here.model_copy(update=digests.by_part(files))
    problems = [
        Problem(
            f"is {getattr(unit_here, field)}",
            key=f"unit.{field}",
            allowed=f"{getattr(to_serve.unit, field)}, as it was judged",
            remedy=REMEDY,
        )
        for field in ServedUnit.model_fields
        if getattr(unit_here, field) != getattr(to_serve.unit, field)
    ]
    if problems:
        raise ServingError(problems)
    return files


def _verify_again(to_serve: ToServe, files: dict[str, str]) -> None:
    """Refuse what changed since it was verified: vLLM may have read other bytes. `files` are the digests from before."""
    changes = digests.differences(files, digests.model_files(to_serve.model))
    if changes:
        raise ServingError(
            Problem(
                f"{change} while vLLM loaded the model",
                file=str(to_serve.model / file),
                key=f"unit.{digests.part_of(file)}",
                allowed="the bytes that were judged, from before the start until the server is ready",
                remedy=f"see what writes there, then {REMEDY}",
            )
            for file, change in changes.items()
        )
    _verify(to_serve)


def _until_ready(server: Server, to_serve: ToServe, files: dict[str, str], on_event: Callable[[Event], None]) -> Server:
    """Wait for /health, then for a real completion, and report progress meanwhile.

    Stops the server if it may have loaded something else than was judged.
    """
    runtime = RUNTIMES[server.runtime]
    progress = Progress(server, to_serve.unit, on_event)
    until = time.monotonic() + to_serve.serve.startup_timeout
    while not server_http.is_healthy(server.url, timeout_s=1):
        runtime.operations().raise_if_dead(server)
        if time.monotonic() > until:
            raise diagnosis.of_silence(server.log, to_serve.serve.startup_timeout)
        progress.tell()
        time.sleep(runtime.poll_s)
    _generate(server, max(1.0, until - time.monotonic()))
    try:
        _verify_again(to_serve, files)
    except BaseException:
        stop(server, 1)
        raise
    (server.folder / "ready").touch()
    refresh_log(server)
    progress.done()
    return server


def _generate(server: Server, timeout_s: float) -> None:
    """Raise ServingError unless the server answers a real, short completion."""
    try:
        with chat.client(server.url, timeout_s) as http:
            chat.complete(http, server.model, GREETING, max_tokens=4)
    except ServingError as error:
        _operations(server.runtime).raise_if_dead(server)
        raise ServingError(
            f"the server is up but doesn't generate: {error.problems[0].what}",
            file=str(server.log),
            remedy="read the log",
        ) from error
