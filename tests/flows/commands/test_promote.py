"""`tunegate promote` and `rollback`: what a dry run tells, and what a rollback may bring back by MLflow."""

from __future__ import annotations

import argparse
import socket
import threading

import pytest
from support.registered import EASY, a_build, new_home, registered
from support.released import ENVIRONMENT, a_config, servers_under
from support.wire import chat, free_port, said

from flows.commands import chat as chat_command
from flows.commands import housekeeping, promote
from pipeline.deployment import promote as deployment
from pipeline.deployment import proxy, steps
from pipeline.deployment.steps import Promotion
from pipeline.errors import RegistryError, ReviewError, RoutingError
from pipeline.registry import versions
from pipeline.serving import runtimes

NAME = "tickets"


class World:
    """A home with a registry and one proxy, and versions that answer with their number."""

    def __init__(self, folder):
        self.folder = folder
        self.config = a_config(gate=EASY.model_dump())

    def release(self, number):
        """Register, approve and promote a version."""
        version = registered(a_build(self.folder, number, config=self.config))
        versions.decide(NAME, version, "approved", "ann", "")
        release = versions.release(NAME, version)
        deployment.promote(Promotion(release, self.config, ENVIRONMENT, versions.set_champion, lambda event: None))

    def rollback(self, *, dry_run=False):
        """What the terminal calls."""
        return promote.rollback(argparse.Namespace(name=NAME, dry_run=dry_run))

    def answer(self):
        """What a client is answered now."""
        return said(chat(proxy.client_url(self.config.promote)))


@pytest.fixture
def world(tmp_path, monkeypatch):
    new_home(tmp_path, monkeypatch)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(steps, "SETTLE_S", 0.1)
    monkeypatch.setattr(runtimes, "environment_of", lambda config: ENVIRONMENT)
    made = World(tmp_path)
    for number in (1, 2):
        made.release(number)
    yield made
    deployment.stop(NAME, timeout_s=0.2)
    assert servers_under(tmp_path) == []


def test_a_rollback_puts_back_what_is_still_approved(world, capsys):
    """With the newest decision on it, which may be another person's."""
    versions.decide(NAME, "1", "approved", "bob", "looked again")
    assert world.rollback(dry_run=True) == 0
    assert "would put back tickets v1" in capsys.readouterr().out
    assert world.rollback() == 0
    assert world.answer() == "version 1"
    assert "approved by bob" in capsys.readouterr().out
    assert versions.champion(NAME).version == "1"


def test_a_rollback_refuses_what_was_rejected_since(world):
    """Nothing changes, also in a dry run; the error says who rejected it, why, and what can be put back instead."""
    world.release(3)
    versions.decide(NAME, "2", "rejected", "ann", "it leaks addresses")
    for dry_run in (True, False):
        with pytest.raises(ReviewError) as refused:
            world.rollback(dry_run=dry_run)
        (problem,) = refused.value.problems
        assert "version 2, which was live before, is rejected by ann: it leaks addresses" in problem.what
        assert (problem.allowed, problem.remedy) == ("1", "tunegate promote tickets --version 1")
    assert world.answer() == "version 3"
    assert versions.champion(NAME).version == "3"
    versions.decide(NAME, "1", "rejected", "ann", "so does this")
    with pytest.raises(ReviewError, match="tunegate review tickets"):
        world.rollback()


def test_a_rollback_does_without_mlflow(world, monkeypatch, capsys):
    """It serves by the decision that it was promoted by, and says so; only the alias waits for MLflow."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RegistryError, match="did not answer"):
        world.rollback()
    assert world.answer() == "version 1"
    told = capsys.readouterr().out
    assert "MLflow did not answer" in told
    assert "v1 was approved by ann when it was promoted" in told
    assert deployment.status(NAME).unfinished == ("alias",)


def test_a_rollback_does_not_wait_for_a_silent_mlflow(world, monkeypatch, capsys):
    """Nor does one fail whose version MLflow has lost."""
    over, really = threading.Event(), versions.versions
    monkeypatch.setattr(housekeeping, "MLFLOW_ANSWERS_WITHIN_S", 0.1)
    monkeypatch.setattr(versions, "versions", lambda name: over.wait() and really(name))
    assert world.rollback(dry_run=True) == 0
    over.set()
    assert "MLflow did not answer within" in capsys.readouterr().out
    monkeypatch.setattr(housekeeping, "MLFLOW_ANSWERS_WITHIN_S", 60.0)
    monkeypatch.setattr(versions, "versions", lambda name: [])
    assert world.rollback(dry_run=True) == 0
    assert "MLflow knows no version 1 of tickets" in capsys.readouterr().out


DRY = argparse.Namespace(name=NAME, version=None, dry_run=True)


def test_a_dry_run_prints_the_steps_of_the_table(world, capsys):
    """In their order; with the proxy as it is, no request is dropped, and nothing changes."""
    before = servers_under(world.folder)
    assert promote.promote(DRY) == 0
    printed = capsys.readouterr().out
    assert "tickets v2 is approved by ann and unchanged" in printed
    assert f"steps: {', '.join(step.says for step in steps.STEPS.values())}\n" in printed
    assert "no request is dropped" in printed
    assert servers_under(world.folder) == before


def test_a_dry_run_says_whether_requests_would_be_lost(world, monkeypatch, capsys):
    """Where the proxy moves, from where to where; it doesn't move yet."""
    moved, before = a_config(gate=EASY.model_dump()), deployment.status(NAME).url
    monkeypatch.setattr(versions, "config_of", lambda run_id: moved)
    assert promote.promote(DRY) == 0
    assert f"not lossless: the proxy moves from {before} to" in capsys.readouterr().out
    assert deployment.status(NAME).url == before


def test_a_dry_run_tells_of_a_port_that_is_taken(world, monkeypatch):
    """Before anything starts."""
    moved = a_config(gate=EASY.model_dump())
    monkeypatch.setattr(versions, "config_of", lambda run_id: moved)
    with (
        socket.create_server(("127.0.0.1", moved.promote.port)),
        pytest.raises(RoutingError, match="something else"),
    ):
        promote.promote(DRY)


def test_a_promotion_prints_the_status_it_came_to(world, monkeypatch, capsys):
    """Of what is live already too: nothing is done, and the first release has nothing before it to go back to."""
    assert promote.promote(argparse.Namespace(name=NAME, version="2", dry_run=False)) == 0
    assert "tickets v2 is live" in capsys.readouterr().out
    assert world.rollback() == 0
    with pytest.raises(ReviewError, match="no release was live before this one"):
        world.rollback()


def test_what_was_rejected_since_is_shown_as_such_and_can_be_talked_to(world, capsys):
    """It serves on: status says by whom and why it was rejected, and a chat reaches it, with a system prompt."""
    versions.decide(NAME, "2", "rejected", "bob", "it leaks addresses")
    housekeeping.print_status(NAME)
    assert "rejected  by bob: it leaks addresses" in capsys.readouterr().out
    options = argparse.Namespace(name=NAME, candidate=False, message="hello", system="Be brief.")
    assert chat_command.chat(options) == 0
    assert "version 2" in capsys.readouterr().out
