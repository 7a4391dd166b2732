"""Which folders of the store may go: never a registered version's, a young one, or any while a build runs."""

from __future__ import annotations

import os

import pytest
from support.registered import a_build, new_home, registered

from pipeline import store
from pipeline.errors import ReviewError
from pipeline.registry import garbage

DAY_S = 86400.0
NOW_S = 1000 * DAY_S


@pytest.fixture
def work(tmp_path):
    """A store's folder with finished and half-made folders, all last changed ten days ago."""
    for place in ("finetune/aa", "finetune/bb", "merge/.cc.partial", "configs/dd", "releases/ee"):
        folder = tmp_path / "work" / place
        folder.mkdir(parents=True)
        os.utime(folder, (NOW_S - 10 * DAY_S,) * 2)
    (tmp_path / "work" / "merge" / "note.json").touch()
    return tmp_path / "work"


def removable(work, needed=(), keep_days=7.0):
    """Stage and key of what may go, with the reason."""
    chosen = garbage.removable(work, needed, NOW_S, keep_days)
    return {str(folder.relative_to(work)): reason for folder, reason in chosen}


def test_what_is_old_and_not_needed_may_go(work):
    """Remembered configs, releases and files stay; what a killed run left is named as such."""
    assert removable(work) == {
        "finetune/aa": "older than 7 days",
        "finetune/bb": "older than 7 days",
        "merge/.cc.partial": "left by a killed run",
    }


def test_what_a_version_needs_stays(work):
    """By its key, also where it is half made."""
    assert list(removable(work, needed={"bb", "cc"})) == ["finetune/aa"]


def test_what_is_young_stays(work):
    """By the folder's own time."""
    os.utime(work / "finetune" / "aa", (NOW_S - 6.9 * DAY_S,) * 2)
    assert list(removable(work)) == ["finetune/bb", "merge/.cc.partial"]
    assert removable(work, keep_days=11) == {}


def test_a_registered_versions_build_and_artefacts_stay(tmp_path, monkeypatch):
    """Whoever decided on it, and however: a rejected version may be looked at again."""
    home = new_home(tmp_path, monkeypatch)
    build = a_build(tmp_path)
    registered(build)
    keys = {artifact.key for artifact in build.artifacts.values()}
    for key in (*keys, "f" * 32):
        (home / "work" / "quantize" / key).mkdir(parents=True)
    assert [folder.name for folder, _ in garbage.garbage(keep_days=0.0)] == ["f" * 32]


def test_nothing_may_go_while_a_build_runs(tmp_path, monkeypatch):
    """What it made is in no record yet; the remedy says how to end it."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    build = "build of demo runs as process 7 on here"
    monkeypatch.setattr(store, "running_builds", lambda: [build])
    with pytest.raises(ReviewError, match=build) as refused:
        garbage.garbage(keep_days=0.0)
    assert "tunegate cancel" in refused.value.problems[0].remedy
