"""Day two from a terminal, where MLflow has its say: what a rollback may bring back."""

from __future__ import annotations

import argparse
import threading

import pytest
from support.registered import EASY, a_build, new_home, registered
from support.released import ENVIRONMENT, a_config, servers_under
from support.wire import chat, free_port, said

from flows.commands import operate
from pipeline.deployment import promote, proxy, steps
from pipeline.deployment.steps import Promotion
from pipeline.errors import RegistryError, ReviewError
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
        promote.promote(Promotion(release, self.config, ENVIRONMENT, versions.set_champion, lambda event: None))

    def rollback(self, *, dry_run=False):
        """What the terminal calls."""
        return operate.rollback(argparse.Namespace(name=NAME, dry_run=dry_run))

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
    promote.stop(NAME, timeout_s=0.2)
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
    assert promote.status(NAME).unfinished == ("alias",)


def test_a_rollback_does_not_wait_for_a_silent_mlflow(world, monkeypatch, capsys):
    """Nor does one fail whose version MLflow has lost."""
    over, really = threading.Event(), versions.versions
    monkeypatch.setattr(operate, "MLFLOW_ANSWERS_WITHIN_S", 0.1)
    monkeypatch.setattr(versions, "versions", lambda name: over.wait() and really(name))
    assert world.rollback(dry_run=True) == 0
    over.set()
    assert "MLflow did not answer within" in capsys.readouterr().out
    monkeypatch.setattr(operate, "MLFLOW_ANSWERS_WITHIN_S", 60.0)
    monkeypatch.setattr(versions, "versions", lambda name: [])
    assert world.rollback(dry_run=True) == 0
    assert "MLflow knows no version 1 of tickets" in capsys.readouterr().out
