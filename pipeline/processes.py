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

STARTED, STATE = 19, 0  # places in /proc/PID/stat after the command's name


@dataclass(frozen=True)
class Process:
    """`started` is in clock ticks since boot, as the kernel counts."""

    pid: int
    started: int


def find(pid: int) -> Process | None:
    """The process that runs under this pid now, or None; a zombie doesn't run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[STATE] in "ZX" else Process(pid, int(fields[STARTED]))


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
    found = find(child.pid)
    return found or Process(child.pid, 0)


def end(process: Process, timeout_s: float) -> None:
    """End the process and its group: SIGTERM, then SIGKILL after `timeout_s` seconds; one that is gone is left alone."""
    for sign, patience in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 10.0)):
        if not is_alive(process):
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        deadline = time.monotonic() + patience
        while is_alive(process) and time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)  # when it is our own child
            time.sleep(0.05)
