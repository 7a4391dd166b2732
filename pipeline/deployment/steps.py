"""The steps of a promotion: one table, STEPS, that promote.py, the flow, `status` and the terminal all ask.

Each step reads the deployment's record, does what is missing and writes the record. A step taken twice, or killed
and taken again, therefore comes to the same end. A new step needs a function and an entry in STEPS, at its place.
A `PromotionStep` is a step of a promotion; the stages of a build are `pipeline.plan.steps.Step`.
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
from pipeline.deployment import proxy, state
from pipeline.deployment.state import Deployment, Placement
from pipeline.environments.interpreters import Environment
from pipeline.errors import Problem, ReviewError, RoutingError, ServingError
from pipeline.program import Event
from pipeline.serving import serve
from pipeline.serving.server import Server, ToServe

# A server must be seen without a request for this long before it counts as drained: a request that the proxy sent
# just before the switch may not show in the server's figures yet.
SETTLE_S = 1.0
TIMEOUT_MARGIN_S = 120.0  # added to the longest time that a step's settings allow
SHORT_STEP_S = 480.0  # a step that waits for no setting
KEEP_SERVER_FOLDERS = 5
CANARY_TIMEOUT_S, CANARY_TOKENS = 120.0, 16
CANARY_QUESTIONS = ("Hello!", "What can you do?", "Name a colour.")


@dataclass(frozen=True)
class Promotion:
    """The release to bring to clients, and how it is served.

    `environment` is where vLLM is installed (None: in an image). `set_champion` moves the alias. `on_event`
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


@dataclass(frozen=True)
class Progress:
    """How far a promotion has come.

    `serves`: the release's server is live and answers. `is_routed`: the proxy, with the promotion's settings, sends to it.
    """

    deployment: Deployment
    serves: bool
    is_routed: bool


@dataclass(frozen=True)
class PromotionStep:
    """One step of a promotion.

    `take` does it. `is_due` tells from the progress whether it is missing. `timeout_s` is the longest it may take in
    a Prefect flow (seconds), `retries` how often the flow repeats it. `says` is its text in `promote --dry-run`.
    """

    name: str
    take: Callable[[Promotion], None]
    is_due: Callable[[Progress], bool]
    timeout_s: Callable[[Config], float]
    retries: int
    says: str


def verify(release: Release, config: Config, environment: Environment | None) -> None:
    """Compare what would be served now with what was judged and approved, byte for byte.

    Raises ReviewError naming every field that differs.
    """
    approval = release.approval
    if approval.decision != "approved":
        raise ReviewError(
            f"version {release.version} is rejected by {approval.reviewer}: {approval.reason}",
            key=release.name,
            remedy=f"tunegate promote {release.name} --version VERSION, with an approved one of tunegate review {release.name}",
        )
    remedy = f"restore it, or build and approve anew: tunegate run CONFIG, then tunegate review {release.name}"
    unit = serve.served_unit(release.model_path, config.serve, release.name, environment)
    problems = [
        Problem(
            f"{field} is {_short(now)}",
            key=f"unit.{field}",
            allowed=f"{_short(before)}, as it was judged",
            remedy=remedy,
        )
        for field, now, before in _differences(unit, release.unit)
    ]
    if approval.unit_digest != release.unit.digest:
        problems.append(
            Problem(
                "the approval names another served unit",
                key="approval.unit_digest",
                allowed=release.unit.digest,
                remedy=remedy,
            )
        )
    if problems:
        raise ReviewError(problems)


def _differences(unit: ServedUnit, approved_unit: ServedUnit) -> list[tuple[str, object, object]]:
    """Each field in which the two units differ, with both contents."""
    fields = type(approved_unit).model_fields
    pairs = [(field, getattr(unit, field), getattr(approved_unit, field)) for field in fields]
    return [(field, now, before) for field, now, before in pairs if now != before]


def _short(content: object) -> str:
    text = str(content)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _verify(promotion: Promotion) -> None:
    """Check that the unit is the approved one and the proxy can be told; then write down the wanted placement."""
    verify(promotion.release, promotion.config, promotion.environment)
    proxy.preflight(promotion.config.promote, state.proxy_folder(promotion.name))
    loss = proxy.loss(promotion.config.promote, state.proxy_folder(promotion.name))
    if loss:
        promotion.on_event({"event": "message", "text": f"requests will be lost at the switch: {loss}"})
    deployment = state.read(promotion.name)
    if deployment.wanted is not None and deployment.wanted.is_of(promotion.release, promotion.config):
        return
    abandon(promotion.name)
    incoming = Placement(
        release=promotion.release,
        config=promotion.config.model_dump(mode="json"),
        folder=state.server_folder(promotion.name, promotion.release.version),
    )
    incoming.folder.mkdir(parents=True)
    state.write(state.read(promotion.name).with_changes(wanted=incoming))


