"""The process runtime: vLLM in the serving environment, under a small supervisor that outlives the command.

FOLDER has spec.json (the supervisor's order), state.json (the server's state), server.json (the Server), vllm.log,
supervisor.log, a link to the model's folder, and `ready` once the server answered. A pid counts only together with its start
time, so that a reused pid is never signalled.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from pipeline import processes
from pipeline.artifacts import ServedUnit
from pipeline.config.schema import ServeConfig
from pipeline.environments.interpreters import Environment
from pipeline.environments.uv import ROOT
from pipeline.errors import EnvironmentMissing, ServingError
from pipeline.files import link
from pipeline.serving import command, diagnosis
from pipeline.serving.digests import Installed, installed
from pipeline.serving.server import Condition, Server, ToServe
from pipeline.serving.supervisor import MODEL, Spec, State, read_state
from pipeline.store import home

HOST = "127.0.0.1"
# Below the range that the system hands to outgoing connections, so that a restart finds its port free.
PORTS, TRIES = range(20000, 32000), 200
# All variables that the server inherits: a VLLM_ or OMP_ variable of the user's shell would change answers. With the last
# three an administrator keeps NVLink multicast off on a host that it would harm.
INHERITED = (
    "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "CC", "CXX",
    "NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS",
)  # fmt: skip
TEARDOWN_S = 5.0


def identity(_serve: ServeConfig, environment: Environment | None) -> Installed:
    """The packages of the environment that has vLLM; raises EnvironmentMissing without one."""
    return installed(_needed(environment))


def spawn(to_serve: ToServe, files: dict[str, str], *, keep: bool) -> Server:
    """Start the supervisor, which starts vLLM at a free port; returns at once.

    `files` are the digests of the model's files as they were judged. Needs an absolute, existing folder.
    """
    unit, serve, folder = to_serve.unit, to_serve.serve, to_serve.folder
    environment = _needed(to_serve.environment)
    me = processes.find(os.getpid())
    assert me is not None  # noqa: S101 - this process runs
    port = free_port()
    arguments = command.arguments(unit.flags, MODEL, HOST, port, serve.shutdown_timeout)
    log = folder / "vllm.log"
    name = command.name_in(unit.flags)
    spec = Spec(
        command=(str(environment.interpreter), "-P", "-m", command.MODULE, *arguments),
        environ=environ(unit, environment),
        log=str(log),
        url=f"http://{HOST}:{port}",
        model=name,
        files=files,
        startup_timeout=serve.startup_timeout,
        shutdown_timeout=serve.shutdown_timeout,
        keep=keep,
        owner=(me.pid, me.started),
    )
    for stale in ("ready", "state.json"):
        (folder / stale).unlink(missing_ok=True)
    link(folder / MODEL, to_serve.model)
    spec.write(folder)
    with log.open("a", encoding="utf-8") as sink:
        sink.write(f"{diagnosis.START} {unit.vllm_version}, unit {unit.digest[:12]}, {spec.url}, {to_serve.model}\n")
    supervisor = [sys.executable, "-P", "-m", "pipeline.serving.supervisor", str(folder)]
    child = processes.spawn(supervisor, _supervisor_environ(), folder / "supervisor.log")
    return Server(
        runtime="process",
        unit_digest=unit.digest,
        url=spec.url,
        model=name,
        folder=folder,
        log=log,
        pid=child.pid,
        started=child.started,
    )


def _needed(environment: Environment | None) -> Environment:
    if environment is None:
        raise EnvironmentMissing("runtime: process needs an environment with vLLM", remedy="make setup")
    return environment


def environ(unit: ServedUnit, environment: Environment) -> dict[str, str]:
    """The server's whole environment: the unit's variables, those of INHERITED, and the caches' folders."""
    cache = home() / "vllm-cache"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = os.pathsep.join([str(environment.interpreter.parent), os.environ.get("PATH", os.defpath)])
    return {
        **{key: os.environ[key] for key in INHERITED if key in os.environ},
        **command.OFFLINE,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(str(entry) for entry in environment.pythonpath),
        "PYTHONUNBUFFERED": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(cache),
        **unit.env,
    }


