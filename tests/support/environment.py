"""A virtual environment that can be looked at, and not started."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.environments import install


def made(venvs: Path, name: str, distributions: tuple[str, ...] = ()) -> Path:
    """A virtual environment as far as it is looked at without being started; its interpreter can't be."""
    packages = venvs / name / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (venvs / name / "bin").mkdir()
    (venvs / name / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    python = venvs / name / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 9\n")
    python.chmod(0o755)
    for distribution in distributions:
        (packages / f"{distribution}.dist-info").mkdir()
    stamp = {"device": "cpu", "digest": install.digest(name, "cpu")}
    (venvs / name / install.STAMP).write_text(json.dumps(stamp))
    return packages
