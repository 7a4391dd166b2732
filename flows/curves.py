"""Curves on their way to MLflow: points are sent together, so that no training step waits for a database."""

from __future__ import annotations

import time
from collections.abc import Callable

from flows.stages import OnEvent
from pipeline import program
from pipeline.errors import RegistryError
from pipeline.registry import runs
from pipeline.registry.runs import Point

SECONDS_BETWEEN = 5.0
SECONDS_AFTER_FAILURE = 60.0


class Curves:
    """The unsent points of one run; an MLflow that is away costs a message, never the training."""

    def __init__(self, run_id: str, tell: Callable[[str], None]) -> None:
        self._run_id = run_id
        self._tell = tell
        self._waiting: list[Point] = []
        self._due = time.monotonic()

    def add(self, name: str, value: float, step: int) -> None:
        """Take one point, and send the waiting points when the last time is some seconds ago."""
        self._waiting.append(Point(name, value, step, int(time.time() * 1000)))
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Send the waiting points; after a failure they wait on."""
        if not self._waiting:
            return
        self._due = time.monotonic() + SECONDS_BETWEEN
        try:
            runs.log_points(self._run_id, self._waiting)
        except RegistryError as error:
            self._due = time.monotonic() + SECONDS_AFTER_FAILURE
            self._tell(f"{len(self._waiting)} points of the curves wait for MLflow: {error.problems[0].what}")
        else:
            self._waiting = []


def tee(on_event: OnEvent, run_id: str) -> OnEvent:
    """Events to the watcher, and curves to MLflow as well, whole whenever a stage's state changes."""
    curves = Curves(run_id, lambda text: on_event({"event": "message", "text": text}))

    def relay(event: program.Event) -> None:
        if event["event"] == "metric":
            curves.add(event["name"], event["value"], event["step"])
            return
        if event["event"] == "stage":
            curves.flush()
        on_event(event)

    return relay