def raise_if_dead(server: Server) -> None:
    """Raise ServingError with the log's telling line when the server ended before it was ready."""
    supervision = state(server)
    if supervision.state in ("failed", "stopped"):
        raise diagnosis.of_death(server.log, supervision.why)
    if not processes.is_alive(_supervisor(server)):
        words = (server.folder / "supervisor.log").read_text(encoding="utf-8", errors="replace").strip()
        raise ServingError(
            f"the server's supervisor ended: {(words.splitlines() or ['without a word'])[-1]}",
            file=str(server.folder / "supervisor.log"),
            remedy="read the log, then run the command again; it starts another server",
        )


def state(server: Server) -> State:
    """The state that its supervisor last wrote; the first state when the folder is another server's by now."""
    supervision = read_state(server.folder)
    return supervision if supervision.supervisor == server.pid else State()


def vllm(server: Server) -> processes.Process | None:
    """The process of vLLM itself, if it runs now."""
    supervision = state(server)
    process = processes.Process(supervision.pid, supervision.started)
    return process if supervision.pid and processes.is_alive(process) else None


def is_alive(server: Server) -> bool:
    """Whether vLLM runs, or its supervisor is about to start it again."""
    return processes.is_alive(_supervisor(server)) or vllm(server) is not None


def condition(server: Server) -> Condition:
    """The server's condition, as the system and its supervisor know it; after a restart it isn't running at once."""
    supervision, running = state(server), vllm(server)
    if running is None and not is_alive(server):
        return Condition(state="dead", restarts=supervision.restarts, why=supervision.why)
    if running is None:
        return Condition(state="restarting", restarts=supervision.restarts)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    stage = "running" if (server.folder / "ready").exists() else "starting"
    return Condition(
        state="restarting" if supervision.state == "restarting" else stage,
        restarts=supervision.restarts,
        pid=running.pid,
        uptime_s=now - running.started / os.sysconf("SC_CLK_TCK"),
    )


def refresh_log(_server: Server) -> None:
    """Do nothing: the process writes the log itself."""


def stop(server: Server, timeout_s: float) -> None:
    """Let requests in flight finish for `timeout_s` seconds, then end whatever is left; idempotent."""
    supervisor = _supervisor(server)
    alive = [process for process in (supervisor, vllm(server)) if process and processes.is_alive(process)]
    for process in alive:  # without its supervisor vLLM is told itself
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        if process == supervisor:
            break
    until = time.monotonic() + timeout_s + TEARDOWN_S
    while any(processes.is_alive(process) for process in alive) and time.monotonic() < until:
        _reap(supervisor.pid)
        time.sleep(0.05)
    for pid in _session(supervisor):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while _session(supervisor):
        _reap(supervisor.pid)
        time.sleep(0.02)


def free_port(ports: range = PORTS) -> int:
    """A port on loopback that nobody listens on now."""
    for port in random.SystemRandom().sample(ports, min(TRIES, len(ports))):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise ServingError(
        f"all ports of {HOST} that were tried are taken",
        allowed=f"a free port from {ports.start} to {ports.stop - 1}",
        remedy="end programs that listen there (`ss -ltnp` names them), then run the command again",
    )


def _supervisor_environ() -> dict[str, str]:
    """The supervisor's variables: this process's PYTHONPATH, which a host without virtual environments needs; no secret."""
    variables = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if key in os.environ}
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**variables, "PYTHONPATH": os.pathsep.join([str(ROOT), *(entry for entry in here if entry)])}


def _supervisor(server: Server) -> processes.Process:
    return processes.Process(server.pid or 0, server.started or 0)


def _session(leader: processes.Process) -> list[int]:
    """Pids in the supervisor's session that still run: vLLM and its workers.

    A session's number isn't given to another session while a member lives. So a leader of that number with another start
    time means that this session is gone with all its members.
    """
    now = processes.find(leader.pid)
    if leader.pid <= 1 or (now is not None and now != leader):
        return []
    pids = []
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, ProcessLookupError, FileNotFoundError, PermissionError):
            pid = int(entry.name)
            process = processes.find(pid)
            if os.getsid(pid) == leader.pid and process is not None and process.started >= leader.started:
                pids.append(pid)
    return pids


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # when it is our own child
