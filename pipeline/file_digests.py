"""SHA-256 of local files, remembered by size, times and inode, so that asking again costs a stat.

`remembered` keeps its memory in the store. Serving uses `read_here`, which trusts only bytes that this process itself has
read.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.digests import digest_file, digest_of
from pipeline.files import write_json
from pipeline.store import home

if TYPE_CHECKING:
    from pipeline.artifacts import Artifact

# A file changed again within its clock's tick would look the same, so a file is not remembered before this age.
FRESH_NS = 2_000_000_000
_READ: dict[Path, tuple[list[int], str]] = {}


def remembered(path: Path) -> str:
    """The file's SHA-256; read again only when its size, modification time or inode changed."""
    path = path.resolve()
    before = _stamp(path)
    memory = home() / "work" / "digests" / f"{digest_of(str(path))[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads(memory.read_text(encoding="utf-8"))
        if record["stamp"] == before:
            return str(record["sha256"])
    digest = digest_file(path)
    if _stamp(path) == before and time.time_ns() - before[1] > FRESH_NS:
        with contextlib.suppress(OSError):  # a store that can't be written costs time only
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {"path": str(path), "stamp": before, "sha256": digest})
    return digest


def read_here(path: Path) -> str:
    """The file's SHA-256, read by this process: in full at first, and again when its stamp changed."""
    path = path.resolve()
    before = _stamp(path)
    memory = _READ.get(path)
    if memory is not None and memory[0] == before:
        return memory[1]
    digest = digest_file(path)
    if _stamp(path) == before and time.time_ns() - before[1] > FRESH_NS:
        _READ[path] = (before, digest)
    return digest


def remembered_folder(folder: Path, names: list[str]) -> str:
    """One digest of the named files under `folder`, their names and their bytes."""
    return digest_of({name: remembered(folder / name) for name in sorted(names)})


def is_intact(artifact: Artifact) -> bool:
    """Whether an artefact's payload still has the digest in its record; unchanged files cost a stat each."""
    names = [path.relative_to(artifact.payload).as_posix() for path in artifact.payload.rglob("*") if path.is_file()]
    return remembered_folder(artifact.payload, names) == artifact.digest


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]
