"""A process known by its pid and its start time, so that a pid used again is never taken for it. Linux, standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STATE, GROUP, THREADS, STARTED = 0, 2, 17, 19  # places in /proc/PID/stat after the command's name


@dataclass(frozen=True)
class Process:
    """`started` is in clock ticks since boot, as the kernel counts."""

    pid: int
    started: int


def find(pid: int) -> Process | None:
    """The process that runs under this pid now, or None; a zombie doesn't run.

    A process whose first thread ended while others live still runs. A killed program of many threads is so for some
    milliseconds, and holds its sockets and locks until its last thread is gone.
    """
    fields = _fields(pid)
    if fields is None or (fields[STATE] in "ZX" and int(fields[THREADS]) <= 1):
        return None
    return Process(pid, int(fields[STARTED]))


def _fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name, or None."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return None


def is_alive(process: Process) -> bool:
    """Whether this very process still runs."""
    return find(process.pid) == process


def spawn(command: Sequence[str], environ: Mapping[str, str], log: Path) -> Process:
    """Start a program that outlives this one, in a session of its own, its output appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        child = subprocess.Popen(
            command, env=dict(environ), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    return find(child.pid) or Process(child.pid, 0)


def end(process: Process, timeout_s: float) -> None:
    """End the process and its group: SIGTERM, then SIGKILL after `timeout_s` seconds. Does nothing if it is gone."""
    if not is_alive(process):
        return
    for sign, patience in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        deadline = time.monotonic() + patience
        while members := _group(process.pid):
            if time.monotonic() > deadline:
                break
            with suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)  # when it is our own child
            time.sleep(0.02)
        if not members:
            return


def _group(leader: int) -> list[int]:
    """Pids in a process group that still run."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    members = [pid for pid in pids if (fields := _fields(pid)) and fields[GROUP] == str(leader)]
    return [pid for pid in members if find(pid)]
