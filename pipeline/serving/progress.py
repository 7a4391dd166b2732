"""Progress of a starting server: the phases in its log, and the time that such a start usually takes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

from pipeline.artifacts import ServedUnit
from pipeline.digests import digest_of
from pipeline.files import write_json
from pipeline.program import Event
from pipeline.serving.diagnosis import last_run
from pipeline.serving.server import Server
from pipeline.store import home

TELL_EVERY_S = 1.0
USUAL_START_S = 60.0
PHASES = {
    r"non-default args": "vLLM reads the model's configuration",
    r"Initializing a V1 LLM engine": "vLLM starts its engine",
    r"Starting to load model": "vLLM loads the weights",
    r"Loading weights took": "vLLM compiles and warms up",
    r"Starting vLLM server": "vLLM opens its port",
}


class Progress:
    """Tells `on_event` about one start: a message a phase, and the seconds so far out of those of the last such start."""

    def __init__(self, server: Server, unit: ServedUnit, on_event: Callable[[Event], None]) -> None:
        self._server, self._on_event = server, on_event
        self._began = self._told = time.monotonic()
        self._phases = list(PHASES.items())
        kind = digest_of([unit.runtime_digest, unit.flags, unit.env, unit.device])[:16]
        self._memory = home() / "vllm-cache" / f"start-{kind}.json"
        self._usual = self._remembered()
        on_event(
            {
                "event": "message",
                "text": f"starting vLLM {unit.vllm_version} ({server.runtime}), log: {server.log}",
            }
        )

    def tell(self) -> None:
        """Report, at most once a second."""
        now = time.monotonic()
        if now - self._told < TELL_EVERY_S:
            return
        self._told = now
        self._tell_phases()
        seconds = now - self._began
        self._on_event(
            {
                "event": "progress",
                "done": round(seconds),
                "total": round(max(self._usual, seconds)),
                "unit": "s",
                "metrics": {},
            }
        )

    def done(self) -> None:
        """Report readiness, and remember how long it took."""
        took = time.monotonic() - self._began
        self._tell_phases()
        self._memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(self._memory, {"seconds": took})
        self._on_event({"event": "message", "text": f"vLLM answers after {took:.0f} s at {self._server.url}"})

    def _tell_phases(self) -> None:
        """Tell every phase in the log that wasn't told yet, also a phase that was over between two looks."""
        text = "\n".join(last_run(self._server.log))
        for pattern, phase in list(self._phases):
            if re.search(pattern, text):
                self._on_event({"event": "message", "text": phase})
                self._phases.remove((pattern, phase))

    def _remembered(self) -> float:
        try:
            return float(json.loads(self._memory.read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError):
            return USUAL_START_S
