"""The interpreter of each stage.

An environment is a virtual environment made by `pipeline.environments.install`. Or the config names any interpreter, with
folders for its PYTHONPATH: a CUDA host's own Python may hold the packages. A host says so once for all configs:
TUNEGATE_ENVIRONMENTS names a YAML file with the section `environments` alone, and a config's own entries win.

Standard library only, but for that file. Versions in a virtual environment are read without starting its interpreter.
Stage programs are found through the project's folder on PYTHONPATH: tunegate is used from a checkout, not from a wheel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.environments import install
from pipeline.environments.uv import ROOT, folder
from pipeline.errors import ConfigError, EnvironmentMissing, Problem

NAMES = tuple(install.ENVIRONMENTS)
CONFIGURABLE = tuple(name for name in NAMES if name != "control")  # control is whatever runs the command
OF_HOST = "TUNEGATE_ENVIRONMENTS"
SECRET = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|SECRET|SECRET_ACCESS_KEY|API_?KEYS?|AUTH_STRING|CREDENTIALS)$", re.IGNORECASE
)

PASSWORD_INSIDE = re.compile(r"://[^/?#\s]*:[^/?#\s]+@|\b(password|passwd|pwd)\s*=\s*\S", re.IGNORECASE)


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
    section = config.get("environments") or {}
    return {name: Setting(value["interpreter"], tuple(value["pythonpath"])) for name, value in section.items()}


def of_host() -> dict[str, EnvironmentSetting]:
    """Each environment's setting in the file that TUNEGATE_ENVIRONMENTS names; empty where the variable isn't set.

    Raises ConfigError with every mistake of the file.
    """
    path = os.environ.get(OF_HOST)
    return dict(_read_settings(Path(path).expanduser())) if path else {}


def _read_settings(file: Path) -> Iterator[tuple[str, EnvironmentSetting]]:
    import yaml  # here because most hosts have virtual environments, and `tunegate check` is quick

    try:
        section = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        remedy = f"write it, or unset {OF_HOST}"
        raise ConfigError(f"is not a YAML file to read: {error}", file=str(file), key=OF_HOST, remedy=remedy) from error
    if problems := list(_setting_problems(section, file)):
        raise ConfigError(problems)
    for name, value in section.items():
        interpreter, places = value.get("interpreter"), value.get("pythonpath") or ()
        yield name, Setting(interpreter and _beside(file, interpreter), tuple(_beside(file, place) for place in places))


def _beside(file: Path, entry: str) -> str:
    """A path as the file means it, whatever folder a command runs in; a command's name stays one."""
    if "/" not in entry or entry.startswith("~"):
        return entry
    return str(file.absolute().parent / entry)


def _setting_problems(section: Any, file: Path) -> Iterator[Problem]:
    """Mistakes of a host's file, by the rules of a config's section `environments`."""
    remedy = f"correct {file}, named by {OF_HOST}"
    if not isinstance(section, dict):
        yield Problem(
            "must hold environments", str(file), None, OF_HOST, "NAME: {interpreter: …, pythonpath: […]}", remedy
        )
        return
    for name, value in section.items():
        if name not in CONFIGURABLE:
            yield Problem("is not an environment", str(file), None, str(name), ", ".join(CONFIGURABLE), remedy)
        elif not isinstance(value, dict) or not {*value} <= {"interpreter", "pythonpath"}:
            yield Problem("must be a mapping", str(file), None, name, "the keys interpreter and pythonpath", remedy)
        elif not isinstance(value.get("interpreter") or "", str):
            yield Problem("is not text", str(file), None, f"{name}.interpreter", "a path or a command", remedy)
        elif not _are_texts(value.get("pythonpath") or []):
            yield Problem("is not a list of folders", str(file), None, f"{name}.pythonpath", "a list of paths", remedy)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def find(name: str, settings: Mapping[str, EnvironmentSetting] | None = None) -> Environment:
    """The environment of that name (see NAMES): the config's setting first, then the host's.

    Raises EnvironmentMissing with everything that isn't there and the command that makes it.
    """
    if name not in NAMES:
        raise EnvironmentMissing(f"{name!r} is not an environment", allowed=", ".join(NAMES), remedy="name one of them")
    setting = (settings or {}).get(name) or of_host().get(name)
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
            remedy=f"correct the path in the config, or in the file that {OF_HOST} names",
        )
        for entry in pythonpath
        if not entry.is_dir()
    ]
    if isinstance(interpreter, Problem) or problems:
        raise EnvironmentMissing(problems)
    return Environment(name, interpreter, pythonpath)


