"""What `tunegate run` says of a build that passed: where its version stands, and the next command."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.registered import a_build, new_home, registered

from flows import build, retrain
from flows.commands import run
from pipeline import store
from pipeline.artifacts import Release
from pipeline.deployment import state
from pipeline.deployment.state import Placement
from pipeline.errors import Busy
from pipeline.registry import versions

NAME = "tickets"


@pytest.fixture
def version(tmp_path, monkeypatch):
    """A registered version that passed its gate."""
    new_home(tmp_path, monkeypatch)
    build = a_build(tmp_path)
    assert build.name == NAME
    return registered(build)


@pytest.mark.parametrize("command", ["run", "build", "retrain"])
def test_a_finished_build_takes_over_where_it_is_promoted_to(tmp_path, version, monkeypatch, capsys, command):
    """With nothing to build, `tunegate run CONFIG` still brings another promote.port to the next promotion."""
    finished = store.peek_build(a_build(tmp_path / "again").key)
    run_id = str(finished["run_id"])
    config = versions.config_of(run_id).model_dump(mode="json")
    config["promote"]["port"] = 9999
    planned = SimpleNamespace(finished=finished, key=finished["build_key"])
    for module in (run.resolve, build.resolve, retrain.resolve):
        monkeypatch.setattr(module, "resolve", lambda *_: config)
        monkeypatch.setattr(module, "sources", lambda _: {})
    monkeypatch.setattr(build.plan, "make", lambda *_: planned)
    monkeypatch.setattr(run.check, "show", lambda *_, **__: planned)
    monkeypatch.setattr(run, "report", lambda _: None)
    monkeypatch.setattr(retrain, "get_run_logger", lambda: logging.getLogger(__name__))
    if command == "run":
        options = argparse.Namespace(config=tmp_path, set=[], data_dir=None, dry_run=False, again=False)
        assert run.run(options) == 0
        said = capsys.readouterr().out
        assert f"the next promotion (tunegate promote tickets --version {version}): promote\n" in said
    elif command == "build":
        assert build.run(config, print) == finished
    else:
        assert retrain.retrain.fn() == finished
    assert versions.config_of(run_id).promote.port == 9999


def promoted(version: str) -> None:
    """Leave the record of a promotion, as a switch leaves it."""
    record, release = state.read(NAME), versions.release(NAME, version)
    assert isinstance(release, Release)
    config = versions.config_of(release.run_id).model_dump(mode="json")
    live = Placement(release=release, config=config, folder=state.folder(NAME))
    state.write(record.with_changes(live=live))


def test_a_version_nobody_decided_on_waits_for_review(version):
    """With the page and all that is still to do."""
    said = run.standing(NAME, version, "PAGE")
    assert "waits for review: PAGE" in said
    assert "tunegate review tickets, then tunegate approve tickets, then tunegate promote tickets" in said


def test_a_decided_version_does_not_wait(version):
    """Once approved it is to be promoted; once promoted nothing is to be done."""
    versions.decide(NAME, version, "approved", "mara", "")
    said = run.standing(NAME, version, "PAGE")
    assert "was approved by mara: PAGE" in said
    assert said.endswith(f"tunegate promote tickets --version {version}")
    promoted(version)
    said = run.standing(NAME, version, "PAGE")
    assert "was approved by mara and promoted" in said
    assert "waits" not in said
    assert "tunegate promote" not in said


def test_a_rejected_version_says_by_whom_and_why(version):
    """And asks for no promotion."""
    versions.decide(NAME, version, "rejected", "mara", "it swears")
    said = run.standing(NAME, version, "PAGE")
    assert "was rejected by mara: it swears" in said
    assert "promote" not in said


def test_a_build_that_waits_for_another_says_so_at_once(tmp_path, monkeypatch) -> None:
    """With who holds it and what ends or shows that; one that waits for nobody says nothing."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    holder = (
        "import time\nfrom pipeline import store\n"
        "with store.lock('build/k1'), store.running('tickets'):\n    print('held', flush=True)\n    input()"
    )
    said = []
    with subprocess.Popen(
        [sys.executable, "-c", holder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as other:
        assert other.stdout.readline() == "held\n"

        def on_event(event):
            said.append(event["text"])
            other.stdin.write("\n")
            other.stdin.flush()

        with build._turn(SimpleNamespace(name="tickets", key="k1"), on_event):
            assert other.wait(240) == 0
            with pytest.raises(Busy), store.lock("build/k1", wait=False):
                pass
    ends = "(tunegate cancel tickets ends it, tunegate logs --stage STAGE shows it)"
    assert said == [f"waiting for the build of tickets by process {other.pid} {ends}"]
    with build._turn(SimpleNamespace(name="tickets", key="k1"), said.append):
        assert len(said) == 1
