"""The connection to MLflow, away or new."""

from __future__ import annotations

import pytest
from support.registered import new_home

from pipeline.errors import RegistryError
from pipeline.registry import client as registry_client
from pipeline.registry import versions

NAME = "tickets"


@pytest.fixture
def home(tmp_path, monkeypatch):
    return new_home(tmp_path, monkeypatch)


def test_a_server_that_is_away_is_named_without_its_password(home, monkeypatch):
    """The error says where MLflow was looked for and what to do, and prints no password."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@127.0.0.1:9")
    with pytest.raises(RegistryError, match="MLflow did not answer") as error:
        versions.versions(NAME)
    assert error.value.problems[0].file == "http://127.0.0.1:9"
    assert "MLFLOW_TRACKING_URI" in error.value.problems[0].remedy
    assert "secret" not in str(error.value)


def test_the_first_question_makes_the_database(tmp_path, monkeypatch):
    """Whether MLflow's tables must be made first is known before they are, so that a person can be told."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "fresh"))
    assert registry_client.is_new()
    new_home(tmp_path, monkeypatch)
    assert not registry_client.is_new()
