"""`tunegate up` and `down`: Prefect's server with its UI, a worker, MLflow's UI.

All listen on 127.0.0.1 and keep their files under mlruns/. A server that PREFECT_API_URL or
MLFLOW_TRACKING_URI names is used and not started. Each service is known by its pid and start time, and `down`
ends those and no others; it also stops what serves models here, and their proxies.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import httpx

from flows import surroundings
from pipeline import files, processes, store
from pipeline.environments import interpreters
from pipeline.errors import Problem, ServingError, TunegateError
from pipeline.processes import Process

POOL = "tunegate"
PATIENCE_S = 240.0
STOP_S = 20.0
TEMPORARY = "prefect-temporary"
NAMES = ("prefect-worker", "mlflow-server", "prefect-server")
NOTES = ("prefect-api-url", "mlflow-url")
TITLES = {
    "PREFECT": ("Prefect", "runs, schedules, artifacts"),
    "MLFLOW": ("MLflow", "models, metrics, reviews"),
}


def up(options: argparse.Namespace) -> int:
    """Start the services that aren't running and print their addresses.

    Raises ServingError when a port is taken or a service does not come up, ConfigError for a broken CONFIG.
    """
    from flows import deployments

    plan = deployments.rendered(options.config, options.data_dir)
    with store.lock("services"):
        prefect, mlflow = _prefect_server(), _mlflow_server()
        os.environ["PREFECT_API_URL"] = f"{prefect}/api"
        os.environ["TUNEGATE_HOME"] = str(store.home())
        prefect_environment()
        _wait("prefect-server", lambda: _answers(f"{prefect}/api/health"))
        _note("prefect-api-url", f"{prefect}/api")
        names = deployments.deploy(plan, POOL)
        _ensure(
            "prefect-worker",
            ["prefect", "worker", "start", "--pool", POOL, "--name", "tunegate"],
            everything=True,
        )
        _wait("mlflow-server", lambda: _answers(f"{mlflow}/health"))
        _note("mlflow-url", mlflow)
    for service, url in (("PREFECT", prefect), ("MLFLOW", mlflow)):
        title, contents = TITLES[service]
        print(f"  {title:<8} {_without_password(url):<24} {contents}")
    print(f"  deployments: {', '.join(names)}; in Prefect's page, or")
    print(f"    PREFECT_API_URL={_without_password(prefect)}/api {_prefect_command()} deployment run {names[0]}")
    print("  stop all: tunegate down")
    return 0


def down(_options: argparse.Namespace) -> int:
    """Stop the pages, the worker, every server and its proxy; their records stay.

    Raises the errors of those that could not be stopped, after everything else was.
    """
    from pipeline.deployment import promote, state

    count = 0
    problems: list[Problem] = []
    with store.lock("services"):
        for name in NAMES:
            running = _running(name)
            if running:
                _end(running)
                print(f"  stopped {name}")
                count += 1
            _file(name).unlink(missing_ok=True)
        for note in NOTES:
            (_folder() / note).unlink(missing_ok=True)
    for name in state.names():
        serving = promote.status(name).state not in ("stopped", "none")
        try:
            promote.stop(name)
        except TunegateError as error:
            problems += error.problems
            continue
        if serving:
            print(f"  stopped the server of {name} and its proxy")
            count += 1
    if problems:
        raise ServingError(problems)
    if not count:
        print("  nothing of tunegate's runs here")
    return 0


def prefect_environment() -> None:
    """Set the variables of `surroundings`, and the server that `tunegate up` runs here: runs from a terminal show there."""
    surroundings.set_environment()
    store.home().mkdir(parents=True, exist_ok=True)  # Prefect makes no folders above its own
    url = page_of("prefect")
    if url and "PREFECT_API_URL" not in os.environ and _answers(f"{url}/api/health"):
        os.environ["PREFECT_API_URL"] = f"{url}/api"


def prefect_for_a_run() -> None:
    """Prefect's settings for a run from a terminal, with a server: the user's, `up`'s, or one for this process alone.

    The caller prints the failures that the run raises; Prefect's lines about them go to its server alone.
    Raises ServingError when the server does not come up.
    """
    prefect_environment()
    from prefect.settings import get_current_settings

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).propagate = False
    settings = get_current_settings()
    if settings.api.url is None:
        settings.api.url = _temporary_server()


def _temporary_server() -> str:
    """Start a server that ends with this process, in whatever way that ends; returns its API's address."""
    control = interpreters.find("control")
    _log(TEMPORARY).parent.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listening, _log(TEMPORARY).open("ab") as sink:
        child = subprocess.Popen(
            interpreters.command(control, "flows.temporary_server", str(listening.fileno())),
            env=interpreters.child_environ(control, tuple(os.environ)),
            stdin=subprocess.PIPE, stdout=sink, stderr=sink,
            start_new_session=True, pass_fds=(listening.fileno(),),
        )  # fmt: skip
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
    atexit.register(_end_temporary, child)
    _wait(TEMPORARY, lambda: _answers(f"{address}/health"), child)
    return address


