"""The wire between a flow and a stage: JSON request in, JSON lines of progress out, JSON result at the end.

A stage is a program, `python -m pipeline.STAGE REQUEST.json`, run in the environment that has its packages. It reads its
request, writes its payload into the folder that the request names, and leaves `result.json` beside the payload. Standard output
is for events alone: anything else that a library prints goes to standard error, which the flow keeps as the stage's log. The same
program is a container's or a Kubernetes job's command.

Runs in every environment: standard library and the package's own errors only.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline import out_of_memory
from pipeline.errors import Problem, StageFailed, TunegateError, from_json
from pipeline.files import HALF_WRITTEN, write_json

Event = dict[str, Any]
_events: IO[str] = sys.stdout


def emit(event: str, **fields: Any) -> None:
    """Print one event for the flow: `progress`, `metric`, `message` or `error`."""
    print(json.dumps({"event": event, **fields}), file=_events, flush=True)


def progress(amount: float, total: float, unit: str, **metrics: float) -> None:
    """Report that `amount` of `total` `unit`s are done, with current figures such as loss."""
    emit("progress", done=amount, total=total, unit=unit, metrics=metrics)


def metric(name: str, value: float, step: int) -> None:
    """Report one point of a curve, for MLflow."""
    emit("metric", name=name, value=value, step=step)


def message(text: str) -> None:
    """Report one line a person should read."""
    emit("message", text=text)


@dataclass(frozen=True)
class Request:
    """A stage program's order.

    `config` holds the resolved sections it may read, `inputs` the records of the artefacts it takes. It works in `folder`:
    checkpoints may lie there, the finished payload goes to `folder/payload`.
    """

    config: dict[str, Any]
    inputs: dict[str, Any]
    folder: Path

    @property
    def payload(self) -> Path:
        """The folder whose content becomes the artefact; it exists."""
        path = self.folder / "payload"
        path.mkdir(parents=True, exist_ok=True)
        return path


EVENT = re.compile(r'\{"event": "')  # as `emit` begins one


def begin() -> Request:
    """Claim standard output for events, and read the request whose file is argv[1]."""
    global _events  # noqa: PLW0603 - the one place where standard output is claimed for events
    _events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    raw = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return Request(config=raw["config"], inputs=raw["inputs"], folder=Path(raw["folder"]))


def main(stage: Callable[[Request], dict[str, Any]]) -> None:
    """Run a stage program: read argv[1], call `stage`, leave its returned details in result.json.

    Exits 0 with a result, or with the error's exit code after an `error` event; a traceback goes to the log.
    """
    request = begin()
    for file in request.folder.rglob(".*.*"):
        if HALF_WRITTEN.fullmatch(file.name):  # by a run that was killed: it would count as part of the payload
            file.unlink()
    try:
        details = stage(request)
    except TunegateError as error:
        emit("error", **error.to_json())
        sys.exit(error.exit_code)
    write_json(request.folder / "result.json", details)


def run(
    command: Sequence[str],
    environ: Mapping[str, str],
    request: Request,
    on_event: Callable[[Event], None],
) -> dict[str, Any]:
    """Run a stage program to its end and return its result.

    `command` is the program without its request file; events reach `on_event` as they come; standard error is
    appended to `folder/log.txt`. The child is its own process group and is ended when this call is interrupted.

    Raises the TunegateError that the stage reported, ResourceError when it died for want of GPU memory, or StageFailed
    naming the log when it died without a word.
    """
    file, log = write_request(request), request.folder / "log.txt"
    errors: list[Event] = []
    with log.open("a", encoding="utf-8") as sink:
        offset = sink.tell()
        child = subprocess.Popen(
            [*command, str(file)],
            env=dict(environ),
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            start_new_session=True,
        )
        try:
            for line in child.stdout or ():
                relay(line, sink, errors, on_event)
            child.wait()
        finally:
            _end(child)
    details = result_of(request) if child.returncode == 0 and not errors else None
    if details is None:
        raise error_of(errors, log, offset) or StageFailed([_death(child.returncode, log)])
    return details


def write_request(request: Request) -> Path:
    """Leave the request where its program reads it, and no result of an earlier run; returns the file."""
    request.folder.mkdir(parents=True, exist_ok=True)
    (request.folder / "result.json").unlink(missing_ok=True)
    file = request.folder / "request.json"
    write_json(file, {"config": request.config, "inputs": request.inputs, "folder": str(request.folder)})
    return file


def relay(line: str, sink: IO[str], errors: list[Event], on_event: Callable[[Event], None]) -> None:
    """Hand on one line of a program's output: errors to `errors`, other events to `on_event`, the rest to its log."""
    before, event = _split(line)
    sink.write(before)
    if event and event["event"] == "error":
        errors.append(event)
    elif event:
        on_event(event)


def _split(line: str) -> tuple[str, Event | None]:
    """The text of a line beside an event, and the event.

    In a pod's log an event may stand behind text of standard error that lacks a line's end, such as a progress bar.
    """
    for at in (0, *(match.start() for match in EVENT.finditer(line, 1))):
        with suppress(ValueError):
            event = json.loads(line[at:])
            if isinstance(event, dict) and "event" in event:
                return f"{line[:at]}\n" if at else "", event
    return line, None


def result_of(request: Request) -> dict[str, Any] | None:
    """The result that an ended program left, or None."""
    file = request.folder / "result.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def error_of(errors: Sequence[Event], log: Path, offset: int) -> TunegateError | None:
    """The last error that an ended program reported, or None.

    A StageFailed, which tells only that something ended, gives way to bitsandbytes' last words in the log from byte `offset`.
    """
    error = from_json(errors[-1]) if errors else None
    if error is None or type(error) is StageFailed:
        return out_of_memory.that_ended(log, offset) or error
    return error


def _end(child: subprocess.Popen[str]) -> None:
    """End a child that outlives the call, its whole group, first politely."""
    if child.poll() is not None:
        return
    killer = threading.Timer(10, lambda: os.killpg(child.pid, signal.SIGKILL))
    os.killpg(child.pid, signal.SIGTERM)
    killer.start()
    child.wait()
    killer.cancel()


def _death(returncode: int | None, log: Path) -> Problem:
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    if returncode == -signal.SIGKILL:
        return Problem(
            "the stage was killed (signal 9), most often by the system when memory ran out",
            file=str(log),
            remedy="lower micro_batch_size, sequence_len or num_calibration_samples, then run the same command again",
        )
    return Problem(
        f"the stage ended with status {returncode}: {' | '.join(tail) or 'no output'}",
        file=str(log),
        remedy="read the log; running the same command again continues from the last finished step",
    )
