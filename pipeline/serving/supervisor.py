"""Keeps one model server running: `python -m pipeline.serving.supervisor FOLDER`. Standard library only.

It reads FOLDER/spec.json, starts the server as its child, keeps the server's state in FOLDER/state.json, and ends with it.

A server that dies, or whose /health stays silent, is started again after a growing pause. It must have been ready once
(FOLDER/ready is there), and the model folder must still have the digests that were judged. It counts as restarting until it
has answered and the folder is still the same. If the folder changed while vLLM read it, the server is killed. A server
without `keep`, or that isn't ready yet, ends when the process that asked for it is gone.

The server runs in FOLDER and is told `model`, a link there to the model folder. vLLM's key of its compiled kernels contains
that path, so it must be the same for evaluation and promotion.

SIGTERM passes to the server, which finishes its requests in flight. A state that can't be written, because the disk is full,
is told on standard error and written later. Limits: Linux; the log grows until the next start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

from pipeline import processes
from pipeline.files import write_json
from pipeline.serving.digests import differences, model_files

POLL_S = 0.1
MODEL = "model"  # the link's name
PAUSES_S = (0.5, 2.0, 5.0, 15.0, 60.0)  # before each restart in a row; after the last it is given up
STEADY_S = 300.0  # after that long the next death starts from the first pause again
HEALTH_EVERY_S, HEALTH_TIMEOUT_S, HEALTH_FAILURES = 15.0, 30.0, 8
LOOK_EVERY_S = 0.5  # how often a server that was started again is asked for an answer, and its folder compared
TEARDOWN_S = 10.0  # seconds that vLLM may take to end after its last request


@dataclass(frozen=True)
class Spec:
    """A server to run. It lives with the process `owner` unless `keep` and ready; times are in seconds.

    `model` is the name that it answers to, `files` are the digests of the model folder's files as they were judged.
    """

    command: tuple[str, ...]
    environ: dict[str, str]
    log: str
    url: str
    model: str
    files: dict[str, str]
    startup_timeout: float
    shutdown_timeout: float
    keep: bool
    owner: tuple[int, int]

    def write(self, folder: Path) -> None:
        """Leave it where the supervisor reads it."""
        write_json(folder / "spec.json", asdict(self))


@dataclass
class State:
    """The server is starting, running, restarting, stopped or failed.

    `supervisor` is the pid of its supervisor, `pid` and `started` are the server's own, `since` is in seconds.
    """

    state: str = "starting"
    supervisor: int = 0
    pid: int = 0
    started: int = 0
    restarts: int = 0
    since: float = 0.0
    why: str = ""


def read_spec(folder: Path) -> Spec:
    """The spec in a folder."""
    raw: dict[str, Any] = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    raw["command"], raw["owner"] = tuple(raw["command"]), tuple(raw["owner"])
    return Spec(**raw)


def read_state(folder: Path) -> State:
    """The last state that a supervisor noted; the first one where none did yet."""
    try:
        return State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return State()


class Supervisor:
    """One server, started as often as it takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = read_spec(folder)
        self.owner = processes.Process(*self.spec.owner)
        self.state = State(supervisor=os.getpid())
        self._stop = threading.Event()
        self._unnoted = ""  # why state.json doesn't hold the state

    def run(self) -> None:
        """Start, watch, start again, until told to stop, orphaned or out of patience."""
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)
        in_a_row = 0
        while True:
            began = time.monotonic()
            why = self._live()
            if self._stop.is_set() or not self._is_ready():
                return self._note("stopped" if self._stop.is_set() else "failed", why)
            in_a_row = 0 if time.monotonic() - began > STEADY_S else in_a_row
            if in_a_row == len(PAUSES_S):
                return self._note("failed", f"{why}; started again {in_a_row} times in a row, now given up")
            self._note("restarting", why)
            self._pause(PAUSES_S[in_a_row])
            in_a_row += 1
            if self._stop.is_set():
                return self._note("stopped", why)
            if changes := self._changes():
                return self._note("failed", why if changes in why else f"{why}; not started again: {changes}")
            self.state.restarts += 1

    def _live(self) -> str:
        """Start the server and wait for its end; says why it ended."""
        try:
            child = self._start()
        except OSError as error:  # no room for the log, or for another process
            return f"can't be started: {error}"
        return self._watch(child)

    def _start(self) -> subprocess.Popen[bytes]:
        with Path(self.spec.log).open("ab") as sink:
            child = subprocess.Popen(
                self.spec.command, env=self.spec.environ, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
                process_group=0, cwd=self.folder,
            )  # fmt: skip
        process = processes.find(child.pid)
        self.state.pid, self.state.started = child.pid, process.started if process else 0
        self._note("restarting" if self.state.restarts else "starting")
        return child

    def _watch(self, child: subprocess.Popen[bytes]) -> str:
        """Wait for the server's end, bringing it about when asked, orphaned or deaf; says why it ended."""
        why_ending, silent, began = "", 0, time.monotonic()
        next_check, next_look = began + HEALTH_EVERY_S, 0.0
        is_loading = self.state.restarts > 0  # until its first answer it is given the time of a start
        while (status := child.poll()) is None:
            if self._unnoted:
                self._write()
            if self.state.state == "starting" and self._is_ready():
                self._note("running")
            if not why_ending and (self._stop.is_set() or self._is_orphan()):
                why_ending = "told to stop" if self._stop.is_set() else "its owner is gone"
                self._stop.set()
                self._end(child)
            if not why_ending and self.state.state == "restarting" and time.monotonic() > next_look:
                why_ending = self._look_again(child)
                next_look = time.monotonic() + LOOK_EVERY_S
            if not why_ending and self._is_ready() and time.monotonic() > next_check:
                is_up = self._is_up()
                is_loading = is_loading and not is_up and time.monotonic() < began + self.spec.startup_timeout
                silent = 0 if is_up or is_loading else silent + 1
                next_check = time.monotonic() + HEALTH_EVERY_S
                if silent >= HEALTH_FAILURES:
                    why_ending = f"/health was silent {silent} times"
                    self._end(child)
            time.sleep(POLL_S)
        self._kill_rest(child)
        return why_ending or (f"killed by signal {-status}" if status < 0 else f"ended with status {status}")

    def _look_again(self, child: subprocess.Popen[bytes]) -> str:
        """Note that a server which was started again runs, once it answers and the folder is as it was judged.

        If the folder isn't, the server is killed, so that no client meets it for longer; returns why.
        """
        is_up = self._is_up()
        changes = self._changes()
        if is_up and not changes and self._completes():
            changes = self._changes()
            if not changes:
                self._note("running")
        if not changes:
            return ""
        self._kill_rest(child)
        return f"killed: {changes}"

    def _changes(self) -> str:
        """The differences of the model folder from the judged one, in words; "" when there are none."""
        folder = (self.folder / MODEL).resolve()
        try:
            changes = [f"{name} {change}" for name, change in differences(self.spec.files, model_files(folder)).items()]
        except OSError as error:  # a file that went while it was read
            changes = [str(error)]
        words = f"{folder} isn't what was judged ({', '.join(changes)}); restore it, or build and approve anew"
        return words if changes else ""

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """SIGTERM to the server alone: its children finish their requests; SIGKILL when it is late."""
        with suppress(ProcessLookupError):
            child.terminate()
        patience = (self.spec.shutdown_timeout if self._is_ready() else 0) + TEARDOWN_S
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            self._kill_rest(child)

    def _kill_rest(self, child: subprocess.Popen[bytes]) -> None:
        """Kill the server's process group, which is alive as long as one of its workers is."""
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _is_ready(self) -> bool:
        return (self.folder / "ready").exists()

    def _is_orphan(self) -> bool:
        return not (self.spec.keep and self._is_ready()) and not processes.is_alive(self.owner)

    def _is_up(self) -> bool:
        return self._ask("/health") is not None

    def _completes(self) -> bool:
        """Whether it answers a real chat completion."""
        messages = [{"role": "user", "content": "Hello!"}]
        body = {"model": self.spec.model, "messages": messages, "max_tokens": 4, "temperature": 0}
        return b"choices" in (self._ask("/v1/chat/completions", json.dumps(body).encode()) or b"")

    def _ask(self, path: str, body: bytes | None = None) -> bytes | None:
        """The server's answer to a GET, or to a POST of JSON; None unless it is a 200."""
        request = urllib.request.Request(self.spec.url + path, body, {"Content-Type": "application/json"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=HEALTH_TIMEOUT_S) as response:  # noqa: S310
                return bytes(response.read()) if response.status == HTTPStatus.OK else None
        except (OSError, HTTPException):
            return None

    def _note(self, state: str, why: str = "") -> None:
        self.state.state, self.state.why, self.state.since = state, why, time.time()
        self._write()

    def _write(self) -> None:
        """Leave the state where others read it. A full disk is told once, and tried again while the server runs."""
        try:
            write_json(self.folder / "state.json", asdict(self.state))
        except OSError as error:
            if not self._unnoted:
                words = ", ".join(filter(None, [self.state.state, self.state.why]))
                self._say(f"state.json can't be written: {error}; not noted: {words}")
            self._unnoted = str(error)
            return
        if self._unnoted:  # the first line may have found no room either
            self._say(f"state.json is written again; it couldn't be: {self._unnoted}")
        self._unnoted = ""

    def _say(self, text: str) -> None:
        """A line in supervisor.log, if it still takes one."""
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())

    def _on_term(self, *_: object) -> None:
        self._stop.set()


if __name__ == "__main__":
    Supervisor(Path(sys.argv[1])).run()