def _end_temporary(child: subprocess.Popen[bytes]) -> None:
    """Let go of the server's standard input, which ends it, and wait a while for that."""
    if child.stdin:
        child.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        child.wait(STOP_S)


def page_of(service: str) -> str | None:
    """The address of a service (prefect or mlflow) that `up` started and that runs, or None."""
    return _address(f"{service}-server") if _running(f"{service}-server") else None


def _prefect_command() -> str:
    """Prefect's own command; its module where packages lie on PYTHONPATH, without console scripts."""
    python = interpreters.find("control").interpreter
    script = python.with_name("prefect")
    return str(script) if script.exists() else f"{python} -m prefect"


def _prefect_server() -> str:
    """The address of the Prefect server to use; one of ours is started if the user names none."""
    url = os.environ.get("PREFECT_API_URL", "").removesuffix("/").removesuffix("/api")
    if url and url != page_of("prefect"):
        return url
    host, port = "127.0.0.1", _port("prefect")
    return _ensure("prefect-server", ["prefect", "server", "start", "--host", host, "--port", str(port)], port)


def _mlflow_server() -> str:
    """The address of the MLflow server to use; one of ours is started if the user names none."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        return uri.removesuffix("/")
    home, port = store.home(), _port("mlflow")
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", uri or f"sqlite:///{home / 'mlflow.db'}",
               "--artifacts-destination", (home / "artifacts").as_uri()]  # fmt: skip
    return _ensure("mlflow-server", command, port)


def _port(service: str) -> int:
    """The port for a service: the variable's, or its usual one.

    Raises ServingError when the variable isn't a port.
    """
    variable = f"TUNEGATE_{service.upper()}_PORT"
    port = os.environ.get(variable) or {"prefect": "4200", "mlflow": "5000"}[service]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ServingError(
            f"{port!r} is not a port",
            key=variable,
            allowed="1 to 65535",
            remedy=f"unset {variable}, or correct it",
        )
    return int(port)


def _ensure(name: str, command: Sequence[str], port: int | None = None, *, everything: bool = False) -> str:
    """Start a service unless it runs, and return its address.

    `everything` hands on the whole environment, secrets too: the worker builds as a user's terminal does.
    Raises ServingError when another process listens at its port.
    """
    if _running(name):
        return _address(name)
    if port is not None:
        _refuse_taken(name, port)
    control = interpreters.find("control")
    environ = interpreters.child_environ(control, tuple(os.environ) if everything else ())
    environ.update(surroundings.QUIET, PREFECT_HOME=str(store.home() / "prefect"), TUNEGATE_HOME=str(store.home()))
    environ["PREFECT_LOGGING_LEVEL"] = "INFO"  # the worker's runs show their progress in Prefect's page
    address = f"http://127.0.0.1:{port}" if port else ""
    if name == "prefect-server":
        environ.pop("PREFECT_API_URL", None)
        environ["PREFECT_SERVER_UI_API_URL"] = f"{address}/api"  # its page would ask port 4200
    print(f"  starting {name} …", flush=True)
    process = processes.spawn(interpreters.command(control, *command), environ, _log(name))
    files.write_json(_file(name), {**asdict(process), "address": address})
    return address


def _running(name: str) -> Process | None:
    """The service that an earlier `up` started, if it still runs."""
    if not _file(name).is_file():
        return None
    note = json.loads(_file(name).read_text(encoding="utf-8"))
    process = Process(note["pid"], note["started"])
    return process if processes.is_alive(process) else None


def _address(name: str) -> str:
    return str(json.loads(_file(name).read_text(encoding="utf-8"))["address"])


def _end(process: Process) -> None:
    """End a service and the rest of its process group."""
    processes.end(process, STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _refuse_taken(name: str, port: int) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            variable = "TUNEGATE_PREFECT_PORT" if name.startswith("prefect") else "TUNEGATE_MLFLOW_PORT"
            raise ServingError(
                f"port {port} of {name} is taken",
                allowed="a free port",
                remedy=f"stop what listens there, or {variable}=PORT tunegate up",
            )


def _wait(name: str, ready: Callable[[], bool], child: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until a service, or a child, answers; raises ServingError with its log's end when it died or takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        ours = child is not None or _file(name).is_file()
        is_dead = ours and (child.poll() is not None if child else _running(name) is None)
        if time.monotonic() > deadline or is_dead:
            tail = _log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:] if ours else []
            raise ServingError(
                Problem(
                    f"{name} did not come up: {' | '.join(tail) or 'no answer'}",
                    file=str(_log(name)) if ours else None,
                    remedy="read the log, then the same command again"
                    if ours
                    else "check PREFECT_API_URL and MLFLOW_TRACKING_URI",
                )
            )
        time.sleep(0.3)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def _without_password(url: str) -> str:
    address = httpx.URL(url)
    return str(address.copy_with(username=None, password=None)) if address.userinfo else url


def _folder() -> Path:
    return store.home() / "services"


def _file(name: str) -> Path:
    return _folder() / f"{name}.json"


def _log(name: str) -> Path:
    return _folder() / f"{name}.log"


def _note(name: str, text: str) -> None:
    (_folder() / name).write_text(text, encoding="utf-8")
