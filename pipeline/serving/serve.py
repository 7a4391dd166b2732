"""Serving a model with vLLM, as a process or in a container, behind one interface.

The only file, with its serving_* siblings, that knows vLLM and containers. A server is started as a
ServedUnit says, and only if that is what lies there now: other bytes, packages, flags or hardware are
refused. Ready means that a real completion came back and that all is still as it was before vLLM read it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipeline import hardware
from pipeline.artifacts import ServedUnit
from pipeline.config import methods
from pipeline.config.schema import ServeConfig
from pipeline.environments.interpreters import Environment
from pipeline.errors import EnvironmentMissing, Problem, ServingError
from pipeline.files import write_json
from pipeline.model.base import check_folder
from pipeline.program import Event
from pipeline.serving import command, diagnosis, docker, gpu_room, process
from pipeline.serving import digests as serving_digests
from pipeline.serving import server as serving_server
from pipeline.serving.progress import Progress
from pipeline.serving.server import Condition, Server

POLL_S = 0.1
ENGINE_POLL_S = 1.0  # a container engine is asked for the log each time
ADDRESS_TRIES = 3
REMEDY = "restore it, or build and approve anew"


def served_unit(model: Path, serve: ServeConfig, name: str, environment: Environment | None) -> ServedUnit:
    """What would serve the model in this folder on this machine now, with everything that decides an answer.

    `name` is what clients ask for unless the config says otherwise; `environment` holds vLLM for the process
    runtime and is None for docker. Raises ConfigError for flags and variables that are refused,
    EnvironmentMissing without vLLM, ServingError when the image isn't there.
    """
    device = hardware.device()
    digests = serving_digests.model_digests(model)
    if serve.runtime == "docker":
        image = docker.image(serve.image or "", serve.container)
        runtime_digest, version = image.digest, image.vllm_version
    else:
        found = serving_digests.installed(_needed(environment))
        runtime_digest, version = found.digest, found.vllm_version
    return ServedUnit(
        **digests,
        runtime=serve.runtime,
        runtime_digest=runtime_digest,
        vllm_version=version,
        flags=command.unit_flags(serve, name, _auto_dtype(model, device)),
        env=command.unit_env(serve, on_cpu=device.kind == "cpu"),
        device=device.device_class,
    )


def _auto_dtype(model: Path, device: hardware.Device) -> str:
    """What `dtype: auto` is for this model here; vLLM takes some quantized formats in 16 bits only."""
    quantized = json.loads((model / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    in_float32 = device.serving_dtype == "float32"
    return "float16" if in_float32 and methods.needs_16_bits(quantized.get("quant_method")) else device.serving_dtype


def start(
    unit: ServedUnit,
    model: Path,
    serve: ServeConfig,
    name: str,
    folder: Path,
    environment: Environment | None,
    *,
    keep: bool,
    on_event: Callable[[Event], None],
) -> Server:
    """Start a server and return it once it has answered a real chat completion.

    `folder` keeps its log and state; a server of the same unit that runs there already is taken over, another
    one is stopped. With `keep` it outlives this process and is started again when it dies, else it ends with
    this process.

    Raises ModelError for an unsafe folder, ServingError when what lies there isn't `unit`, before or after vLLM read
    it, when a GPU has no room for it, or when the server dies (with its log's telling line) or isn't ready within serve.startup_timeout.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = _verify(unit, model.resolve(), serve, name, environment)
    verify_again = partial(_verify_again, files, unit, model.resolve(), serve, name, environment)
    before = find(folder)
    if before is not None and before.unit_digest == unit.digest and is_alive(before):
        return _until_ready(before, unit, serve, on_event, verify_again)
    if before is not None:
        stop(before, 1)
    gpu_room.check(unit, model, gpu_room.WAIT_S)
    for tries_left in reversed(range(ADDRESS_TRIES)):
        server = _spawn(unit, model.resolve(), files, serve, folder, environment, keep=keep)
        try:
            write_json(folder / "server.json", server.model_dump(mode="json"))
            return _until_ready(server, unit, serve, on_event, verify_again)
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
    if server.runtime == "docker":
        docker.stop(server, timeout_s)
    else:
        process.stop(server, timeout_s)


def find(folder: Path) -> Server | None:
    """The server that was last started in this folder, running or not, also one whose start was cut short."""
    file = folder / "server.json"
    return Server.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def is_alive(server: Server) -> bool:
    """Whether it runs or is being started again; not whether it answers."""
    if server.runtime == "docker":
        return docker.is_alive(server)
    return process.is_alive(server)


def is_running(server: Server) -> bool:
    """Whether vLLM itself runs now; one that is dead, or waits to be started again, has no request to finish."""
    return _look(server).state in ("starting", "running")


def refresh_log(server: Server) -> None:
    """Bring `server.log` up to date; a process writes it itself, a container's is fetched from the engine."""
    if server.runtime == "docker":
        docker.refresh_log(server)


def in_flight(server: Server) -> int:
    """Requests it works on or has waiting; raises ServingError when it doesn't tell."""
    return serving_server.in_flight(server.url)


def condition(server: Server) -> Condition:
    """How the server is now, asked of the system and of the server itself; never raises for a dead one.

    One that was started again isn't healthy before its supervisor has seen that it serves what was judged.
    """
    found = _look(server)
    if found.state in ("dead", "restarting") or not serving_server.is_healthy(server.url):
        return found
    try:
        busy: int | None = in_flight(server)
    except ServingError:
        busy = None
    return found.model_copy(update={"healthy": True, "in_flight": busy})


def _look(server: Server) -> Condition:
    """How the server is, as the system knows it."""
    return docker.condition(server) if server.runtime == "docker" else process.condition(server)


@contextmanager
def running(
    unit: ServedUnit,
    model: Path,
    serve: ServeConfig,
    name: str,
    folder: Path,
    environment: Environment | None,
    on_event: Callable[[Event], None],
) -> Iterator[Server]:
    """A server for the time of a `with` block; see `start`."""
    server = start(unit, model, serve, name, folder, environment, keep=False, on_event=on_event)
    try:
        yield server
    finally:
        stop(server, 1)


def _verify(
    unit: ServedUnit, folder: Path, serve: ServeConfig, name: str, environment: Environment | None
) -> dict[str, str]:
    """Refuse to serve anything but what was judged; returns the digests of the model's files."""
    check_folder(folder)
    files = serving_digests.model_files(folder)
    found = served_unit(folder, serve, name, environment).model_copy(update=serving_digests.by_part(files))
    problems = [
        Problem(
            f"is {getattr(found, field)}",
            key=f"unit.{field}",
            allowed=f"{getattr(unit, field)}, as it was judged",
            remedy=REMEDY,
        )
        for field in ServedUnit.model_fields
        if getattr(found, field) != getattr(unit, field)
    ]
    if problems:
        raise ServingError(problems)
    return files


def _verify_again(
    files: dict[str, str],
    unit: ServedUnit,
    folder: Path,
    serve: ServeConfig,
    name: str,
    environment: Environment | None,
) -> None:
    """Refuse what changed since it was verified: vLLM may have read other bytes. `files` are those of before."""
    changed = serving_digests.differences(files, serving_digests.model_files(folder))
    if changed:
        raise ServingError(
            Problem(
                f"{what} while vLLM loaded the model",
                file=str(folder / file),
                key=f"unit.{serving_digests.part_of(file)}",
                allowed="the bytes that were judged, from before the start until the server is ready",
                remedy=f"see what writes there, then {REMEDY}",
            )
            for file, what in changed.items()
        )
    _verify(unit, folder, serve, name, environment)


def _spawn(
    unit: ServedUnit,
    folder_of_model: Path,
    files: dict[str, str],
    serve: ServeConfig,
    folder: Path,
    environment: Environment | None,
    *,
    keep: bool,
) -> Server:
    if serve.runtime == "docker":
        return docker.spawn(unit, folder_of_model, serve, folder, keep=keep)
    return process.spawn(unit, folder_of_model, files, serve, folder, _needed(environment), keep=keep)


def _until_ready(
    server: Server,
    unit: ServedUnit,
    serve: ServeConfig,
    on_event: Callable[[Event], None],
    verify_again: Callable[[], None],
) -> Server:
    """Wait for /health, then for a real completion; say what the server is at meanwhile.

    Stops it if it may have loaded something else than was judged.
    """
    progress = Progress(server, unit, on_event)
    until = time.monotonic() + serve.startup_timeout
    while not serving_server.is_healthy(server.url, timeout_s=1):
        _raise_if_dead(server)
        if time.monotonic() > until:
            raise diagnosis.of_silence(server.log, serve.startup_timeout)
        progress.tell()
        time.sleep(ENGINE_POLL_S if server.runtime == "docker" else POLL_S)
    try:
        serving_server.complete(server.url, server.model, max(1.0, until - time.monotonic()))
    except ServingError as error:
        _raise_if_dead(server)
        raise ServingError(
            f"the server is up but doesn't generate: {error}", file=str(server.log), remedy="read the log"
        ) from error
    try:
        verify_again()
    except BaseException:
        stop(server, 1)
        raise
    (server.folder / "ready").touch()
    refresh_log(server)
    progress.done()
    return server


def _raise_if_dead(server: Server) -> None:
    if server.runtime == "docker":
        docker.raise_if_dead(server)
    else:
        process.raise_if_dead(server)


def _needed(environment: Environment | None) -> Environment:
    if environment is None:
        raise EnvironmentMissing("runtime: process needs an environment with vLLM", remedy="make setup")
    return environment
