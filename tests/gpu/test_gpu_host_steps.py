"""Commands with a time limit, and the table of how they ended."""

from __future__ import annotations

import json
import os
import sys

import pytest
from gpu.gpu_host_memory import Memory
from gpu.gpu_host_steps import StepFailed, Steps, outcomes


@pytest.fixture
def steps(tmp_path) -> Steps:
    """No GPU, a minute."""
    return Steps(tmp_path / "out", Memory(), 60)


def test_a_step_that_takes_too_long_is_stopped_and_its_log_is_shown(steps, capsys):
    """It gets Ctrl-C, its last words are printed and kept in the report, and the exit code says so."""
    code = "import time\nprint('last words', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('bye')"
    with pytest.raises(StepFailed):
        steps.run("chain", "run", [sys.executable, "-c", code], os.environ, 6)
    assert "last words\nbye" in capsys.readouterr().out
    assert steps.finish() == 1
    report = json.loads((steps.out / "table.json").read_text())
    assert report["rows"][0]["note"] == "stopped after 6 s"
    assert report["ends_of_logs"] == {"run": "last words\nbye"}


def test_nothing_is_started_without_time_but_what_stops_servers_is(tmp_path):
    """With its seconds used up a step is not run; stopping everything still is."""
    steps = Steps(tmp_path, Memory(), 0)
    with pytest.raises(StepFailed):
        steps.run("chain", "run", [sys.executable, "-c", ""], os.environ, 60)
    steps.always("chain", "stop all", [sys.executable, "-c", ""], os.environ, 60)
    assert outcomes(steps) == {"run": "not run", "stop all": "ok"}


def test_an_exit_code_that_was_not_expected_fails_a_step(steps):
    """And one that was expected does not."""
    command = [sys.executable, "-c", "raise SystemExit(4)"]
    assert steps.run("chain", "run", command, os.environ, 60, (0, 4))[0] == 4
    with pytest.raises(StepFailed):
        steps.run("chain", "again", command, os.environ, 60)
    assert outcomes(steps) == {"run": "ok", "again": "failed"}
