"""Where artefacts lie: mlruns/work/STAGE/KEY/, complete or not there at all.

A stage works in a partial folder of the same key, which is renamed when it is done. After `kill -9` the next run finds the
partial folder with its checkpoints and goes on. One lock a key keeps two runs apart.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.digests import digest_folder
from pipeline.errors import Busy, ResourceError
from pipeline.files import write_json

if TYPE_CHECKING:
    from pipeline.artifacts import Artifact

KEPT_BESIDE_PAYLOAD = {"payload", "extra", "log.txt", "request.json", "artifact.json"}


def home() -> Path:
    """The folder that holds MLflow's database, artefacts and work: $TUNEGATE_HOME or ./mlruns, absolute."""
    return Path(os.environ.get("TUNEGATE_HOME", "mlruns")).resolve()


def raise_for_unwritable_home() -> None:
    """Raise ResourceError when nothing can be written into `home()`, or it can't be made; nothing is left there."""
    import tempfile  # here because `tunegate check` imports this module and never asks

    folder = home()
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise ResourceError(
            f"can't be written: {error.strerror}",
            file=str(folder),
            key="TUNEGATE_HOME",
            allowed="a folder that may be written, or made; unset: ./mlruns",
            remedy="export TUNEGATE_HOME=FOLDER, on a disk that you may write to",
        ) from None


def holds(file: Path) -> bool:
    """Whether a file of the store is there; one below a folder that may not be entered isn't."""
    try:
        return file.is_file()
    except PermissionError:
        return False


def folder_of(stage: str, key: str) -> Path:
    """The folder of the finished artefact of this key, if it is there."""
    return home() / "work" / stage / key


def peek(stage: str, key: str) -> dict[str, Any] | None:
    """The finished artefact of this key as plain JSON, or None."""
    file = folder_of(stage, key) / "artifact.json"
    if not holds(file):
        return None
    return {**json.loads(file.read_text(encoding="utf-8")), "path": str(file.parent)}


def find(stage: str, key: str) -> Artifact | None:
    """The finished artefact of this key, or None."""
    from pipeline.artifacts import Artifact

    record = peek(stage, key)
    return Artifact(**record) if record else None


def build_folder(key: str) -> Path:
    """The folder of a build's reports and its record."""
    return home() / "work" / "build" / key


def peek_build(key: str) -> dict[str, Any] | None:
    """A finished build's record (outcome, version, run), or None."""
    file = build_folder(key) / "finished.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if holds(file) else None


def finished_builds(name: str | None = None) -> list[dict[str, Any]]:
    """The records of finished builds, newest first: those of one model, or all."""
    files = build_folder("*").parent.glob("*/finished.json")
    builds = [dict(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    of_name = (build for build in builds if name in (None, build["name"]))
    return sorted(of_name, key=lambda build: str(build["at"]), reverse=True)


@contextmanager
def lock(name: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the machine-wide lock `name`; it is released by the system when the process dies.

    Raises Busy when another process holds it and `wait` is false.
    """
    path = home() / "locks" / name.replace("/", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy(
                f"another process holds the lock {name}",
                file=str(path),
                remedy="wait for it, or end it with `tunegate cancel`",
            ) from None
        yield


@contextmanager
def making(stage: str, key: str) -> Iterator[Path]:
    """Hold the key's lock and yield its partial folder, which may hold a killed run's files."""
    with lock(f"{stage}/{key}"):
        partial = folder_of(stage, f".{key}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        yield partial


def finished(partial: Path) -> Path:
    """The folder that this partial folder will become; another folder stays as it is."""
    return partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))


def finish(
    stage: str, key: str, partial: Path, *, parents: dict[str, str], made_by: dict[str, str], detail: dict[str, Any]
) -> Artifact:
    """Turn a partial folder into the finished artefact: drop scratch, digest the payload, write the record, rename.

    Must be called while `making` is held.
    """
    for path in partial.iterdir():
        if path.name not in KEPT_BESIDE_PAYLOAD:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    digest = digest_folder(partial / "payload")
    record = {"stage": stage, "key": key, "digest": digest, "parents": parents, "made_by": made_by, "detail": detail}
    write_json(partial / "artifact.json", record)
    partial.rename(folder_of(stage, key))
    artifact = find(stage, key)
    assert artifact is not None  # noqa: S101 - just renamed there
    return artifact


@dataclass(frozen=True)
class RunningBuild:
    """A build that runs, on this machine or another one that has the same store."""

    name: str
    host: str
    pid: int

    @property
    def is_here(self) -> bool:
        """Whether `pid` is a process of this machine."""
        return self.host == os.uname().nodename

    def __str__(self) -> str:
        return f"build of {self.name} runs as process {self.pid}" + ("" if self.is_here else f" on {self.host}")


@contextmanager
def running(name: str) -> Iterator[None]:
    """Keep a note, for `status`, `cancel` and `gc`, that this process runs a build of `name`.

    The note is locked for as long as the process lives, so that a killed process's note doesn't count, whichever machine or pod
    it ran in.
    """
    note = RunningBuild(name, os.uname().nodename, os.getpid())
    file = home() / "running" / f"{note.host}-{note.pid}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}")
    with beside.open("w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(json.dumps(asdict(note)))
        stream.flush()
        beside.replace(file)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def running_builds() -> list[RunningBuild]:
    """The builds that work in this store now."""
    builds = []
    for file in sorted((home() / "running").glob("*.json")):
        with suppress(FileNotFoundError), file.open(encoding="utf-8") as note:  # it may end meanwhile
            try:
                fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                builds.append(RunningBuild(**json.load(note)))
    return builds
