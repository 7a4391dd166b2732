"""Day two from a terminal: promote, rollback, status, logs, chat, cancel, gc."""

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
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from flows import progress
from flows.commands.review import one_name, waiting
from pipeline import store
from pipeline.artifacts import Release
from pipeline.chat import client, stream
from pipeline.config.schema import Config
from pipeline.deployment import promote as deployment
from pipeline.deployment import state, steps
from pipeline.environments.interpreters import Environment
from pipeline.errors import Problem, RegistryError, ReviewError, ServingError
from pipeline.registry import versions
from pipeline.serving import runtimes, serve
from pipeline.serving.server import ToServe

ANSWER_TIMEOUT_S = 600.0
MLFLOW_ANSWERS_WITHIN_S = 30.0  # opening its database takes seconds; a rollback waits no longer


def promote(options: argparse.Namespace) -> int:
    """Put an approved version behind the proxy.

    Raises ReviewError when nothing is approved or the unit changed; ServingError when the new one does not come up.
    """
    name = one_name(options.name)
    release = versions.release(name, options.version)
    config = versions.config_of(release.run_id)
    environment = runtimes.environment_of(config.model_dump(mode="json"))
    if options.dry_run:
        steps.verify(release, config, environment)
        print(
            f"{name} v{release.version} is approved by {release.approval.reviewer} and unchanged: unit {release.unit.digest[:12]}"
        )
        print(
            "steps: start beside the old one, canary, switch the proxy, drain and stop the old one, move the alias champion"
        )
        loss = deployment.loss(name, config)
        print(f"not lossless: {loss}" if loss else "no request is dropped: the proxy stays as it is")
        return 0
    _bring(release, config, environment)
    return _print_status(name)


def rollback(options: argparse.Namespace) -> int:
    """Put the release before this one back; raises ReviewError when there is none, or when it isn't approved any more."""
    name = one_name(options.name)
    earlier = deployment.previous(name)
    if earlier is None:
        raise ReviewError("there is no release before this one", key=name, remedy=f"tunegate review {name}")
    release, config = _as_decided_now(earlier.release), earlier.settings()
    if options.dry_run:
        print(f"would put back {name} v{release.version}, unit {release.unit.digest[:12]}")
        return 0
    _bring(release, config, runtimes.environment_of(config.model_dump(mode="json")))
    return _print_status(name)


def _as_decided_now(release: Release) -> Release:
    """A release that was live, with what MLflow says of it now; raises ReviewError when it was rejected since.

    A rollback doesn't wait for MLflow to come back: without it, the decision that it was promoted by counts.
    """
    name, number = release.name, release.version
    try:
        known = _versions_soon(name)
    except RegistryError as error:
        return _as_decided_then(release, error.problems[0].what)
    found = next((version for version in known if (version.version, version.unit) == (number, release.unit)), None)
    if found is None:
        return _as_decided_then(release, f"MLflow knows no version {number} of {name} with this unit")
    if found.approval is not None and found.approval.decision == "approved":
        return release.model_copy(update={"approval": found.approval})
    raise _not_approved(found, known)


def _not_approved(found: versions.Version, known: list[versions.Version]) -> ReviewError:
    """The error for a version that can't be put back; the next older approved one is what to promote instead."""
    made, live = found.approval, state.read(found.name).live
    decision = f"{made.decision} by {made.reviewer}: {made.reason}" if made else "waiting for review"
    passed_by = {found.version, live.release.version if live else None}
    others = [version.version for version in known if _is_approved(version) and version.version not in passed_by]
    older = [number for number in others if int(number) < int(found.version)]
    instead = f"tunegate promote {found.name} --version {(older or others)[0]}" if others else None
    return ReviewError(
        f"version {found.version}, which was live before, is {decision}; nothing unapproved is put back",
        key=found.name,
        allowed=", ".join(others) or "an approved version",
        remedy=instead or f"tunegate review {found.name}",
    )


def _is_approved(version: versions.Version) -> bool:
    return version.approval is not None and version.approval.decision == "approved"


def _as_decided_then(release: Release, why: str) -> Release:
    made = release.approval
    print(f"{why}; v{release.version} was {made.decision} by {made.reviewer} when it was promoted, and that counts")
    return release


def _versions_soon(name: str) -> list[versions.Version]:
    """What MLflow has of a model; raises RegistryError when it is away, or silent for as long as nobody should wait."""
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
        raise RegistryError(f"MLflow did not answer within {MLFLOW_ANSWERS_WITHIN_S:.0f} s", key=name) from None


def _bring(release: Release, config: Config, environment: Environment | None) -> None:
    """Promote a release; of all commands here only this needs Prefect, which is slow to import."""
    from flows import promote as promotion

    with progress.shown() as on_event:
        promotion.run(release, config, environment, on_event)


def status(options: argparse.Namespace) -> int:
    """Print what serves, what runs and what waits."""
    names = [one_name(options.name)] if options.name else versions.names()
    if options.json:
        print(json.dumps([deployment.status(name).model_dump(mode="json") for name in names], indent=1))
        return 0
    for name in names:
        _print_status(name)
        candidate = waiting(name)
        if candidate:
            print(f"  v{candidate.version} waits for review: tunegate review {name}")
    for build in store.running_builds():
        print(f"{build}: tunegate cancel {build.name}" if build.is_here else build)
    if not names:
        print("no model is registered yet; next: tunegate run CONFIG")
    return 0


