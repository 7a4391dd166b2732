"""What `tunegate run` says of a build that passed: where its version stands, and the next command."""

from __future__ import annotations

import pytest
from registered import a_build, new_home, registered

from flows import run
from pipeline import deployment_state, registry
from pipeline.artifacts import Release
from pipeline.deployment_state import Placement

NAME = "tickets"


@pytest.fixture
def version(tmp_path, monkeypatch):
    """A registered version that passed its gate."""
    new_home(tmp_path, monkeypatch)
    build = a_build(tmp_path)
    assert build.name == NAME
    return registered(build)


def promoted(version: str) -> None:
    """Leave the record of a promotion, as deployment.py does."""
    record, release = deployment_state.read(NAME), registry.release(NAME, version)
    assert isinstance(release, Release)
    config = registry.config_of(release.run_id).model_dump(mode="json")
    live = Placement(release=release, config=config, folder=deployment_state.folder(NAME))
    deployment_state.write(record.with_changes(live=live))


def test_a_version_nobody_decided_on_waits_for_review(version):
    """With the page and all that is still to do."""
    said = run.standing(NAME, version, "PAGE")
    assert "waits for review: PAGE" in said
    assert "tunegate review tickets, then tunegate approve tickets, then tunegate promote tickets" in said


def test_a_decided_version_does_not_wait(version):
    """Once approved it is to be promoted; once promoted nothing is to be done."""
    registry.decide(NAME, version, "approved", "mara", "")
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
    registry.decide(NAME, version, "rejected", "mara", "it swears")
    said = run.standing(NAME, version, "PAGE")
    assert "was rejected by mara: it swears" in said
    assert "promote" not in said
