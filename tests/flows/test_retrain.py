"""Retraining builds only when something changed."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from flows import retrain


@pytest.mark.parametrize("finished", [None, {"outcome": "pass", "run_id": "r", "version": "1"}])
def test_an_unchanged_config_is_not_built_again(monkeypatch: pytest.MonkeyPatch, finished: dict | None) -> None:
    """Its summary is returned, and the sections that aren't judged are taken over; else the build flow runs."""
    monkeypatch.setattr(retrain.resolve, "resolve", lambda *_: {"name": "tickets"})
    monkeypatch.setattr(retrain.resolve, "sources", lambda _config: {})
    monkeypatch.setattr(retrain.plan, "make", lambda *_: SimpleNamespace(key="k" * 32, finished=finished))
    monkeypatch.setattr(retrain, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(retrain, "build", lambda *arguments: {"built": arguments})
    refreshed: list[tuple] = []
    monkeypatch.setattr(retrain.runs, "take_over", lambda *arguments: refreshed.append(arguments))
    summary = retrain.retrain.fn("use.yaml", "data", ["seed=1"])
    assert summary == (finished or {"built": ("use.yaml", "data", ["seed=1"])})
    assert refreshed == ([(finished, {"name": "tickets"})] if finished else [])
