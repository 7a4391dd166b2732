"""A build from a terminal, as real processes with Prefect's real server: what ends it, and what it says then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

TESTS = Path(__file__).parents[1]
# `tunegate run`, whose only stage is a task that does what ACTION says.
PROGRAM = """
import sys, time, types
from flows import cli
from flows.commands import run
from pipeline.errors import DataError, Problem

def build(config, on_event, *, again):
    from prefect import task

    @task(name="stage")
    def stage():
        print("stage begun", flush=True)
        if config["action"] == "sleep":
            time.sleep(600)
        if config["action"] == "mistake":
            raise DataError([Problem("no JSON", file="train.jsonl", line=n, remedy="correct it") for n in (3, 7)])
        raise ZeroDivisionError("nobody expected this")

    stage()

sys.modules["flows.build"] = types.SimpleNamespace(run=build)
run.resolve.resolve = lambda *_: {"name": "tickets", "action": sys.argv[1]}
run.check.show = lambda *_, **__: types.SimpleNamespace(finished=None)
cli.main(["run", "tickets.yaml"])
"""
PATIENCE_S = 240.0


class Run:
    """One such process in a group of its own, as a shell starts a command, and all that it says."""

    def __init__(self, folder: Path, action: str) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        environ |= {"TUNEGATE_HOME": str(folder / "home"), "HOME": str(folder), "PYTHONPATH": str(TESTS.parent)}
        (folder / "home").mkdir()  # as a config's resolution leaves it
        self._log = folder / "said"
        with self._log.open("wb") as sink:
            command = [sys.executable, "-c", PROGRAM, action]
            self.process = subprocess.Popen(command, env=environ, stdout=sink, stderr=sink, process_group=0)

    def said(self) -> str:
        """All of its output so far."""
        return self._log.read_text()

    def server(self) -> psutil.Process:
        """Its Prefect server, once its stage runs."""
        wait_until(lambda: "stage begun" in self.said() or self.process.poll() is not None)
        found = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "server" in " ".join(child.cmdline())
        ]
        assert found, self.said()
        return found[0]

    def code(self) -> int:
        """Its exit code, once it ended."""
        return self.process.wait(PATIENCE_S)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def begun(tmp_path: Path):
    """What starts a run; none outlives the test."""
    runs = []

    def begin(action: str) -> Run:
        runs.append(Run(tmp_path, action))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["group", "process"])
def test_ctrl_c_ends_a_run_at_once_with_one_line(begun, send) -> None:
    """Also when its whole group is told, as a terminal does: the server is there until the run has told it how it ended."""
    run = begun("sleep")
    server = run.server()
    started = time.monotonic()
    send(run.process.pid, signal.SIGINT)
    assert run.code() == 130
    assert time.monotonic() - started < 45
    assert run.said().splitlines() == ["stage begun", "", "stopped; the same command goes on from here"]
    wait_until(lambda: is_gone(server))


@pytest.mark.timeout(600)
def test_a_killed_run_leaves_no_server(begun) -> None:
    """Its server sees that the run is gone, whatever ended that."""
    run = begun("sleep")
    server = run.server()
    run.process.kill()
    wait_until(lambda: is_gone(server))


@pytest.mark.timeout(600)
def test_a_users_mistake_is_told_without_tracebacks(begun) -> None:
    """Only the block of problems; an unexpected exception has its traceback, once."""
    run = begun("mistake")
    assert run.code() == 2
    problems = [f"train.jsonl:{line}: no JSON\n  remedy:  correct it\n" for line in (3, 7)]
    assert run.said() == "stage begun\nDataError: 2 problems\n" + "".join(problems)


@pytest.mark.timeout(600)
def test_an_unexpected_exception_has_one_traceback(begun) -> None:
    run = begun("fault")
    assert run.code() == 1
    assert run.said().count("Traceback (most recent call last)") == 1
    assert run.said().count("nobody expected this") == 1
