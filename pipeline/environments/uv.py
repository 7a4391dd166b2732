"""Finds uv, or brings it into .venv/uv through pip, and hands it the package sources that pip is set up with.

uv doesn't read pip's settings, so find-links and mirrors are told to it here, through the child's environment
alone: nothing of it reaches a file or a command line. A UV_* variable that is set already wins. Standard
library only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import EnvironmentMissing

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (0, 8)  # the first whose `venv --clear` is what an unfinished environment needs

# pip's setting -> uv's variable, and what joins several values there
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}


def folder() -> Path:
    """Where the environments lie: TUNEGATE_VENVS, or .venv in the project."""
    return Path(os.environ.get("TUNEGATE_VENVS") or ROOT / ".venv").absolute()


def find() -> Path:
    """The uv on PATH, or the one brought by an earlier `bring`; raises EnvironmentMissing."""
    for candidate in (shutil.which("uv"), str(folder() / "uv" / "bin" / "uv")):
        if candidate and _version(candidate) >= OLDEST:
            return Path(candidate)
    raise EnvironmentMissing("uv isn't there", remedy="python3 -m pipeline.environments  (brings it)")


def bring(python: str) -> Path:
    """Install the locked uv with pip into .venv/uv; raises EnvironmentMissing if that fails."""
    home = folder() / "uv"
    home.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.run([python, "-m", "venv", "--clear", str(home)], capture_output=True, text=True, check=False)
    if process.returncode:
        raise EnvironmentMissing(
            f"{python} -m venv failed: {(process.stdout + process.stderr).strip().splitlines()[-1:]}",
            remedy="apt-get install python3-venv  (or: pip install uv)",
        )
    lock = ["--require-hashes", "--no-deps", "-r", str(ROOT / "locks" / "uv.txt")]
    pip = [
        str(home / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *lock,
    ]
    if subprocess.run(pip, check=False).returncode:
        raise EnvironmentMissing(
            "pip could not install uv",
            remedy="see pip's message above; check the network or pip's index settings, then run this again",
        )
    return home / "bin" / "uv"


def environ() -> dict[str, str]:
    """os.environ with pip's package sources (its environment variables and files) added as uv's variables.

    A virtual environment made by uv lacks pip, so the interpreter that it was made from is asked too.
    """
    for python in (sys.executable, f"{sys.base_prefix}/bin/python3", shutil.which("python3")):
        output = subprocess.run(
            [str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
        )
        if output.returncode == 0:
            return {**from_pip(output.stdout), **os.environ}
    return dict(os.environ)


def from_pip(process: str) -> dict[str, str]:
    """The output of `pip config list` as uv's variables.

    As in pip an environment variable outranks the [install] section, which outranks [global].
    """
    import ast  # here because every command imports this module and only a set-up gets so far

    values: dict[str, tuple[int, str]] = {}
    for section, key, text in re.findall(r"^(:env:|install|global)\.([a-z-]+)=(.+)$", process, re.MULTILINE):
        rank = {"global": 0, "install": 1, ":env:": 2}[section]
        if key in SETTINGS and rank >= values.get(key, (0, ""))[0]:
            values[key] = (rank, ast.literal_eval(text))
    variables = {SETTINGS[key][0]: SETTINGS[key][1].join(value.split()) for key, (_, value) in values.items()}
    if "UV_INDEX" in variables:  # pip weighs all indexes alike; uv would stop at the first that knows the name
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return variables


def run(uv: Path, arguments: list[str], env: Mapping[str, str], *, quiet: bool = False) -> int:
    """Run uv with its progress on the terminal, or with nothing shown if `quiet`; returns the exit status."""
    sink = subprocess.DEVNULL if quiet else None
    return subprocess.run([str(uv), *arguments], env=dict(env), stdout=sink, stderr=sink, check=False).returncode


def _version(uv: str) -> tuple[int, ...]:
    try:
        output = subprocess.run([uv, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ()
    return tuple(int(number) for number in re.findall(r"\d+", output)[:2])
