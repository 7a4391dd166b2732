"""How much memory of the GPU is taken, sampled twice a second, and what each stage of a build took of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Self

EVERY_S = 0.5
SETTLE_S = 3.0  # a stage that starts needs some seconds until it touches the GPU
OWN_PROCESS = ("base", "prepare", "finetune", "merge", "quantize", "ledger", "serve")
STAGES = (*OWN_PROCESS, "evaluate", "tasks", "judge", "prompts", "loadtest", "gate", "register")
STATES = (
    "running", "cached", "done", "failed", "base", "merged", "candidate", "incumbent", "pass", "fail", "inconclusive",
    "recorded", r"v\d+",
)  # fmt: skip
# A line of flows.progress.stage_line: two spaces, stage, state, seconds, and a log, a key or the system's role.
LINE = re.compile(
    rf"  (?P<stage>{'|'.join(STAGES)}) +(?P<state>{'|'.join(STATES)})(?: +[\d.]+ s)?(?:  +(?P<what>\S+))?$"
)


class Memory:
    """A thread that asks nvidia-smi for the first visible GPU's memory; no samples where there is none."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self._tool = shutil.which("nvidia-smi")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        if self._tool:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _sample(self) -> None:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
        query = [str(self._tool), "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._ended.is_set():
            began = time.monotonic()
            shown = subprocess.run(query, capture_output=True, text=True, check=False)
            if shown.stdout.strip().isdigit():
                self.samples.append((time.monotonic(), int(shown.stdout)))
            self._ended.wait(max(0.0, EVERY_S - (time.monotonic() - began)))

    def peak(self, since: float, until: float) -> int | None:
        """The most MiB that were taken in between; None without a sample."""
        return max(self._between(since, until), default=None)

    def least(self, since: float, until: float) -> int | None:
        """The least MiB that were taken in between; None without a sample."""
        return min(self._between(since, until), default=None)

    def _between(self, since: float, until: float) -> list[int]:
        return [taken for at, taken in list(self.samples) if since <= at <= until]


@dataclass
class Stage:
    """One stage of a build as its output told it: `began` and `ended` are of time.monotonic()."""

    name: str
    began: float
    ended: float | None = None
    state: str = "running"


class Stages:
    """Reads the lines of `tunegate run` as they come and knows when which stage ran."""

    def __init__(self) -> None:
        self.found: list[Stage] = []

    def __call__(self, line: str, now: float) -> bool:
        """Note a line; whether it told of a stage."""
        match = LINE.match(line.rstrip())
        if match is None:
            return False
        self._close(now, "failed" if match["state"] == "failed" else "done")
        name = match["stage"]
        if match["state"] == "running":
            role = match["what"] or ""
            self.found.append(Stage(name if "/" in role or not role else f"{name} {role}", now))
        elif match["state"] == "cached":
            self.found.append(Stage(name, now, now, "cached"))
        return True

    def close(self, now: float, *, failed: bool) -> None:
        """The build ended: what still ran ended with it."""
        self._close(now, "failed" if failed else "done")

    def _close(self, now: float, state: str) -> None:
        if self.found and self.found[-1].ended is None:
            self.found[-1].ended, self.found[-1].state = now, state

    def left_before(self, stage: Stage, memory: Memory) -> int | None:
        """MiB still taken when a stage with a process of its own began; None for the others and without a GPU."""
        if stage.name.split()[0] not in OWN_PROCESS or stage.state == "cached":
            return None
        before = self.found.index(stage) - 1
        since = self.found[before].ended if before >= 0 else None
        return memory.least(stage.began if since is None else since, stage.began + SETTLE_S)
