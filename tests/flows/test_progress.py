"""What a person sees of a running build, in a terminal and in a log."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from flows import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def stage(state, **fields):
    return {"event": "stage", "stage": "finetune", "state": state, **fields}


def step(done, total=150, **metrics):
    return {"event": "progress", "done": done, "total": total, "unit": "steps", "metrics": metrics}


def test_a_log_has_states_and_now_and_then_progress(clock):
    """Every state and message is a line; of many steps one in a while, and the last, with what is left."""
    lines = []
    show = progress.Plain(lines.append)
    show(stage("running", log="/runs/log.txt"))
    for done in range(1, 151):
        clock[0] += 1.0
        show(step(done, loss=1 / done, **{"tokens/s": 231.04}))
    show({"event": "message", "text": "an adapter of 2 MB"})
    show(stage("done", seconds=150.0))
    assert lines[0] == "  finetune   running            /runs/log.txt"
    assert lines[1] == "  finetune   1/150 steps  loss 1  231 tokens/s"
    assert lines[2] == "  finetune   16/150 steps  loss 0.0625  231 tokens/s  2:14 left"
    assert lines[-3] == "  finetune   150/150 steps  loss 0.006667  231 tokens/s"
    assert lines[-2:] == ["  finetune   an adapter of 2 MB", "  finetune   done      150.0 s"]
    assert len(lines) == 1 + 10 + 1 + 2


def test_work_that_outlasts_its_estimate_is_told_now_and_then(clock):
    """Once it should have been finished, its lines don't come more often than before."""
    lines = []
    show = progress.Plain(lines.append)
    show(stage("running"))
    for done in range(1, 181):
        clock[0] += 1.0
        show(step(done, total=max(60, done)))
    assert len(lines) == 1 + 180 // 15 + 1
    assert lines[-1] == "  finetune   180/180 steps"


def test_a_resumed_stage_is_not_thought_quick(clock):
    """The steps that a killed run did don't make the rest look short."""
    pace = progress.Pace()
    assert pace.rest_s(step(100), clock[0]) is None
    assert pace.rest_s(step(101), clock[0] + 10) == 490.0
    rows = {"event": "progress", "done": 5, "total": 10, "unit": "rows"}
    assert pace.rest_s(rows, clock[0] + 20) is None


def test_a_terminal_has_one_live_bar(clock):
    """Stage, steps, loss, tokens a second and time left are drawn in place; what is finished stays above."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with progress.shown(console) as show:
        assert isinstance(show, progress.Live)
        show(stage("cached", key="0123456789abcdef"))
        show(stage("running", log="/runs/log.txt"))
        show(step(10, loss=0.5, **{"tokens/s": 231.0}))
        clock[0] += 20
        show(step(20, loss=0.25, **{"tokens/s": 231.0}))
        show._progress.refresh()
        show({"event": "message", "text": "kept [the best] checkpoint"})
        show(stage("failed", seconds=20.0))
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "finetune   cached             0123456789ab" in drawn
    assert re.search(r"finetune\s+━+.*20/150 steps  loss 0.25  231 tokens/s  4:20 left", drawn)
    assert "kept [the best] checkpoint" in drawn
    assert "finetune   failed     20.0 s" in drawn
    assert "\x1b[?25l" in screen.getvalue()


def test_no_terminal_means_plain_lines(capsys):
    """In a pipe there is no bar and no control character."""
    with progress.shown(Console(file=io.StringIO())) as show:
        show(stage("running"))
        show(step(1))
    assert capsys.readouterr().out == "  finetune   running\n  finetune   1/150 steps\n"


def test_a_prefect_run_logs_the_same_lines(caplog):
    """What a log gets is what a pipe gets."""
    with caplog.at_level(logging.INFO):
        progress.logged(logging.getLogger("run"))(stage("done", seconds=3661.0))
    assert caplog.messages == ["  finetune   done     3661.0 s"]
    assert progress.duration(3661) == "1:01:01"
