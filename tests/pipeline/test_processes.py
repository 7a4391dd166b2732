"""Processes known by pid and start time, over real ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline import processes
from pipeline.processes import Process


def test_a_spawned_program_is_alive_until_it_is_ended(tmp_path: Path) -> None:
    """It runs in a session of its own, its output goes to the log, and ending it takes its children along."""
    code = "import subprocess, sys, time; c = subprocess.Popen(['sleep', '600']); print(c.pid, flush=True); time.sleep(600)"
    process = processes.spawn([sys.executable, "-c", code], os.environ, tmp_path / "logs" / "log")
    assert processes.is_alive(process)
    assert os.getsid(process.pid) == process.pid
    while not (text := (tmp_path / "logs" / "log").read_text()):
        pass
    child = processes.find(int(text))
    assert child
    processes.end(process, 5)
    assert not processes.is_alive(process)
    assert not processes.is_alive(child)


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """Patience has an end."""
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    process = processes.spawn([sys.executable, "-c", code], os.environ, tmp_path / "log")
    while not (tmp_path / "log").read_text():
        pass
    processes.end(process, 0.2)
    assert not processes.is_alive(process)


def test_a_process_runs_as_long_as_its_last_thread(tmp_path: Path) -> None:
    """Its first thread is a zombie, as in a program that is being killed; its sockets are held by the other one."""
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=lambda: (print('up', flush=True), time.sleep(600))).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    process = processes.spawn([sys.executable, "-c", code], os.environ, tmp_path / "log")
    while ") Z " not in Path(f"/proc/{process.pid}/stat").read_text() or not (tmp_path / "log").read_text():
        pass
    assert processes.is_alive(process)
    processes.end(process, 5)
    assert not processes.is_alive(process)
    assert not list(Path(f"/proc/{process.pid}/task").glob("*/fd/*"))


def test_a_pid_used_again_is_another_process() -> None:
    """The same pid with another start time is neither alive nor ended."""
    mine = processes.find(os.getpid())
    assert mine
    other = Process(mine.pid, mine.started + 1)
    assert not processes.is_alive(other)
    processes.end(other, 0.1)
    assert processes.is_alive(mine)


def test_nothing_runs_under_a_pid_that_never_was() -> None:
    """No process runs under a pid above the kernel's highest."""
    assert processes.find(2**22 + 1) is None