def _start(promotion: Promotion) -> None:
    """Start a server beside the old one; a kept or half-started one of the same release is taken over."""
    deployment = state.read(promotion.name)
    incoming = _incoming(deployment)
    if incoming.server is not None and serve.is_alive(incoming.server):
        return
    for placement in deployment.leaving:  # left by a killed command; three servers may not fit
        _drain_server(placement, promotion)
    spare = deployment.kept
    if _can_reuse(spare, promotion):
        server, folder = _server(spare), spare.folder
        state.write(deployment.with_changes(leaving=()))
    else:
        if spare is not None:
            stop_server(spare, promotion.config.serve.shutdown_timeout)
        state.write(deployment.with_changes(leaving=(), kept=None))
        server, folder = _new_server(incoming, promotion), incoming.folder
    incoming = incoming.model_copy(update={"server": server, "folder": folder})
    state.write(state.read(promotion.name).with_changes(wanted=incoming))


def _can_reuse(spare: Placement | None, promotion: Promotion) -> TypeGuard[Placement]:
    """Whether a server that was left running is of this release, served in this way."""
    if spare is None or spare.server is None or not spare.is_of(promotion.release, promotion.config):
        return False
    return serve.is_alive(spare.server)


def _new_server(incoming: Placement, promotion: Promotion) -> Server:
    half = serve.find(incoming.folder)
    if half is not None and serve.condition(half).state != "running":
        serve.stop(half, 1)  # its starter was killed, and a server that isn't ready yet ends with its starter
    to_serve = ToServe(
        incoming.release.unit, incoming.release.model_path, promotion.config.serve, promotion.name, incoming.folder,
        promotion.environment,
    )  # fmt: skip
    return serve.start(to_serve, keep=True, on_event=promotion.on_event)


def _canary(promotion: Promotion) -> None:
    """Ask the new server for real answers, whole and as a stream, before any client meets it."""
    server = _server(_incoming(state.read(promotion.name)))
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
    """Let the proxy send to the new server; if that isn't reached through it, to the old one again."""
    deployment = state.read(promotion.name)
    target = deployment.wanted or deployment.live
    if target is None:
        raise _nothing_live(promotion.name)
    folder = state.proxy_folder(promotion.name)
    live = deployment.live.server if deployment.live else None
    if live is not None and not serve.is_alive(live):
        proxy.forget_upstream(folder)  # its port may be somebody else's by now
    running = proxy.ensure(promotion.config.promote, folder)
    before = proxy.current(running)
    proxy.switch(running, _server(target).url)
    try:
        proxy.check(running, promotion.config.promote)
    except RoutingError:
        proxy.switch(running, before)
        raise
    if deployment.wanted is None:  # only the proxy was moved or brought back
        live_now = target.model_copy(update={"config": promotion.config.model_dump(mode="json")})
        deployment = deployment.with_changes(live=live_now)
    state.write(deployment.after_switch())


def _drain(promotion: Promotion) -> None:
    """Let the old server finish its requests and end, or keep it for a quick rollback."""
    while (deployment := state.read(promotion.name)).leaving:
        *rest, last = deployment.leaving
        server = last.server
        if (
            promotion.config.promote.keep_old
            and server is not None
            and serve.is_alive(server)
            and deployment.kept is None
        ):
            state.write(deployment.with_changes(leaving=tuple(rest), kept=last))
            continue
        _drain_server(last, promotion)
        state.write(deployment.with_changes(leaving=tuple(rest)))
    _forget_old_folders(deployment)


def _alias(promotion: Promotion) -> None:
    """Move the alias champion to the live version."""
    deployment = state.read(promotion.name)
    if deployment.live is None:
        raise _nothing_live(promotion.name)
    version = deployment.live.release.version
    promotion.set_champion(promotion.name, version)
    state.write(deployment.with_changes(champion=version))


def _is_not_served(progress: Progress) -> bool:
    return not progress.serves


def _is_not_routed(progress: Progress) -> bool:
    return not (progress.serves and progress.is_routed)


def _has_leaving_servers(progress: Progress) -> bool:
    return not progress.serves or bool(progress.deployment.leaving)


def _is_alias_behind(progress: Progress) -> bool:
    live, champion = progress.deployment.live, progress.deployment.champion
    return not progress.serves or (live is not None and champion != live.release.version)


def _verify_timeout_s(_config: Config) -> float:
    return TIMEOUT_MARGIN_S + 3600  # reads all weights, maybe from a slow disk


def _start_timeout_s(config: Config) -> float:
    return TIMEOUT_MARGIN_S + config.serve.startup_timeout


