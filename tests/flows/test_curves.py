"""Curves on their way to a real MLflow."""

from __future__ import annotations

import time

import pytest
from support.registered import new_home

from flows.curves import Curves
from pipeline.registry import runs as registry_runs
from pipeline.registry.client import asking

NAME = "tickets"


@pytest.fixture
def home(tmp_path, monkeypatch):
    return new_home(tmp_path, monkeypatch)


def test_curves_do_not_wait_for_mlflow(home, monkeypatch):
    """Five hundred steps reach MLflow whole, in a few requests."""
    run_id = registry_runs.open_run(NAME, "1" * 32, {})
    requests = []
    send = registry_runs.log_points
    monkeypatch.setattr(
        registry_runs, "log_points", lambda run, points: (requests.append(len(points)), send(run, points))
    )
    curves = Curves(run_id, pytest.fail)
    started = time.monotonic()
    for step in range(500):
        curves.add("loss", 1.0 / (step + 1), step)
        curves.add("tokens_per_second", 200.0, step)
    adding = time.monotonic() - started
    curves.flush()
    with asking() as client:
        assert len(client.get_metric_history(run_id, "loss")) == 500
    assert sum(requests) == 1000
    assert len(requests) <= 2 + adding / 5


def test_curves_wait_for_an_mlflow_that_is_away(home, monkeypatch):
    """A server that is away costs one message; the points are sent when it is back."""
    run_id = registry_runs.open_run(NAME, "2" * 32, {})
    told = []
    curves = Curves(run_id, told.append)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    curves.add("loss", 0.5, 1)
    curves.add("loss", 0.4, 2)
    assert len(told) == 1
    assert told[0].startswith("1 points of the curves wait for MLflow: MLflow did not answer")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    curves.flush()
    with asking() as client:
        assert [point.value for point in client.get_metric_history(run_id, "loss")] == [0.5, 0.4]
