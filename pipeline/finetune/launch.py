"""The processes of a training over several GPUs of one host: started, heard, watched, and ended together.

Each is `python -m pipeline.finetune.rank REQUEST.json` with torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE,
LOCAL_WORLD_SIZE) and everything else of this environment, NCCL's settings among it. They meet through a file and speak over the
loopback interface: no port is open to the network. When one dies, the others would wait for it for ever: they are ended, and its
error becomes the stage's. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import files, hardware, program
from pipeline.errors import ConfigError, StageFailed, TunegateError, from_json

MEETING, LAUNCHER = "TUNEGATE_MEETING", "TUNEGATE_LAUNCHER"
LOST = 75  # exit status of a process whose partner is gone: the partner's error is the one to tell
LOOK_EVERY_S, SETTLE_S, END_S = 0.1, 2.0, 10.0
RANK = ("-m", "pipeline.finetune.rank")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@dataclass
class Rank:
    """One of the processes, with its errors and its result."""

    number: int
    child: subprocess.Popen[str]
    errors: list[program.Event] = field(default_factory=list)
    result: dict[str, Any] | None = None


def check(processes: int, device: hardware.Device) -> None:
    """Raise ConfigError when the device has too few GPUs for so many processes; on a CPU they share its cores."""
    if device.kind == "cuda" and processes > device.count:
        raise ConfigError(
            f"{processes} processes need {processes} GPUs, and {device.count} can be seen here",
            key="finetune.num_processes",
            allowed=f"1 to {device.count}",
            remedy=f"set finetune.num_processes: {device.count} (each step trains the same rows), or show more GPUs in"
            " CUDA_VISIBLE_DEVICES",
        )


def launch(request: program.Request, processes: int, command: Sequence[str] = RANK) -> dict[str, Any]:
    """Train in so many processes; the detail that the first of them returns. `command`: their interpreter's arguments.

    Raises the TunegateError that a process reported, or StageFailed naming the process that died without a word.
    """
    check(processes, hardware.device())
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    with tempfile.TemporaryDirectory(prefix="tunegate-") as folder:
        file = Path(folder) / "request.json"
        files.write_json(file, {"config": request.config, "inputs": request.inputs, "folder": str(request.folder)})
        ranks: list[Rank] = []
        try:
            ranks += (
                _start(number, processes, [*command, str(file)], file.with_name("meeting"))
                for number in range(processes)
            )
            listeners = [threading.Thread(target=_listen, args=(rank,), daemon=True) for rank in ranks]
            for listener in listeners:
                listener.start()
            _wait(ranks)
        finally:
            _end(ranks)
            signal.signal(signal.SIGTERM, before)
        ended_well = not any(rank.child.returncode for rank in ranks)
        for listener in listeners:  # an ended process's output ends, too, however slowly it is read
            listener.join(None if ended_well else END_S)
    if any(rank.child.returncode for rank in ranks) or ranks[0].result is None:
        raise _cause(ranks, request.folder)
    return ranks[0].result


def _start(number: int, processes: int, command: Sequence[str], meeting: Path) -> Rank:
    threads = max(1, hardware.cores() // processes)
    environ = {**LOOPBACK, "OMP_NUM_THREADS": str(threads), **os.environ}
    environ |= {"RANK": str(number), "LOCAL_RANK": str(number), MEETING: str(meeting)}
    environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), LAUNCHER: str(os.getpid())}
    return Rank(
        number, subprocess.Popen([sys.executable, "-P", *command], env=environ, stdout=subprocess.PIPE, text=True)
    )


def _listen(rank: Rank) -> None:
    """Take a process's result and errors, and pass on the first one's other events: all report the same."""
    for line in rank.child.stdout or ():
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            sys.stderr.write(line)
            continue
        kind = event.pop("event")
        if kind == "error":
            rank.errors.append(event)
        elif kind == "result":
            rank.result = event["detail"]
        elif rank.number == 0:
            try:
                program.emit(kind, **event)
            except BrokenPipeError:  # the flow is gone: nothing else would stop the training
                rank.child.terminate()
                return


def _wait(ranks: Sequence[Rank]) -> None:
    """Until all are done, or SETTLE_S after one failed: others may fail by themselves meanwhile, and say why."""
    until = None
    while None in (statuses := [rank.child.poll() for rank in ranks]):
        if until is None and any(statuses):
            until = time.monotonic() + SETTLE_S
        if until is not None and time.monotonic() > until:
            return
        time.sleep(LOOK_EVERY_S)


def _end(ranks: Sequence[Rank]) -> None:
    """End the processes that still run, first politely; each counts as one whose partner is gone."""
    running = [rank for rank in ranks if rank.child.poll() is None]
    for rank in running:
        rank.child.terminate()
    for rank in running:
        with suppress(subprocess.TimeoutExpired):
            rank.child.wait(END_S)
        rank.child.kill()
        rank.child.wait()
        rank.child.returncode = LOST


def _cause(ranks: Sequence[Rank], folder: Path) -> TunegateError:
    """The error to tell: a reported one, else of the process that a signal ended or that failed by itself."""
    errors = [error for rank in ranks for error in rank.errors]
    if errors:
        return from_json(errors[0])
    failures = [rank for rank in ranks if rank.child.returncode]
    own = [rank for rank in failures if rank.child.returncode != LOST]
    first = min(own or failures or ranks[:1], key=lambda rank: (rank.child.returncode >= 0, rank.number))
    status = first.child.returncode
    end = f"was killed (signal {-status})" if status < 0 else f"ended with status {status} and no result"
    memory = ", most often by the system when memory ran out" if status == -9 else ""
    return StageFailed(
        f"process {first.number + 1} of {len(ranks)} {end}{memory}; the others were ended with it",
        file=str(folder / "log.txt"),
        remedy="read the log; the same command goes on from the last checkpoint",
    )
