"""SHA-256 of values, files and folders, as hex. Standard library only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest_of(document: Any) -> str:
    """SHA-256 of a JSON document, keys sorted."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file under `folder`, by its relative posix path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in files}


def digest_folder(folder: Path) -> str:
    """One digest of all files under `folder`, their names and their bytes."""
    return digest_of(digest_files(folder))
