"""The status of a deployment: a record for programs, and its lines for people."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

from pipeline.artifacts import Record


class Status(Record):
    """The live and the wanted version, and the condition of their processes.

    `state`: live (clients get answers), restarting (the server's supervisor is bringing it back), down (it
    doesn't come back by itself), stopped (on purpose), none (never promoted). `url` is where clients go, None
    unless the proxy runs. `uptime_s` is of the server's present process. `unfinished` names the steps that the
    next promote takes. `why` is the cause of a server's end, as far as it is known.
    """

    name: str
    state: Literal["live", "restarting", "down", "stopped", "none"]
    version: str | None = None
    unit_digest: str | None = None
    reviewer: str | None = None
    since: datetime | None = None
    url: str | None = None
    server_url: str | None = None
    runtime: str | None = None
    pid: int | None = None
    container: str | None = None
    uptime_s: float | None = None
    restarts: int = 0
    in_flight: int | None = None
    log: Path | None = None
    proxy_pid: int | None = None
    proxy_ok: bool = False
    wanted: str | None = None
    unfinished: tuple[str, ...] = ()
    kept: str | None = None
    previous: tuple[str, ...] = ()
    why: str = ""

    def lines(self) -> list[str]:
        """The status as a person reads it, with the next command where one is needed."""
        lines = [self._head(), *self._processes()]
        if self.why:
            lines.append(f"  ended     {self.why}")
        again = f"tunegate promote {self.name} --version"
        if self.kept:
            lines.append(f"  kept      v{self.kept} still runs, for a quick rollback")
        if self.previous:
            before = ", ".join(f"v{version}" for version in reversed(self.previous))
            lines.append(f"  before    {before}; back to the first: tunegate rollback {self.name}")
        if self.wanted:
            lines.append(f"  wanted    v{self.wanted}, not switched to yet; next: {again} {self.wanted}")
        elif self.version and self.unfinished:
            lines.append(f"  missing   {', '.join(self.unfinished)}; next: {again} {self.version}")
        elif self.state in ("down", "stopped"):
            lines.append(f"  next      {again} {self.version}")
        return lines

    def _head(self) -> str:
        if self.version is None:
            return f"{self.name}: nothing was promoted yet; next: tunegate promote {self.name}"
        return (
            f"{self.name} v{self.version} is {self.state}; "
            f"unit {(self.unit_digest or '')[:12]}, approved by {self.reviewer}"
        )

    def _processes(self) -> list[str]:
        if self.server_url is None:
            return []
        clients = self.url or "the proxy does not run"
        trouble = "" if self.proxy_ok or self.url is None else "  (the model does not answer through it)"
        process = f"container {self.container[:12]}" if self.container else f"pid {self.pid or '-'}"
        up = f"up {_duration(self.uptime_s)}" if self.uptime_s is not None else "not up"
        busy = "?" if self.in_flight is None else self.in_flight
        figures = f"restarts {self.restarts}, in flight {busy}"
        return [f"  clients   {clients}{trouble}", f"  server    {self.server_url}  {process}, {up}, {figures}"]


def _duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 5 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
