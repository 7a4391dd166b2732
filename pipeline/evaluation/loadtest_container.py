"""Stage program: pipeline.evaluation.loadtest in a container of the serving image, which needs no serve environment here.

vLLM's bench comes with the image. The container reads this package, the holdout and the tokenizer, and writes into one
folder; it is on the host's network, because the server listens on this machine's loopback.

Runs in the control environment. Request: pipeline.evaluation.loadtest's, with `image` (its digest) and `container` (ContainerConfig).
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import files, program
from pipeline.config.schema import ContainerConfig
from pipeline.errors import StageFailed, from_json
from pipeline.serving import docker

SOURCE_INSIDE, WORK_INSIDE, DATA_INSIDE = "/tunegate", "/work", "/data"


def run(request: program.Request) -> dict[str, Any]:
    """Run the load test in the image and take its report.

    Raises what the load test raised, ServingError when the engine refuses, StageFailed when the container died.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the container is removed
    work = request.folder / "container"
    shutil.rmtree(work, ignore_errors=True)
    try:
        _lay_out(request, work)
        _run(request, work)
        shutil.copyfile(work / "payload" / "report.json", request.payload / "report.json")
        return dict(json.loads((work / "result.json").read_text(encoding="utf-8")))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _lay_out(request: program.Request, work: Path) -> None:
    """Copy the container's input into `work`, readable for its user whatever umask and modes hold here."""
    package, holdout = Path(__file__).parents[1], Path("payload", "holdout.jsonl")
    copies = {work / "source" / "pipeline" / source.relative_to(package): source for source in package.rglob("*.py")}
    copies[work / "data" / holdout] = Path(request.inputs["prepare"]["path"]) / holdout
    for copy, original in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
    files.write_json(work / "request.json", _inside(request))
    docker.make_readable(work)
    (work / "payload").mkdir()
    for folder in (work, work / "payload"):
        folder.chmod(0o777)


def _inside(request: program.Request) -> dict[str, Any]:
    """The request as the program in the container reads it."""
    config = {key: value for key, value in request.config.items() if key not in ("image", "container")}
    config["model_path"] = docker.MODEL_INSIDE
    inputs = {"prepare": {**request.inputs["prepare"], "path": DATA_INSIDE}}
    return {"config": config, "inputs": inputs, "folder": WORK_INSIDE}


def _run(request: program.Request, work: Path) -> None:
    settings = ContainerConfig.model_validate(request.config["container"])
    model = Path(request.config["model_path"])
    docker.make_readable(model)
    volumes = {
        str(work / "source"): {"bind": SOURCE_INSIDE, "mode": "ro"},
        str(model): {"bind": docker.MODEL_INSIDE, "mode": "ro"},
        str(work / "data"): {"bind": DATA_INSIDE, "mode": "ro"},
        str(work): {"bind": WORK_INSIDE, "mode": "rw"},
    }
    with docker.engine() as client:
        container = client.containers.create(
            request.config["image"],
            entrypoint=["python3", "-P", "-m", "pipeline.evaluation.loadtest"],
            command=[f"{WORK_INSIDE}/request.json"],
            **docker.isolation(settings),
            network_mode="host",
            environment={**docker.environ("/tmp"), "PYTHONPATH": SOURCE_INSIDE},  # noqa: S108 - the container's own
            volumes=volumes,
            labels=docker.labels(request.config["unit_digest"], work, keep=False),
        )
        try:
            container.start()
            errors = [_relay(line) for line in _lines(container.logs(stdout=True, stderr=False, stream=True))]
            status = int(container.wait()["StatusCode"])
            words = container.logs(stdout=False, stderr=True).decode(errors="replace").strip()
        finally:
            container.remove(force=True)
    sys.stderr.write(words + "\n")
    for event in filter(None, errors):
        raise from_json(event)
    if status:
        raise StageFailed(
            f"the load test's container ended with status {status}: {' | '.join(words.splitlines()[-3:])}",
            file=str(request.folder / "log.txt"),
            remedy="read the log; status 137 is most often too little memory for the container: free some, or take a smaller model",
        )


def _relay(line: bytes) -> program.Event | None:
    """Hand an event on; an error is returned instead, anything else goes to the log."""
    try:
        event: program.Event = json.loads(line)
    except ValueError:
        sys.stderr.write(line.decode(errors="replace") + "\n")
        return None
    if event["event"] == "error":
        return event
    program.emit(**event)
    return None


def _lines(pieces: Iterable[bytes]) -> Iterable[bytes]:
    """The lines of a stream that comes in pieces of any size."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


if __name__ == "__main__":
    program.main(run)
