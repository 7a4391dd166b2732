"""Which folders of the store may go: those of no registered version's build, no running build and no recent day."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from pipeline import store
from pipeline.errors import Problem, ReviewError
from pipeline.registry import versions

NEVER = ("configs", "releases")  # remembered configs are small, and releases may serve


def garbage(keep_days: float) -> Iterator[tuple[Path, str]]:
    """Folders of the store that may go, each with the reason; what is younger than `keep_days` stays.

    Raises ReviewError while a build runs: it holds folders that nothing names yet.
    """
    builds = store.running_builds()
    if builds:
        remedy = "tunegate cancel, or wait for its end"
        raise ReviewError([Problem(f"a {build}", allowed="gc while no build runs", remedy=remedy) for build in builds])
    return removable(store.home() / "work", _keys_of_versions(), time.time(), keep_days)


def removable(work: Path, needed: Collection[str], now_s: float, keep_days: float) -> Iterator[tuple[Path, str]]:
    """Folders `work/STAGE/KEY` whose key isn't needed and that were last changed more than `keep_days` before `now_s`."""
    horizon = now_s - keep_days * 86400
    for folder in sorted(work.glob("*/*")):
        if not folder.is_dir() or folder.parent.name in NEVER:
            continue
        key = folder.name.strip(".").removesuffix(".partial")
        if key not in needed and folder.stat().st_mtime < horizon:
            is_partial = folder.name.endswith(".partial")
            yield folder, "left by a killed run" if is_partial else f"older than {keep_days:g} days"


def _keys_of_versions() -> set[str]:
    """The keys of the builds that registered versions came from, and of those builds' artefacts."""
    keys = set()
    for name in versions.names():
        for version in versions.versions(name):
            file = store.build_folder(version.build_key) / "build.json"
            if file.is_file():
                record = json.loads(file.read_text(encoding="utf-8"))
                keys |= {artifact["key"] for artifact in record["artifacts"].values()}
                keys.add(file.parent.name)
    return keys
