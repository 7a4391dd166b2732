"""A deployment's record on disk: the releases that are live, wanted, leaving, kept, and those that were live before.

One JSON file a deployment, written beside and renamed: `kill -9` at any moment leaves either the old or the new
record. No step is taken here; steps.py reads the record, acts, and writes it again.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.artifacts import Record, Release
from pipeline.config.schema import Config
from pipeline.files import write_json
from pipeline.serving.server import Server


class Placement(Record):
    """A release, the config it is served with, its server's folder, and the server once it is started."""

    release: Release
    config: dict[str, Any]
    folder: Path
    server: Server | None = None

    def settings(self) -> Config:
        """The config as a record."""
        return Config.model_validate(self.config)

    def is_of(self, release: Release, config: Config) -> bool:
        """Whether this is that release, served in that way."""
        same = self.release.version == release.version and self.release.unit == release.unit
        return same and self.config["serve"] == config.serve.model_dump(mode="json")


class Deployment(Record):
    """The whole record.

    `wanted` is set from before its server starts until the proxy sends to it. `leaving` are servers that still run
    and get no more requests from the proxy. `kept` was left running for a quick rollback. `champion` is the version
    that the alias was last moved to. `history` are the releases that were live before, oldest first. `went_back`:
    the last switch returned to one of them.
    """

    name: str
    live: Placement | None = None
    since: datetime | None = None
    wanted: Placement | None = None
    leaving: tuple[Placement, ...] = ()
    kept: Placement | None = None
    champion: str | None = None
    history: tuple[Placement, ...] = ()
    went_back: bool = False

    def with_changes(self, **changes: Any) -> Deployment:
        """The record with some fields replaced."""
        return self.model_copy(update=changes)

    def after_switch(self) -> Deployment:
        """The record once the proxy sends to the wanted server: the old one leaves, the history is updated.

        Going back to an earlier release forgets the releases after it, so that going back again goes further.
        """
        if self.wanted is None:
            return self
        old, new, history = self.live, self.wanted, self.history
        earlier = [placement.release.version for placement in history]
        went_back = new.release.version in earlier
        if went_back:
            history = history[: earlier.index(new.release.version)]
        elif old is not None and old.release.version != new.release.version:
            history = (*history, old.model_copy(update={"server": None}))
        leaving = (*self.leaving, old) if old is not None and old.server is not None else self.leaving
        spare = None if self.kept is not None and self.kept.server == new.server else self.kept
        return self.with_changes(
            live=new,
            since=datetime.now(UTC),
            wanted=None,
            leaving=leaving,
            kept=spare,
            history=history,
            went_back=went_back,
        )


def folder(name: str) -> Path:
    """Where a deployment keeps its record, its servers' folders and its proxy."""
    return store.home() / "deployments" / name


def proxy_folder(name: str) -> Path:
    """The folder of the deployment's proxy."""
    return folder(name) / "proxy"


def names() -> list[str]:
    """Every deployment on this machine."""
    return sorted(path.parent.name for path in (store.home() / "deployments").glob("*/state.json"))


def read(name: str) -> Deployment:
    """The deployment's record; an empty one where nothing was ever promoted."""
    file = folder(name) / "state.json"
    if not file.is_file():
        return Deployment(name=name)
    return Deployment.model_validate_json(file.read_text(encoding="utf-8"))


def write(deployment: Deployment) -> None:
    """Replace the deployment's record in one step."""
    folder(deployment.name).mkdir(parents=True, exist_ok=True)
    write_json(folder(deployment.name) / "state.json", json.loads(deployment.model_dump_json()))


def server_folder(name: str, version: str) -> Path:
    """A folder for one more server of that version, not made yet."""
    number = 1
    while (free := folder(name) / "servers" / f"v{version}-{number}").exists():
        number += 1
    return free
