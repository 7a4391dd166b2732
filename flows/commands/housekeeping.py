"""`tunegate status`, `logs`, `cancel` and `gc`: see what runs, stop a build, free disk."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from flows.commands.review import one_name, waiting
from pipeline import store
from pipeline.deployment import promote as deployment
from pipeline.errors import RegistryError, ReviewError
from pipeline.registry import garbage, versions

MLFLOW_ANSWERS_WITHIN_S = 30.0  # opening its database takes seconds; a rollback waits no longer


def status(options: argparse.Namespace) -> int:
    """Print the live releases, the builds that run and the versions that wait for review."""
    names = [one_name(options.name)] if options.name else versions.names()
    if options.json:
        print(json.dumps([deployment.status(name).model_dump(mode="json") for name in names], indent=1))
        return 0
    for name in names:
        print_status(name)
        candidate = waiting(name)
        if candidate:
            print(f"  v{candidate.version} waits for review: tunegate review {name}")
    for build in store.running_builds():
        print(f"{build}: tunegate cancel {build.name}" if build.is_here else build)
    if not names:
        print("no model is registered yet; next: tunegate run CONFIG")
    return 0


def print_status(name: str) -> int:
    """Print a deployment's status and whether its live version was rejected since; returns the exit code 0."""
    report = deployment.status(name)
    for line in (*report.lines(), *_rejection(name, report.version)):
        print(line)
    return 0


def _rejection(name: str, number: str | None) -> Iterator[str]:
    """A line where the live version was rejected since, as far as MLflow can be asked."""
    with suppress(RegistryError):
        approval = next((version.approval for version in versions_soon(name) if version.version == number), None)
        if approval and approval.decision == "rejected":
            why = f": {approval.reason}" if approval.reason else ""
            yield f"  rejected  by {approval.reviewer}{why}; promote another version, or tunegate down"


def versions_soon(name: str) -> list[versions.Version]:
    """A model's versions in MLflow; raises RegistryError when it is away, or silent for MLFLOW_ANSWERS_WITHIN_S."""
    answer: Future[list[versions.Version]] = Future()

    def ask() -> None:
        try:
            answer.set_result(versions.versions(name))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(MLFLOW_ANSWERS_WITHIN_S)
    except TimeoutError:
        raise RegistryError(
            f"MLflow did not answer within {MLFLOW_ANSWERS_WITHIN_S:.0f} s",
            key=name,
            remedy="try again once MLFLOW_TRACKING_URI answers, or unset it",
        ) from None


def logs(options: argparse.Namespace) -> int:
    """Print the end of a log: the server's, or a stage's of the newest build."""
    file = _stage_log(options.stage) if options.stage else deployment.log_file(one_name(options.name))
    for line in _tail(file, options.lines):
        print(line)
    if options.follow:
        _follow(file)
    return 0


def _stage_log(stage: str) -> Path:
    """The newest log of a stage, also of one that runs or was cut short; raises ReviewError when it has none."""
    work = store.home() / "work"
    logs = [*(work / stage).glob("*/log.txt"), *(work / stage).glob(".*.partial/log.txt")]
    if not logs:
        stages = sorted(path.name for path in work.glob("*") if any(path.glob("*/log.txt")))
        raise ReviewError(
            f"the stage {stage} left no log", allowed=", ".join(stages) or None, remedy="tunegate logs --stage STAGE"
        )
    return max(logs, key=lambda path: path.stat().st_mtime)


def _tail(file: Path, count: int) -> list[str]:
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - 400 * count))
        return log.read().decode("utf-8", errors="replace").splitlines()[-count:]


def _follow(file: Path) -> None:
    with file.open(encoding="utf-8", errors="replace") as log:
        log.seek(0, 2)
        while True:
            line = log.readline()
            print(line, end="", flush=True) if line else time.sleep(0.5)


def cancel(options: argparse.Namespace) -> int:
    """Stop a running build of this machine politely; what it finished stays, and the next run goes on."""
    running = store.running_builds()
    builds = [build for build in running if options.name in (None, build.name)]
    for build in builds:
        if not build.is_here:
            print(f"the {build}: cancel it there, or its flow run on Prefect's page")
            continue
        os.kill(build.pid, signal.SIGINT)
        print(f"told the build of {build.name} (process {build.pid}) to stop; tunegate run goes on where it was")
    if not running:
        print("no build runs")
    elif not builds:
        print(f"no build of {options.name} runs")
        for build in running:
            print(f"a {build}: tunegate cancel {build.name}")
    return 0


def gc(options: argparse.Namespace) -> int:
    """Delete old artefacts that no version and no recent build needs; a released model is never touched.

    Raises ReviewError while a build runs.
    """
    total = 0
    for folder, why in garbage.garbage(options.keep_days):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1)
        total += size
        verb = "would delete" if options.dry_run else "deleted"
        print(f"{verb} {folder.relative_to(store.home())}  {size / 2**20:.0f} MiB  ({why})")
        if not options.dry_run:
            shutil.rmtree(folder)
    print(f"{total / 2**20:.0f} MiB {'would be ' if options.dry_run else ''}freed")
    return 0
