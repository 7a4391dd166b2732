"""The steps of a promotion: verify, start, canary, switch, drain, alias; deployment.py takes them in turn.

Each step reads the deployment's record, does what is missing and writes the record, so that a step taken
twice, or killed and taken again, comes to the same end.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from pipeline import chat
from pipeline.artifacts import Release, ServedUnit
from pipeline.config.schema import Config
from pipeline.deployment import proxy as routing
from pipeline.deployment import state
from pipeline.deployment.state import Deployment, Placement
from pipeline.environments.interpreters import Environment
from pipeline.errors import Problem, ReviewError, RoutingError, ServingError
from pipeline.program import Event
from pipeline.serving import serve
from pipeline.serving.server import Server, ToServe

# How long a server must be seen without a request before it counts as drained: one that the proxy sent just
# before the switch may not show in the server's figures yet.
SETTLE_S = 1.0
KEEP_SERVER_FOLDERS = 5
CANARY_TIMEOUT_S, CANARY_TOKENS = 120.0, 16
CANARY_QUESTIONS = ("Hello!", "What can you do?", "Name a colour.")


@dataclass(frozen=True)
class Promotion:
    """What is to serve and how.

    `environment` is where vLLM is installed (None: in an image), `set_champion` moves the alias, `on_event`
    hears of progress.
    """

    release: Release
    config: Config
    environment: Environment | None
    set_champion: Callable[[str, str], None]
    on_event: Callable[[Event], None]

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.release.name


Step = Callable[[Promotion], None]
Each = Callable[[str, Step, Promotion], None]


def verify(release: Release, config: Config, environment: Environment | None) -> None:
    """Compare what would be served now with what was judged and approved, byte for byte.

    Raises ReviewError naming every field that differs.
    """
    approval = release.approval
    if approval.decision != "approved":
        raise ReviewError(
            f"version {release.version} is rejected by {approval.reviewer}: {approval.reason}",
            key=release.name,
        )
    unit = serve.served_unit(release.model_path, config.serve, release.name, environment)
    problems = [
        Problem(f"{field} is {_short(found)}", key=f"unit.{field}", allowed=f"{_short(judged)}, as it was judged")
        for field, found, judged in _differences(unit, release.unit)
    ]
    if approval.unit_digest != release.unit.digest:
        problems.append(
            Problem(
                "the approval names another served unit",
                key="approval.unit_digest",
                allowed=release.unit.digest,
            )
        )
    if problems:
        *others, last = problems
        remedy = f"restore it, or build and approve anew: tunegate run CONFIG, then tunegate review {release.name}"
        raise ReviewError([*others, Problem(last.what, key=last.key, allowed=last.allowed, remedy=remedy)])


def _differences(found: ServedUnit, judged: ServedUnit) -> list[tuple[str, object, object]]:
    pairs = [(field, getattr(found, field), getattr(judged, field)) for field in type(judged).model_fields]
    return [(field, one, other) for field, one, other in pairs if one != other]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _verify(promotion: Promotion) -> None:
    """Step 1: the unit is the approved one, and the proxy could be told; then write down what is wanted."""
    verify(promotion.release, promotion.config, promotion.environment)
    routing.preflight(promotion.config.promote, state.proxy_folder(promotion.name))
    loss = routing.loss(promotion.config.promote, state.proxy_folder(promotion.name))
    if loss:
        promotion.on_event({"event": "message", "text": f"requests will be lost at the switch: {loss}"})
    deployment = state.read(promotion.name)
    if deployment.wanted is not None and deployment.wanted.is_of(promotion.release, promotion.config):
        return
    abandon(promotion.name)
    wanted = Placement(
        release=promotion.release,
        config=promotion.config.model_dump(mode="json"),
        folder=state.server_folder(promotion.name, promotion.release.version),
    )
    wanted.folder.mkdir(parents=True)
    state.write(state.read(promotion.name).with_changes(wanted=wanted))


def _start(promotion: Promotion) -> None:
    """Step 2: a server beside the old one; a kept or half-started one of the same release is taken over."""
    deployment = state.read(promotion.name)
    wanted = _wanted(deployment)
    if wanted.server is not None and serve.is_alive(wanted.server):
        return
    for placement in deployment.leaving:  # left by a killed command; three servers may not fit
        _drain_server(placement, promotion)
    kept = deployment.kept
    if _can_reuse(kept, promotion):
        server, folder = _server(kept), kept.folder
        state.write(deployment.with_changes(leaving=()))
    else:
        if kept is not None:
            stop_server(kept, promotion.config.serve.shutdown_timeout)
        state.write(deployment.with_changes(leaving=(), kept=None))
        server, folder = _started(wanted, promotion), wanted.folder
    wanted = wanted.model_copy(update={"server": server, "folder": folder})
    state.write(state.read(promotion.name).with_changes(wanted=wanted))


def _can_reuse(kept: Placement | None, promotion: Promotion) -> TypeGuard[Placement]:
    """Whether a server that was left running is what is wanted now."""
    if kept is None or kept.server is None or not kept.is_of(promotion.release, promotion.config):
        return False
    return serve.is_alive(kept.server)


def _started(wanted: Placement, promotion: Promotion) -> Server:
    half = serve.find(wanted.folder)
    if half is not None and serve.condition(half).state != "running":
        serve.stop(half, 1)  # its starter was killed, and a server that isn't ready yet ends with its starter
    to_serve = ToServe(
        wanted.release.unit, wanted.release.model_path, promotion.config.serve, promotion.name, wanted.folder,
        promotion.environment,
    )  # fmt: skip
    return serve.start(to_serve, keep=True, on_event=promotion.on_event)


def _canary(promotion: Promotion) -> None:
    """Step 3: the new server answers for real, whole and as a stream, before any client meets it."""
    server = _server(_wanted(state.read(promotion.name)))
    conversations = [[{"role": "user", "content": question}] for question in CANARY_QUESTIONS]
    try:
        with chat.client(server.url, CANARY_TIMEOUT_S) as http:
            answers = [chat.complete(http, server.model, messages, CANARY_TOKENS) for messages in conversations]
            for _ in chat.stream(http, server.model, conversations[0], CANARY_TOKENS):
                pass
    except ServingError as error:
        raise _no_answer(server, error.problems[0].what) from error
    for answer in answers:
        if answer.finish_reason not in ("stop", "length"):
            raise _no_answer(server, f"an answer's finish_reason is {answer.finish_reason}")
    if not any(_says_something(answer) for answer in answers):
        raise ServingError(
            "the new server's answers are empty and don't end",
            key=server.url,
            file=str(server.log),
            remedy=f"tunegate chat {promotion.name} --candidate shows what it says",
        )


def _switch(promotion: Promotion) -> None:
    """Step 4: the proxy sends to the new server; if it doesn't get through, it sends to the old one again."""
    deployment = state.read(promotion.name)
    target = deployment.wanted or deployment.live
    if target is None:
        raise ServingError("nothing is there to switch to", key=promotion.name)
    folder = state.proxy_folder(promotion.name)
    live = deployment.live.server if deployment.live else None
    if live is not None and not serve.is_alive(live):
        routing.forget_upstream(folder)  # its port may be somebody else's by now
    proxy = routing.ensure(promotion.config.promote, folder)
    before = routing.current(proxy)
    routing.switch(proxy, _server(target).url)
    try:
        routing.check(proxy, promotion.config.promote)
    except RoutingError:
        routing.switch(proxy, before)
        raise
    if deployment.wanted is None:  # only the proxy was moved or brought back
        placed = target.model_copy(update={"config": promotion.config.model_dump(mode="json")})
        deployment = deployment.with_changes(live=placed)
    state.write(deployment.after_switch())


