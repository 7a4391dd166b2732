"""A deployment's record: read back as it was written, and what a switch makes of it."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from support.released import a_config, a_model, a_release

from pipeline.deployment import state
from pipeline.deployment.state import Deployment, Placement
from pipeline.serving.server import Server

NAME = "tickets"
FIELDS_OF_0_1 = {"name", "live", "since", "wanted", "leaving", "kept", "champion", "history", "went_back"}


@pytest.fixture
def placed(tmp_path, monkeypatch):
    """A function that gives a version's placement, with a server that never ran."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    config = a_config()

    def place(version: str) -> Placement:
        folder = tmp_path / "models" / version
        release = a_release(folder if folder.is_dir() else a_model(folder), version, config)
        server = Server(
            runtime="process", unit_digest="0", url=f"http://127.0.0.1:{9000 + int(version)}", model=NAME,
            folder=tmp_path, log=tmp_path / "vllm.log",
        )  # fmt: skip
        return Placement(
            release=release, config=config.model_dump(mode="json"), folder=tmp_path / version, server=server
        )

    return place


def test_a_record_is_read_as_it_was_written(placed):
    """Under the names that homes of version 0.1 have; nothing is left beside it."""
    assert state.read(NAME) == Deployment(name=NAME)
    assert state.names() == []
    record = Deployment(name=NAME, live=placed("2"), kept=placed("1"), history=(placed("1"),), champion="2")
    state.write(record)
    assert state.read(NAME) == record
    assert state.names() == [NAME]
    assert [path.name for path in state.folder(NAME).iterdir()] == ["state.json"]
    assert json.loads((state.folder(NAME) / "state.json").read_text()).keys() == FIELDS_OF_0_1


def test_a_field_that_is_not_known_is_an_error(placed):
    """A record of a later version isn't half understood."""
    state.write(Deployment(name=NAME))
    file = state.folder(NAME) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "canary": 1}))
    with pytest.raises(ValidationError, match="canary"):
        state.read(NAME)


def test_a_switch_sends_the_old_server_away_and_remembers_its_release(placed):
    """Without its server: going back starts another one."""
    switched = Deployment(name=NAME, live=placed("1"), wanted=placed("2"), kept=placed("2")).after_switch()
    assert (switched.live, switched.wanted, switched.kept) == (placed("2"), None, None)
    assert switched.leaving == (placed("1"),)
    assert [(entry.release.version, entry.server) for entry in switched.history] == [("1", None)]
    assert not switched.went_back
    assert switched.after_switch() is switched


def test_going_back_forgets_the_releases_after_it(placed):
    """So that going back again goes further."""
    history = tuple(placed(version) for version in ("1", "2", "3"))
    back = Deployment(name=NAME, live=placed("4"), wanted=placed("2"), history=history).after_switch()
    assert back.went_back
    assert [entry.release.version for entry in back.history] == ["1"]
    again = back.with_changes(wanted=placed("2"), leaving=()).after_switch()
    assert [entry.release.version for entry in again.history] == ["1"]


def test_a_placement_is_of_a_release_served_in_the_same_way(placed):
    """Another place of the proxy is the same; another length or another version is not."""
    placement = placed("1")
    config = placement.settings()
    assert placement.is_of(placement.release, config)
    assert placement.is_of(placement.release, a_config())
    assert not placement.is_of(placement.release, a_config(serve={"max_model_len": 128}))
    assert not placement.is_of(placed("2").release, config)


def test_each_server_of_a_version_has_a_folder_of_its_own(placed):
    """Logs of an earlier one aren't written over."""
    first = state.server_folder(NAME, "1")
    first.mkdir(parents=True)
    assert [first.name, state.server_folder(NAME, "1").name] == ["v1-1", "v1-2"]
