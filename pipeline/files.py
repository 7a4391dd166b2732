"""Files written whole or not at all, and lines that outlive a kill. Standard library only."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HALF_WRITTEN = re.compile(r"\..+\.\d+")  # the file that a killed `write_text` leaves


def write_json(path: Path, document: Any) -> None:
    """Write JSON whole or not at all, keys sorted."""
    write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text beside `path`, then rename, so that no half-written file is ever visible."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def link(path: Path, target: Path) -> None:
    """Make or change a symbolic link to a folder in one step."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target, target_is_directory=True)
    beside.replace(path)


def finished_lines(path: Path) -> list[bytes]:
    """The lines that a killed run finished; a half-written last line is cut off the file."""
    if not path.is_file():
        return []
    whole, newline, _ = path.read_bytes().rpartition(b"\n")
    with path.open("r+b") as file:
        file.truncate(len(whole) + len(newline))
    return whole.splitlines()


def write_lines(file: Path, rows: Sequence[Any]) -> None:
    """One JSON value a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