def _drain(promotion: Promotion) -> None:
    """Step 5: the old server finishes what it has and ends, or is kept for a quick rollback."""
    while (deployment := state.read(promotion.name)).leaving:
        *others, last = deployment.leaving
        server = last.server
        if (
            promotion.config.promote.keep_old
            and server is not None
            and serve.is_alive(server)
            and deployment.kept is None
        ):
            state.write(deployment.with_changes(leaving=tuple(others), kept=last))
            continue
        _drain_server(last, promotion)
        state.write(deployment.with_changes(leaving=tuple(others)))
    _forget_old_folders(deployment)


def _alias(promotion: Promotion) -> None:
    """Step 6: the alias champion moves to what is live."""
    deployment = state.read(promotion.name)
    if deployment.live is None:
        raise ServingError("nothing is live", key=promotion.name)
    version = deployment.live.release.version
    promotion.set_champion(promotion.name, version)
    state.write(deployment.with_changes(champion=version))


STEPS: dict[str, Step] = {
    "verify": _verify,
    "start": _start,
    "canary": _canary,
    "switch": _switch,
    "drain": _drain,
    "alias": _alias,
}


def note_a_switch(name: str) -> None:
    """Write down a switch that a command made just before it was killed."""
    deployment = state.read(name)
    wanted = deployment.wanted
    if (
        wanted is not None
        and wanted.server is not None
        and routing.upstream_of(state.proxy_folder(name)) == wanted.server.url
    ):
        state.write(deployment.after_switch())


