"""Commands run one after the other, each with a time limit and a log of its own, and the table of how they ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu.gpu_host_memory import Memory

ROOT = Path(__file__).parents[2]
GRACE_S = 20.0  # between Ctrl-C and kill -9
TAIL = 30  # lines of a failed step's log
LEAST_S = 5.0  # nothing is started with less time than this
Hear = Callable[[str, float], object]


class StepFailed(Exception):
    """A step did not end as it should; its row says why. The rest of its part is not run."""


@dataclass
class Row:
    """One line of the table. `peak` and `left` are MiB of the GPU: the most taken, and what was taken as it began."""

    part: str
    step: str
    outcome: str
    seconds: float
    peak: int | None = None
    left: int | None = None
    note: str = ""


class Steps:
    """Runs steps and remembers them; `within` is how many seconds all of them may take."""

    def __init__(self, out: Path, memory: Memory, within: float) -> None:
        self.out, self.memory = out, memory
        self.rows: list[Row] = []
        self.began = time.monotonic()
        self._until = self.began + within
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def run(
        self,
        part: str,
        step: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        limit: float,
        codes: Sequence[int] = (0,),
        hear: Hear = lambda _line, _now: None,
    ) -> tuple[int, str]:
        """Run a command to its end and return its exit code and all that it printed, both streams together.

        Raises StepFailed when the code isn't one of `codes`, or time runs out: then it gets Ctrl-C, and later kill -9.
        """
        limit = min(limit, self._until - time.monotonic())
        log = self.out / "logs" / f"{part}-{step.replace(' ', '-')}.log"
        if limit < LEAST_S:
            raise self._failed(
                Row(part, step, "not run", 0.0, note="no time left (--within); the same command goes on"), log
            )
        self.say(f"{part}: {step} …")
        began = time.monotonic()
        try:
            ended = _Child(command, environ, log, hear).wait(limit)
        except BaseException as error:
            self.add(Row(part, step, "failed", time.monotonic() - began, note=f"interrupted: {type(error).__name__}"))
            raise
        now = time.monotonic()
        row = Row(part, step, "ok", now - began, self.memory.peak(began, now))
        said = log.read_text(encoding="utf-8", errors="replace")
        if ended is None:
            row.outcome, row.note = "failed", f"stopped after {limit:.0f} s"
        elif ended not in codes:
            row.outcome, row.note = "failed", f"exit code {ended}"
        if row.outcome == "failed":
            raise self._failed(row, log)
        self.add(row)
        return ended or 0, said

    def always(self, part: str, step: str, command: Sequence[str], environ: Mapping[str, str], limit: float) -> None:
        """As `run`, also when the time is over; a failure is a row and no exception, so that it hides no other."""
        self._until = max(self._until, time.monotonic() + limit)
        with suppress(StepFailed):
            self.run(part, step, command, environ, limit)

    def must(self, part: str, step: str, truth: object, why: str) -> None:
        """A step that is a condition: failed with `why` unless it holds."""
        if not truth:
            raise self._failed(Row(part, step, "failed", 0.0, note=why), None)

    def add(self, row: Row) -> None:
        """Remember and show a row."""
        self.rows.append(row)
        self.say(f"{row.part}: {row.step}  {row.outcome}  {row.seconds:.1f} s  {row.note}".rstrip())

    def say(self, text: str) -> None:
        """Print at once, with the seconds since the start."""
        print(f"[{time.monotonic() - self.began:6.0f} s] {text}", flush=True)

    def _failed(self, row: Row, log: Path | None) -> StepFailed:
        self.add(row)
        if log and log.is_file():
            print(f"--- the end of {log}", flush=True)
            print(tail(log), flush=True)
            print("---", flush=True)
        return StepFailed(row.note)

    def finish(self) -> int:
        """Print the table, write it as JSON with the ends of failed steps' logs; the exit code."""
        print(f"\n{table(self.rows)}", flush=True)
        bad = [row for row in self.rows if row.outcome not in ("ok", "cached")]
        logs = {row.step: self.out / "logs" / f"{row.part}-{row.step.replace(' ', '-')}.log" for row in bad}
        ends = {step: tail(log) for step, log in logs.items() if log.is_file()}
        report = {
            "rows": [asdict(row) for row in self.rows],
            "ends_of_logs": ends,
            "seconds": time.monotonic() - self.began,
        }
        (self.out / "table.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{len(bad)} failed or not run" if bad else "all ok", f"({self.out})", flush=True)
        return 1 if bad or not self.rows else 0


class _Child:
    """A command whose output goes to a log and, line by line, to whoever hears it."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], log: Path, hear: Hear) -> None:
        self._log, self._hear = log, hear
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self._log.open("w", encoding="utf-8") as sink:
            for line in self._process.stdout or ():
                sink.write(line)
                sink.flush()
                self._hear(line, time.monotonic())

    def wait(self, limit: float) -> int | None:
        """The exit code, or None when it had to be stopped. What interrupts us stops it too."""
        try:
            code: int | None = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self._stop()
            code = None
        except BaseException:
            self._stop()
            raise
        self._reader.join(5)  # a server that it left behind writes elsewhere
        return code

    def _stop(self) -> None:
        for sign, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, sign) if sign == signal.SIGINT else os.killpg(self._process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                break
        self._reader.join(5)


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    head = ("part", "step", "outcome", "seconds", "GPU peak MiB", "MiB at start", "note")
    cells = [head]
    for row in rows:
        peak, left = ("-" if value is None else str(value) for value in (row.peak, row.left))
        cells.append((row.part, row.step, row.outcome, f"{row.seconds:.1f}", peak, left, row.note))
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def outcomes(steps: Steps) -> dict[str, str]:
    return {row.step: row.outcome for row in steps.rows}
