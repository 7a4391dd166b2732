"""A container engine for tests: the one of DOCKER_HOST, or Podman's own service for the time of the tests; and the image."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
from support.wire import wait_for

IMAGE = os.environ.get("TUNEGATE_TEST_IMAGE", "localhost/tunegate-vllm-cpu:latest")
# What needs no bridge and no right to raise limits, so that it runs on any engine.
PLAIN = {"network": "host", "ulimits": {"nofile": 1024, "nproc": 1024}}


@contextmanager
def engine(folder: Path) -> Iterator[str]:
    """Yield DOCKER_HOST of an engine that answers; Podman's service is started in `folder` where none is named."""
    if os.environ.get("DOCKER_HOST"):
        yield os.environ["DOCKER_HOST"]
        return
    assert shutil.which("podman"), "install podman and runc, or set DOCKER_HOST"
    socket = folder / "engine.sock"
    runtime = ["--runtime", "runc"] if shutil.which("runc") else []
    command = ["podman", *runtime, "system", "service", "--time", "0", f"unix://{socket}"]
    with (folder / "engine.log").open("wb") as log:
        service = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(socket.is_socket, 30)
        yield f"unix://{socket}"
    finally:
        service.terminate()
        service.wait()


def pinned(host: str) -> str:
    """The serving image as a config names it, by its digest."""
    client = docker.DockerClient(base_url=host)
    try:
        name = IMAGE.rpartition(":")[0] if ":" in IMAGE.rpartition("/")[2] else IMAGE
        return f"{name}@{client.images.get(IMAGE).id}"
    finally:
        client.close()


def inspect(host: str, container: str) -> dict:
    """What the engine says of a container."""
    client = docker.DockerClient(base_url=host)
    try:
        return client.containers.get(container).attrs
    finally:
        client.close()


def labelled(host: str, label: str) -> list[str]:
    """Ids of all containers with the label, running or not."""
    client = docker.DockerClient(base_url=host)
    try:
        return [found.id for found in client.containers.list(all=True, filters={"label": label})]
    finally:
        client.close()
