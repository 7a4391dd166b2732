"""The progress of a running build: a live bar in a terminal, plain lines elsewhere and in a Prefect run's log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.program import Event

SECONDS_BETWEEN_LINES = 15.0


class Pace:
    """The time that the rest takes, from the work since the first event; a killed run's earlier work doesn't count."""

    def __init__(self) -> None:
        self._unit = ""
        self._first = self._last = 0.0
        self._since = 0.0

    def rest_s(self, event: Event, now: float) -> float | None:
        """Seconds to go, or None before any work was seen."""
        position = float(event["done"])
        if event["unit"] != self._unit or position < self._last:
            self._unit, self._first, self._since = event["unit"], position, now
        self._last = position
        if position <= self._first or now <= self._since:
            return None
        return max(0.0, float(event["total"]) - position) * (now - self._since) / (position - self._first)


class Plain:
    """Events as lines: every change of state, and progress every few seconds. For logs, pipes and Prefect."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write = write
        self._stage = ""
        self._last = -SECONDS_BETWEEN_LINES
        self._full_unit = ""
        self._pace = Pace()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event["event"] == "stage":
            self._stage = event["stage"]
            self._last, self._full_unit = -SECONDS_BETWEEN_LINES, ""
            self._pace = Pace()
            self._write(stage_line(event))
        elif event["event"] == "message":
            self._write(f"  {self._stage:<10} {event['text']}")
        elif event["event"] == "progress":
            now = time.monotonic()
            rest = self._pace.rest_s(event, now)
            full_unit = event["unit"] if event["done"] >= event["total"] else ""
            if now - self._last >= SECONDS_BETWEEN_LINES or (full_unit and full_unit != self._full_unit):
                self._last, self._full_unit = now, full_unit
                self._write(f"  {self._stage:<10} {figures(event, rest)}")


class Live:
    """Events as one rich progress bar for the stage that runs, with the finished stages above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, visible=False, figures="")
        self._stage = ""
        self._pace = Pace()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event["event"] == "stage":
            self._next_stage(event)
        elif event["event"] == "message":
            self._above(f"  {self._stage:<10} {event['text']}")
        elif event["event"] == "progress":
            text = figures(event, self._pace.rest_s(event, time.monotonic()))
            self._progress.update(self._task, completed=event["done"], total=event["total"], figures=text)

    def _next_stage(self, event: Event) -> None:
        self._stage = event["stage"]
        self._pace = Pace()
        self._progress.remove_task(self._task)
        running = event["state"] == "running"
        self._task = self._progress.add_task(self._stage, total=None, visible=running, figures="")
        if not running:
            self._above(stage_line(event))

    def _above(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)


def stage_line(event: Event) -> str:
    """One line on a stage's state."""
    took = f"{event['seconds']:7.1f} s" if event.get("seconds") else " " * 9
    detail = event.get("log") or event.get("key", "")[:12]
    return f"  {event['stage']:<10} {event['state']:<8}{took}  {detail}".rstrip()


def figures(event: Event, rest_s: float | None) -> str:
    """The position of a stage, its current figures, and the time that the rest takes."""
    metrics = dict(event.get("metrics") or {})
    speeds = [f"{metrics.pop(name):.4g} {name}" for name in list(metrics) if "/" in name]
    values = [f"{name} {metric:.4g}" for name, metric in metrics.items()]
    left = [f"{duration(rest_s)} left"] if rest_s else []
    return "  ".join([f"{event['done']:.0f}/{event['total']:.0f} {event['unit']}", *values, *speeds, *left])


def duration(seconds: float) -> str:
    """Seconds as a clock shows them: 0:42, 5:07, 3:20:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def shown(console: Console | None = None) -> Iterator[Live | Plain]:
    """Show events on this terminal, or as lines where there is none."""
    console = console or Console()
    if not console.is_terminal:
        yield Plain(lambda line: print(line, file=sys.stdout, flush=True))
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(24),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Live(progress)


def logged(logger: logging.Logger | logging.LoggerAdapter[Any]) -> Plain:
    """Show events in a log, such as a Prefect run's."""
    return Plain(logger.info)
