"""The digest of a stage's source, which changes when the program's meaning does, and only then.

A stage's source is its program and every module of pipeline/ that it reaches. A module is reached by an import, or by a
string that is its whole name, as of a program that is started by name. It counts by its dotted name and its syntax tree,
without

- docstrings and comments;
- errors' texts: strings inside `raise` and `Problem(...)`;
- progress: statements that call `program.progress`, `program.message` or `program.metric`;
- modules that only show a result: those that the importing module lists in its constant SHOWN_WITH.

A module's digest is remembered in the store by the file's size, time and inode: a plan parses nothing twice.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.digests import digest_of

ROOT = Path(__file__).resolve().parents[2]
# Shared by all stages and free of decisions about a result: a config's resolved values are part of every key.
NOT_SOURCE = (
    "pipeline.artifacts", "pipeline.config.gate", "pipeline.config.kubernetes", "pipeline.config.methods", "pipeline.config.schema",
    "pipeline.config.section", "pipeline.digests", "pipeline.environments.interpreters", "pipeline.errors", "pipeline.program",
    "pipeline.store",
)  # fmt: skip
FORMAT = 2  # of what `plan.meaning` reads: raise it when that changes, and remembered digests are void


def source_digest(program: str, left_out: tuple[str, ...] = NOT_SOURCE) -> str:
    """Digest of the source of the program with this dotted name, such as `pipeline.merge.merge`."""
    return digest_of(modules(program, left_out))


def modules(program: str, left_out: tuple[str, ...] = NOT_SOURCE) -> dict[str, str]:
    """The modules that decide what a program makes, each with its digest, by dotted name."""
    digests: dict[str, str] = {}
    waiting, root = [program], str(ROOT)
    memory = _memory(store.home() / "work" / "configs" / "sources.json")
    while waiting:
        name = waiting.pop()
        if name in digests or name in left_out:
            continue
        module = memory.module(name, f"{root}/{name.replace('.', '/')}.py")
        if module:
            digests[name], imports = module
            waiting += imports
    memory.keep()
    return dict(sorted(digests.items()))


class _Memory:
    """Digest and imports of each module, by its file's size, time and inode."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries: dict[str, Any] = {}
        self._is_new = False
        with suppress(OSError, ValueError):
            self._entries = dict(json.loads(file.read_text(encoding="utf-8")))

    def module(self, name: str, file: str) -> tuple[str, list[str]] | None:
        """The module's digest and the names it reaches; None where the name is a package's or no module's."""
        try:
            status = os.stat(file)  # noqa: PTH116 - a Path costs more than the call, hundreds of times
        except FileNotFoundError:
            return None
        stamp = [FORMAT, file, status.st_size, status.st_mtime_ns, status.st_ino]
        entry = self._entries.get(name)
        if entry is None or entry["stamp"] != stamp:
            from pipeline.plan import meaning

            digest, names = meaning.read(Path(file).read_text(encoding="utf-8"))
            imports = [name for name in names if not _is_attribute(name)]
            entry = self._entries[name] = {"stamp": stamp, "digest": digest, "reached": imports}
            self._is_new = True
        return entry["digest"], entry["reached"]

    def keep(self) -> None:
        """Write what is new beside, then rename.

        Nothing is written before a store is there. A store that can't be written costs time only.
        """
        if not self._is_new or not store.home().is_dir():
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
            beside.write_text(json.dumps(self._entries), encoding="utf-8")
            beside.replace(self._file)
            self._is_new = False


def _is_attribute(name: str) -> bool:
    """Whether a dotted name lies inside a module's file, such as `pipeline.errors.Problem`."""
    parent = name.rpartition(".")[0]
    return ROOT.joinpath(*parent.split(".")).with_suffix(".py").is_file()


@cache
def _memory(file: Path) -> _Memory:
    return _Memory(file)
