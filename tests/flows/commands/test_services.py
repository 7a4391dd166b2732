"""What `tunegate up` says to type next, with console scripts and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.commands import services
from pipeline.environments import interpreters


def test_prefects_command_is_one_that_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked wheels have no console scripts; the module then does the same."""
    python = tmp_path / "python3"
    monkeypatch.setattr(interpreters, "find", lambda name: interpreters.Environment(name, python))
    assert services._prefect_command() == f"{python} -m prefect"
    (tmp_path / "prefect").touch()
    assert services._prefect_command() == str(tmp_path / "prefect")