def _drain_timeout_s(config: Config) -> float:
    return TIMEOUT_MARGIN_S + config.promote.drain_timeout + config.serve.shutdown_timeout


def _short_timeout_s(_config: Config) -> float:
    return TIMEOUT_MARGIN_S + SHORT_STEP_S


# In the order in which they are taken. Caddy (switch) and MLflow (alias) may be told again. A server that doesn't
# start or answer is news, not noise, and is not tried again.
STEPS: dict[str, PromotionStep] = {
    step.name: step
    for step in (
        PromotionStep("verify", _verify, _is_not_served, _verify_timeout_s, 0, "verify the digests"),
        PromotionStep("start", _start, _is_not_served, _start_timeout_s, 0, "start beside the old one"),
        PromotionStep("canary", _canary, _is_not_served, _short_timeout_s, 0, "canary"),
        PromotionStep("switch", _switch, _is_not_routed, _short_timeout_s, 2, "switch the proxy"),
        PromotionStep("drain", _drain, _has_leaving_servers, _drain_timeout_s, 0, "drain and stop the old one"),
        PromotionStep("alias", _alias, _is_alias_behind, _short_timeout_s, 3, "move the alias champion"),
    )
}


def due(progress: Progress) -> tuple[PromotionStep, ...]:
    """The steps that are missing, in order; none where the release serves and nothing is left to do."""
    return tuple(step for step in STEPS.values() if step.is_due(progress))


def unfinished(deployment: Deployment) -> tuple[str, ...]:
    """Names of the steps that a record shows as missing after its last switch; nothing is asked of processes."""
    return tuple(step.name for step in due(Progress(deployment, serves=True, is_routed=True)))


def note_a_switch(name: str) -> None:
    """Write down a switch that a command made just before it was killed."""
    deployment = state.read(name)
    server = deployment.wanted.server if deployment.wanted else None
    if server is not None and proxy.upstream_of(state.proxy_folder(name)) == server.url:
        state.write(deployment.after_switch())


def abandon(name: str) -> None:
    """Stop the server of a promotion that did not reach its switch."""
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
        reason = "it doesn't tell what is in flight" if left is None else f"{left} requests still in flight"
        text = f"the old server is stopped: {reason} after {time.monotonic() - began:.0f} s"
        promotion.on_event({"event": "message", "text": text})
    serve.stop(server, placement.settings().serve.shutdown_timeout)


def _left_after(server: Server, timeout_s: float) -> int | None:
    """Requests in flight when the server was quiet for SETTLE_S (0) or at the timeout; None when it doesn't tell."""
    began = quiet_since = time.monotonic()
    while serve.is_alive(server):
        now, left = time.monotonic(), _in_flight(server)
        if left != 0:
            quiet_since = time.monotonic()
        if now - quiet_since >= SETTLE_S or now - began >= timeout_s:
            return left
        time.sleep(0.05)
    return 0


def _in_flight(server: Server) -> int | None:
    """Requests in flight: 0 once nothing runs, None while a server runs and doesn't tell (frozen, overloaded)."""
    try:
        return serve.in_flight(server)
    except ServingError:
        return None if serve.is_running(server) else 0


def _says_something(answer: chat.Answer) -> bool:
    """Whether an answer has text or ends by itself: a tuned model may have nothing to say to strangers."""
    return bool(answer.text.strip()) or answer.finish_reason == "stop"


def _no_answer(server: Server, reason: str) -> ServingError:
    return ServingError(
        f"the new server did not answer properly: {reason}",
        key=server.url,
        file=str(server.log),
        remedy="read the log; the old server goes on serving",
    )


def _nothing_live(name: str) -> ServingError:
    return ServingError("no release is live", key=name, remedy=f"tunegate promote {name}")


def _incoming(deployment: Deployment) -> Placement:
    if deployment.wanted is None:
        raise ServingError(
            "no promotion is under way", key=deployment.name, remedy=f"tunegate promote {deployment.name}"
        )
    return deployment.wanted


def _server(placement: Placement) -> Server:
    if placement.server is None:
        raise ServingError(
            f"the server of version {placement.release.version} is not started",
            remedy=f"tunegate promote {placement.release.name}",
        )
    return placement.server


def _forget_old_folders(deployment: Deployment) -> None:
    """Delete the folders (logs) of ended servers, all but the newest KEEP_SERVER_FOLDERS."""
    placements = (deployment.live, deployment.wanted, deployment.kept)
    in_use = {placement.folder for placement in placements if placement is not None}
    folders = sorted((state.folder(deployment.name) / "servers").glob("*"), key=_modified)
    for folder in folders[:-KEEP_SERVER_FOLDERS]:
        if folder not in in_use:
            shutil.rmtree(folder, ignore_errors=True)


def _modified(path: Path) -> float:
    return path.stat().st_mtime
