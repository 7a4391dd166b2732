"""`tunegate status`, `logs` and `gc`: what they print and what they leave alone. `cancel` is in test_store.py."""

from __future__ import annotations

import argparse
import json
import os
from types import SimpleNamespace

import pytest
from support.registered import a_build, new_home, registered
from support.released import a_config

from flows.commands import housekeeping
from pipeline import store
from pipeline.deployment import state
from pipeline.deployment.state import Placement
from pipeline.errors import RegistryError, ReviewError, ServingError
from pipeline.registry import versions

NAME = "tickets"


@pytest.fixture
def home(tmp_path, monkeypatch):
    return new_home(tmp_path, monkeypatch)


def status(*, name: str | None = None, as_json: bool = False) -> int:
    """What the terminal calls."""
    return housekeeping.status(argparse.Namespace(name=name, json=as_json))


def logs(**chosen) -> int:
    """What the terminal calls, without --follow."""
    return housekeeping.logs(argparse.Namespace(**{"name": None, "stage": None, "lines": 2, "follow": False, **chosen}))


def live(tmp_path) -> str:
    """Register and approve a version, and leave the record of its promotion; its server was stopped."""
    version = registered(a_build(tmp_path))
    versions.decide(NAME, version, "approved", "ann", "")
    release = versions.release(NAME, version)
    placement = Placement(release=release, config=a_config().model_dump(mode="json"), folder=tmp_path)
    state.write(state.read(NAME).with_changes(live=placement, champion=version))
    return version


def test_status_of_an_empty_home_names_the_first_command(home, capsys):
    """For people; for programs it is an empty list."""
    assert status() == 0
    assert capsys.readouterr().out == "no model is registered yet; next: tunegate run CONFIG\n"
    assert status(as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_status_names_what_serves_what_waits_and_what_runs(home, tmp_path, monkeypatch, capsys):
    """Each with its next command, where this machine can give it."""
    live(tmp_path)
    registered(a_build(tmp_path, 2))
    elsewhere = SimpleNamespace(name="other", is_here=False)
    monkeypatch.setattr(store, "running_builds", lambda: [SimpleNamespace(name="demo", is_here=True), elsewhere])
    assert status() == 0
    printed = capsys.readouterr().out
    assert "tickets v1 is stopped" in printed
    assert "v2 waits for review: tunegate review tickets" in printed
    assert "tunegate cancel demo" in printed
    assert "tunegate cancel other" not in printed
    assert status(name=NAME, as_json=True) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["version"], report["state"], report["unfinished"]) == ("1", "stopped", [])


def test_status_says_that_what_serves_was_rejected_since(home, tmp_path, monkeypatch, capsys):
    """By whom and why; without MLflow the rest is printed all the same."""
    version = live(tmp_path)
    versions.decide(NAME, version, "rejected", "bob", "it leaks addresses")
    assert housekeeping.print_status(NAME) == 0
    assert "  rejected  by bob: it leaks addresses; promote another version" in capsys.readouterr().out

    def away(_name):
        raise RegistryError("away", remedy="wait")

    monkeypatch.setattr(versions, "versions", away)
    assert housekeeping.print_status(NAME) == 0
    printed = capsys.readouterr().out
    assert "rejected" not in printed
    assert "tickets v1 is stopped" in printed


def a_log(folder, text: str, age_s: int):
    """A stage's log that was written so long ago."""
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    log.write_text(text, encoding="utf-8")
    os.utime(log, (1_000_000 - age_s,) * 2)


def test_a_stages_log_is_its_newest(home, capsys):
    """Finished or cut short; only the last lines, whatever bytes they hold."""
    work = home / "work" / "finetune"
    a_log(work / "aa", "old\n", 9)
    a_log(work / ".bb.partial", "first\n" + "x" * 5000 + "\nlast but one\nlast\n", 1)
    (work / ".bb.partial" / "log.txt").open("ab").write(b"\xff\n")
    os.utime(work / ".bb.partial" / "log.txt", (999_999,) * 2)
    assert logs(stage="finetune") == 0
    assert capsys.readouterr().out == "last\n\ufffd\n"


def test_a_stage_without_a_log_is_answered_with_those_that_have_one(home, tmp_path):
    """And a model without a server with the command that starts one."""
    a_log(home / "work" / "merge" / "aa", "text\n", 1)
    with pytest.raises(ReviewError, match="the stage finetune left no log") as refused:
        logs(stage="finetune")
    assert refused.value.problems[0].allowed == "merge"
    live(tmp_path)
    with pytest.raises(ServingError, match="tunegate promote tickets"):
        logs(name=NAME)


@pytest.mark.parametrize("dry_run", [True, False])
def test_gc_deletes_what_may_go_and_says_how_much_that_is(home, capsys, dry_run):
    """A dry run says the same and deletes nothing."""
    folder = home / "work" / "finetune" / "aa"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(3 * 2**20))
    os.utime(folder, (1_000_000,) * 2)
    (home / "work" / "finetune" / "young").mkdir()
    assert housekeeping.gc(argparse.Namespace(keep_days=7.0, dry_run=dry_run)) == 0
    verb, would = ("would delete", "would be ") if dry_run else ("deleted", "")
    assert capsys.readouterr().out == (f"{verb} work/finetune/aa  3 MiB  (older than 7 days)\n3 MiB {would}freed\n")
    assert folder.is_dir() == dry_run
    assert (home / "work" / "finetune" / "young").is_dir()
