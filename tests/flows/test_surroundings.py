"""The environment that a command sets before Prefect and MLflow read it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows import surroundings


def test_nothing_is_reported_and_the_users_own_settings_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's files lie in tunegate's folder; a log level that the user set stays."""
    for name in (*surroundings.QUIET, *surroundings.TERMINAL, "PREFECT_HOME"):
        monkeypatch.setenv(name, "x")  # so that the test's end restores it
        monkeypatch.delenv(name)
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    surroundings.set_environment()
    assert os.environ["PREFECT_HOME"] == str(tmp_path / "prefect")
    assert (os.environ["DO_NOT_TRACK"], os.environ["MLFLOW_DISABLE_TELEMETRY"]) == ("1", "true")
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert os.environ["PREFECT_LOGGING_LEVEL"] == "DEBUG"
