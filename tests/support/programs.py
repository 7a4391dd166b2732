"""Run stage programs from tests (of the train environment unless told): one a child, or several in one."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import program
from pipeline.digests import digest_folder
from pipeline.environments import interpreters
from pipeline.errors import StageFailed, TunegateError, from_json

TESTS = Path(__file__).parents[1]
MANY = """
import json, sys
from importlib import import_module
from pathlib import Path
from pipeline import program
from pipeline.errors import TunegateError
stage, answers = import_module(sys.argv[1]).run, []
for raw in json.loads(Path(sys.argv[2]).read_text()):
    Path(raw["folder"]).mkdir(parents=True, exist_ok=True)
    try:
        answers.append(stage(program.Request(raw["config"], raw["inputs"], Path(raw["folder"]))))
    except TunegateError as error:
        answers.append({"error": error.to_json()})
Path(sys.argv[3]).write_text(json.dumps(answers))
"""


def environ(environment: str = "train", **extra: str) -> dict[str, str]:
    """The child's environment, offline."""
    inherited = interpreters.child_environ(interpreters.find(environment))
    return {
        **inherited,
        "PYTHONPATH": f"{inherited['PYTHONPATH']}{os.pathsep}{TESTS}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


def python(code_or_file: str | Path, *args: str | Path, environment: str = "train", **extra: str) -> str:
    """Run code, or a file of tests/, in an environment; its standard output."""
    start = [str(code_or_file)] if isinstance(code_or_file, Path) else ["-c", code_or_file]
    command = [str(interpreters.find(environment).interpreter), *start, *map(str, args)]
    done = subprocess.run(command, env=environ(environment, **extra), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(
    module: str, folder: Path, config: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[program.Event]]:
    """Run the stage program as the flow does; its detail and events."""
    events: list[program.Event] = []
    command = interpreters.command(interpreters.find("train"), module)
    request = program.Request(dict(config), dict(inputs or {}), folder)
    try:
        return program.run(command, environ(), request, events.append), events
    except StageFailed:
        print(*(folder / "log.txt").read_text(errors="replace").splitlines()[-60:], sep="\n")
        raise


def run_many(
    module: str,
    requests: Sequence[tuple[Path, Mapping[str, Any], Mapping[str, Any]]],
    folder: Path,
    environment: str = "train",
    **extra: str,
) -> list[dict[str, Any] | TunegateError]:
    """Run the stage's function once a request (folder, config, inputs), in one child; details or errors."""
    asked, answered = folder / "requests.json", folder / "answers.json"
    asked.write_text(
        json.dumps([{"folder": str(place), "config": config, "inputs": inputs} for place, config, inputs in requests])
    )
    python(MANY, module, asked, answered, environment=environment, **extra)
    return [from_json(answer["error"]) if "error" in answer else answer for answer in json.loads(answered.read_text())]


def artifact(
    folder: Path, stage: str, detail: Mapping[str, Any], parents: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The record of a finished stage folder (with payload/), as a later stage is handed it."""
    return {
        "stage": stage, "key": "k", "path": str(folder), "digest": digest_folder(folder / "payload"),
        "parents": dict(parents or {}), "made_by": {}, "detail": dict(detail),
    }  # fmt: skip


def tiny(folder: Path, *options: str) -> Path:
    """A tiny random Llama in `folder` (see tiny.py)."""
    python(TESTS / "support" / "tiny.py", folder, *options)
    return folder