def versions(env: Environment, packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each package, in the order asked; raises EnvironmentMissing for the others."""
    by_name = installed(env)
    missing = [package for package in packages if _normal(package) not in by_name]
    if missing:
        raise EnvironmentMissing(
            f"{', '.join(missing)} not installed in {env.name} ({env.interpreter})", remedy=remedy(env.name)
        )
    return {package: by_name[_normal(package)] for package in packages}


def installed(env: Environment) -> dict[str, str]:
    """Name and version of every distribution that is imported from there, sorted."""
    by_name: dict[str, str] = {}
    for place in places(env):
        for distribution in distributions(place):
            by_name.setdefault(distribution.name, distribution.version)
    return dict(sorted(by_name.items()))


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
    environ = {key: value for key, value in os.environ.items() if key in keep or not SECRET.search(key)}
    for foreign in ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"):
        environ.pop(foreign, None)
    if os.environ.get("TUNEGATE_DEVICE") == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    environ["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in (ROOT, *env.pythonpath))
    environ["PATH"] = os.pathsep.join([str(env.interpreter.parent), environ.get("PATH", os.defpath)])
    return environ


def secrets_named(config: Mapping[str, Any]) -> set[str]:
    """Variables that a resolved config says hold a secret, whatever they are called."""
    judges = [entry["api_key_env"] for entry in config["evaluate"]["judges"]]
    return {str(name) for name in (*judges, config["promote"]["api_key_env"], config["notify"]["webhook_env"]) if name}


def remedy(name: str) -> str:
    """The command that makes the environment of that name."""
    return "make setup" if name in install.DEFAULT else f"python3 -m pipeline.environments {name}"


def engine_sockets() -> list[str]:
    """Where Docker's and Podman's sockets usually are, the system's first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    return [
        "/var/run/docker.sock",
        f"{runtime}/docker.sock",
        f"{runtime}/podman/podman.sock",
        "/run/podman/podman.sock",
    ]


def _configured(name: str, program: str) -> Path | Problem:
    path = shutil.which(str(Path(program).expanduser()))
    if path is None:
        return Problem(
            f"{program} is not a program",
            key=f"environments.{name}.interpreter",
            remedy=f"correct the path in the config, or in the file that {OF_HOST} names",
        )
    return Path(path).absolute()


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
    return import_path(env, child_environ(env))[1]


def import_path(env: Environment, environ: Mapping[str, str]) -> tuple[str, list[Path]]:
    """The interpreter's version text and `sys.path` under these variables; raises EnvironmentMissing when it doesn't start."""
    code = "import json, sys; print(json.dumps([sys.version, sys.path]))"
    try:
        child = subprocess.run(
            [str(env.interpreter), "-P", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=dict(environ),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentMissing(
            f"{env.interpreter} does not start as a Python of 3.11 or newer: {error}",
            key=f"environments.{env.name}.interpreter",
            remedy=f"{remedy(env.name)}, or name another interpreter in the config",
        ) from error
    version, path = json.loads(child.stdout)
    return str(version), [Path(entry) for entry in path]


@dataclass(frozen=True)
class Distribution:
    """One installed distribution: its normalized name, its version, and its *.dist-info or *.egg-info."""

    name: str
    version: str
    info: Path


def distributions(place: Path) -> list[Distribution]:
    """Every distribution in a folder, sorted by the name of its *.dist-info or *.egg-info."""
    try:
        infos = sorted(place.iterdir())
    except OSError:  # sys.path may name a zip file or nothing at all
        return []
    matches = ((info, re.fullmatch(r"([^-]+)-([^-]+?)(-py3\.\d+)?\.(dist|egg)-info", info.name)) for info in infos)
    return [Distribution(_normal(match[1]), match[2], info) for info, match in matches if match]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