def _print_status(name: str) -> int:
    found = deployment.status(name)
    for line in (*found.lines(), *_rejected(name, found.version)):
        print(line)
    return 0


def _rejected(name: str, number: str | None) -> Iterator[str]:
    """That what serves was rejected since, as far as MLflow can be asked."""
    with suppress(RegistryError):
        made = next((version.approval for version in _versions_soon(name) if version.version == number), None)
        if made and made.decision == "rejected":
            why = f": {made.reason}" if made.reason else ""
            yield f"  rejected  by {made.reviewer}{why}; promote another version, or tunegate down"


def logs(options: argparse.Namespace) -> int:
    """Print the end of a log: the server's, or a stage's of the newest build."""
    file = _stage_log(options.stage) if options.stage else deployment.log_file(one_name(options.name))
    for line in _tail(file, options.lines):
        print(line)
    if options.follow:
        _follow(file)
    return 0


def _stage_log(stage: str) -> Path:
    found = sorted((store.home() / "work" / stage).glob("*/log.txt"), key=lambda path: path.stat().st_mtime)
    found += sorted((store.home() / "work" / stage).glob(".*.partial/log.txt"), key=lambda path: path.stat().st_mtime)
    if not found:
        known = sorted(path.name for path in (store.home() / "work").glob("*") if any(path.glob("*/log.txt")))
        raise ReviewError(
            f"no log of a stage {stage}", allowed=", ".join(known) or None, remedy="tunegate logs --stage STAGE"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


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


def chat(options: argparse.Namespace) -> int:
    """Talk to what serves, through the proxy, or to a candidate started for this chat alone."""
    name = one_name(options.name)
    with (
        _chat_server(name, candidate=options.candidate) as (url, key, model),
        client(url, ANSWER_TIMEOUT_S, key) as http,
    ):
        messages = [{"role": "system", "content": options.system}] if options.system else []
        for text in [options.message] if options.message else _typed():
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _say(http, model, messages)})
    return 0


@contextmanager
def _chat_server(name: str, *, candidate: bool) -> Iterator[tuple[str, str | None, str]]:
    """URL, API key and model name of what to talk to."""
    if not candidate:
        live = deployment.status(name)
        if live.url is None:
            raise ServingError(
                "nothing serves", key=name, remedy=f"tunegate promote {name}, or tunegate chat {name} --candidate"
            )
        assert live.version is not None  # noqa: S101 - something serves
        config = versions.config_of(versions.version(name, live.version).run_id)
        yield live.url, os.environ.get(config.promote.api_key_env), config.serve.served_model_name or name
        return
    found = waiting(name)
    if found is None:
        raise ReviewError("no version waits for review", key=name, remedy=f"tunegate chat {name}")
    config = versions.config_of(found.run_id)
    environment = runtimes.environment_of(config.model_dump(mode="json"))
    folder = store.home() / "work" / "chat" / name
    to_serve = ToServe(found.unit, versions.model_path(found), config.serve, name, folder, environment)
    with (
        progress.shown() as on_event,
        serve.running(to_serve, on_event) as server,
    ):
        yield server.url, None, server.model


def _typed() -> Iterator[str]:
    print("an empty line or Ctrl-D ends the chat")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        yield text


def _say(http: httpx.Client, model: str, messages: list[dict[str, str]]) -> str:
    """Print an answer piece by piece; returns the whole."""
    answer = ""
    for piece in stream(http, model, messages):
        answer += piece
        print(piece, end="", flush=True)
    print()
    return answer


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
    """Delete old artefacts that no version, no deployment and no recent build refers to; what was released is never touched."""
    freed = 0
    for folder, why in _garbage(options.keep_days):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1)
        freed += size
        print(
            f"{'would delete' if options.dry_run else 'deleted'} {folder.relative_to(store.home())}  {size / 2**20:.0f} MiB  ({why})"
        )
        if not options.dry_run:
            shutil.rmtree(folder)
    print(f"{freed / 2**20:.0f} MiB {'would be ' if options.dry_run else ''}freed")
    return 0


def _garbage(keep_days: float) -> Iterator[tuple[Path, str]]:
    """Folders of the store that may go, with the reason.

    Kept are: artefacts of builds that a registered version came from, what is younger than `keep_days`, what a running build holds.
    """
    if builds := store.running_builds():
        raise ReviewError(
            [Problem(f"a {build}", allowed="gc when none does", remedy="tunegate cancel, or wait") for build in builds]
        )
    kept = set()
    for name in versions.names():
        for version in versions.versions(name):
            file = store.build_folder(version.build_key) / "build.json"
            if file.is_file():
                kept |= {
                    artifact["key"] for artifact in json.loads(file.read_text(encoding="utf-8"))["artifacts"].values()
                }
                kept.add(file.parent.name)
    horizon = time.time() - keep_days * 86400
    for folder in sorted((store.home() / "work").glob("*/*")):
        if not folder.is_dir() or folder.parent.name in ("configs", "releases"):
            continue
        key = folder.name.strip(".").removesuffix(".partial")
        if key not in kept and folder.stat().st_mtime < horizon:
            yield (
                folder,
                "left by a killed run" if folder.name.endswith(".partial") else f"older than {keep_days:g} days",
            )