def abandon(name: str) -> None:
    """Stop a server that was wanted and didn't come to serve."""
    note_a_switch(name)
    deployment = state.read(name)
    if deployment.wanted is not None:
        if deployment.kept is None or deployment.kept.server != deployment.wanted.server:
            stop_server(deployment.wanted, timeout_s=1)
        state.write(deployment.with_changes(wanted=None))


def stop_server(placement: Placement, timeout_s: float) -> None:
    """Stop the server of a placement, also one whose start was cut short; one that is gone is no error."""
    server = placement.server or serve.find(placement.folder)
    if server is not None:
        serve.stop(server, timeout_s)


def _drain_server(placement: Placement, promotion: Promotion) -> None:
    """Wait until nothing is in flight for a while, at most the drain timeout, then stop it."""
    server = placement.server
    if server is None:
        return
    began = time.monotonic()
    left = _left_after(server, promotion.config.promote.drain_timeout)
    if left != 0:
        what = "it doesn't tell what is in flight" if left is None else f"{left} requests still in flight"
        text = f"the old server is stopped: {what} after {time.monotonic() - began:.0f} s"
        promotion.on_event({"event": "message", "text": text})
    serve.stop(server, placement.settings().serve.shutdown_timeout)


def _left_after(server: Server, timeout_s: float) -> int | None:
    """What is in flight once it was quiet for a while, which is 0, or at the timeout; None when it doesn't tell."""
    began = quiet_since = time.monotonic()
    while serve.is_alive(server):
        asked, left = time.monotonic(), _in_flight(server)
        if left != 0:
            quiet_since = time.monotonic()
        if asked - quiet_since >= SETTLE_S or asked - began >= timeout_s:
            return left
        time.sleep(0.05)
    return 0


def _in_flight(server: Server) -> int | None:
    """Requests that it has; none once nothing runs, and None of one that runs and doesn't tell, frozen or overloaded."""
    try:
        return serve.in_flight(server)
    except ServingError:
        return None if serve.is_running(server) else 0


def _says_something(answer: chat.Answer) -> bool:
    """Whether an answer has text or ends by itself: a tuned model may have nothing to say to strangers."""
    return bool(answer.text.strip()) or answer.finish_reason == "stop"


def _no_answer(server: Server, what: str) -> ServingError:
    return ServingError(
        f"the new server did not answer properly: {what}",
        key=server.url,
        file=str(server.log),
        remedy="read the log; the old server goes on serving",
    )


def _wanted(deployment: Deployment) -> Placement:
    if deployment.wanted is None:
        raise ServingError(
            "no promotion is under way", key=deployment.name, remedy=f"tunegate promote {deployment.name}"
        )
    return deployment.wanted


def _server(placement: Placement) -> Server:
    if placement.server is None:
        raise ServingError(
            f"version {placement.release.version} has no server",
            remedy=f"tunegate promote {placement.release.name}",
        )
    return placement.server


def _forget_old_folders(deployment: Deployment) -> None:
    """Delete the folders (logs) of servers long gone, all but the newest few."""
    used = {
        placement.folder for placement in (deployment.live, deployment.wanted, deployment.kept) if placement is not None
    }
    folders = sorted((state.folder(deployment.name) / "servers").glob("*"), key=_modified)
    for folder in folders[:-KEEP_SERVER_FOLDERS]:
        if folder not in used:
            shutil.rmtree(folder, ignore_errors=True)


def _modified(path: Path) -> float:
    return path.stat().st_mtime
