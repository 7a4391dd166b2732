"""Which interpreter runs which stage.

An environment is a virtual environment made by pipeline.environments.install, or, from the config, any interpreter with
folders for its PYTHONPATH (a CUDA host whose own Python holds the packages). What holds for a host and not for
one use is said once: TUNEGATE_ENVIRONMENTS names a YAML file with the section `environments` alone, and a config's
own entries win. Standard library only, but for that file; no interpreter is started to read versions from a virtual
environment. The stage programs are found through the project's folder on PYTHONPATH, so tunegate is used from a
checkout (an editable install), not from a wheel.
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
    found = config.get("environments") or {}
    return {name: Setting(value["interpreter"], tuple(value["pythonpath"])) for name, value in found.items()}


def serving(config: Mapping[str, Any]) -> Environment | None:
    """Where vLLM is installed; None when a container image holds it."""
    return None if config["serve"]["runtime"] == "docker" else find("serve", settings(config))


def of_host() -> dict[str, EnvironmentSetting]:
    """What the file that TUNEGATE_ENVIRONMENTS names says of each environment; nothing where the variable isn't set.

    Raises ConfigError with every mistake of the file.
    """
    named = os.environ.get(OF_HOST)
    return dict(_read_settings(Path(named).expanduser())) if named else {}


def _read_settings(file: Path) -> Iterator[tuple[str, EnvironmentSetting]]:
    import yaml  # here because most hosts have virtual environments, and `tunegate check` is quick

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        remedy = f"write it, or unset {OF_HOST}"
        raise ConfigError(f"is not a YAML file to read: {error}", file=str(file), key=OF_HOST, remedy=remedy) from error
    if problems := list(_setting_problems(found, file)):
        raise ConfigError(problems)
    for name, value in found.items():
        interpreter, places = value.get("interpreter"), value.get("pythonpath") or ()
        yield name, Setting(interpreter and _beside(file, interpreter), tuple(_beside(file, place) for place in places))


def _beside(file: Path, entry: str) -> str:
    """A path as the file means it, whatever folder a command runs in; a command's name stays one."""
    if "/" not in entry or entry.startswith("~"):
        return entry
    return str(file.absolute().parent / entry)


def _setting_problems(found: Any, file: Path) -> Iterator[Problem]:
    """What is wrong with a host's file, by the rules of a config's section `environments`."""
    remedy = f"correct {file}, named by {OF_HOST}"
    if not isinstance(found, dict):
        yield Problem(
            "holds no environments", str(file), None, OF_HOST, "NAME: {interpreter: …, pythonpath: […]}", remedy
        )
        return
    for name, value in found.items():
        if name not in CONFIGURABLE:
            yield Problem("is no such environment", str(file), None, str(name), ", ".join(CONFIGURABLE), remedy)
        elif not isinstance(value, dict) or not {*value} <= {"interpreter", "pythonpath"}:
            yield Problem("is something else", str(file), None, name, "the keys interpreter and pythonpath", remedy)
        elif not isinstance(value.get("interpreter") or "", str):
            yield Problem("is no text", str(file), None, f"{name}.interpreter", "a path or a command", remedy)
        elif not _are_texts(value.get("pythonpath") or []):
            yield Problem("is no list of folders", str(file), None, f"{name}.pythonpath", "a list of paths", remedy)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def find(name: str, settings: Mapping[str, EnvironmentSetting] | None = None) -> Environment:
    """The environment of that name (see NAMES): the config's setting first, then the host's.

    Raises EnvironmentMissing with everything that isn't there and the command that makes it.
    """
    if name not in NAMES:
        raise EnvironmentMissing(f"there is no environment {name!r}", allowed=", ".join(NAMES))
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
    if os.environ.get("TUNEGATE_DEVICE") == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    found["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in (ROOT, *env.pythonpath))
    found["PATH"] = os.pathsep.join([str(env.interpreter.parent), found.get("PATH", os.defpath)])
    return found


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


def _configured(name: str, wanted: str) -> Path | Problem:
    found = shutil.which(str(Path(wanted).expanduser()))
    if found is None:
        return Problem(
            f"{wanted} is no program",
            key=f"environments.{name}.interpreter",
            remedy=f"correct the path in the config, or in the file that {OF_HOST} names",
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
