"""Promotion, rollback, status and stop of a deployment, as plain steps that `kill -9` can't confuse.

The target of a promotion is written down before its server starts. A failure before the proxy is switched stops the
new server; the old one goes on serving and the alias stays. After the switch the same command, or the next, goes
forward. A rollback is the promotion of the release that was live before.

Limits: one machine; two servers side by side must fit its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline import store
from pipeline.config.schema import Config
from pipeline.deployment import proxy, state, steps
from pipeline.deployment.proxy import Proxy
from pipeline.deployment.state import Deployment, Placement
from pipeline.deployment.status import Status
from pipeline.deployment.steps import Progress, Promotion, PromotionStep
from pipeline.errors import ConfigError, RoutingError, ServingError
from pipeline.serving import serve
from pipeline.serving.server import Server

StepRunner = Callable[[PromotionStep, Promotion], None]


def directly(step: PromotionStep, promotion: Promotion) -> None:
    """Take one step and tell how long it took (seconds)."""
    began = time.monotonic()
    event = {"event": "stage", "stage": step.name}
    promotion.on_event({**event, "state": "running"})
    try:
        step.take(promotion)
    except BaseException:
        promotion.on_event({**event, "state": "failed", "seconds": time.monotonic() - began})
        raise
    promotion.on_event({**event, "state": "done", "seconds": time.monotonic() - began})


def promote(promotion: Promotion, run_step: StepRunner = directly) -> Deployment:
    """Bring the release to where clients reach it; a step that is done already isn't taken again.

    `run_step` takes one step; flows/promote.py makes it a Prefect task.

    Raises Busy when another command changes this deployment, ReviewError when the unit isn't the approved one,
    ServingError when the new server doesn't start or answer, RoutingError when the proxy can't be told.
    """
    name = promotion.name
    with store.lock(f"deployment/{name}", wait=False):
        steps.note_a_switch(name)
        progress = _progress(promotion)
        if progress.serves:  # anything else that was under way is dropped
            steps.abandon(name)
        for step in steps.due(progress):
            try:
                run_step(step, promotion)
            except BaseException:
                steps.abandon(name)
                raise
        return state.read(name)


def _progress(promotion: Promotion) -> Progress:
    """How far the promotion has come; waits for a live server that is being restarted."""
    deployment = state.read(promotion.name)
    if not _serves(deployment, promotion):
        return Progress(deployment, serves=False, is_routed=False)
    live = deployment.live
    folder = state.proxy_folder(promotion.name)
    running = proxy.find(folder) if proxy.matches(promotion.config.promote, folder) else None
    is_routed = bool(live and live.server and running and proxy.current(running) == live.server.url)
    return Progress(deployment, serves=True, is_routed=is_routed)


def is_settled(promotion: Promotion) -> bool:
    """Whether the release serves already and nothing else is under way: promoting it would do nothing."""
    return not steps.due(_progress(promotion)) and state.read(promotion.name).wanted is None


def loss(name: str, config: Config) -> str | None:
    """The reason why a promotion with this config would drop requests; None where it drops none.

    Raises ConfigError when the proxy needs a key that isn't set, RoutingError when it couldn't listen at its port.
    """
    proxy.preflight(config.promote, state.proxy_folder(name))
    return proxy.loss(config.promote, state.proxy_folder(name))


def previous(name: str) -> Placement | None:
    """The placement that `rollback` brings back, or None; a rollback that was cut short keeps its target.

    Its config is the one it was served with, except for `promote`: the proxy stays where clients find it now.
    """
    deployment = state.read(name)
    live, incoming = deployment.live, deployment.wanted
    earlier = {placement.release.version for placement in deployment.history}
    if incoming is not None and incoming.release.version in earlier:
        target = incoming
    elif live is not None and deployment.went_back and steps.unfinished(deployment):
        target = live
    elif deployment.history:
        target = deployment.history[-1]
    else:
        return None
    config = {**target.config, "promote": live.config["promote"]} if live else target.config
    return target.model_copy(update={"config": config, "server": None})


def stop(name: str, timeout_s: float = 10.0) -> bool:
    """Stop the deployment's servers and proxy; requests in flight have `timeout_s` (seconds) to end.

    The next promote starts them again. Returns whether there was a deployment.
    """
    if name not in state.names():
        return False
    with store.lock(f"deployment/{name}", wait=False):
        deployment = state.read(name)
        running = proxy.find(state.proxy_folder(name))
        if running is not None:
            proxy.stop(running, timeout_s)
        proxy.forget_upstream(state.proxy_folder(name))
        placements = [deployment.live, deployment.wanted, deployment.kept, *deployment.leaving]
        for placement in placements:
            if placement is not None:
                steps.stop_server(placement, timeout_s)
        live = deployment.live.model_copy(update={"server": None}) if deployment.live else None
        state.write(deployment.with_changes(live=live, wanted=None, kept=None, leaving=()))
    return True


def status(name: str) -> Status:
    """The deployment's status now, asked of its processes; MLflow isn't needed.

    Raises RoutingError when its proxy hangs.
    """
    deployment = state.read(name)
    live = deployment.live
    running = proxy.find(state.proxy_folder(name))
    report = Status(
        name=name,
        state="none" if live is None else "stopped",
        since=deployment.since,
        url=running.url if running else None,
        proxy_pid=running.pid if running else None,
        wanted=_version(deployment.wanted),
        kept=_version(deployment.kept),
        unfinished=steps.unfinished(deployment),
        previous=tuple(placement.release.version for placement in deployment.history),
    )
    if live is None:
        return report
    report = report.model_copy(
        update={
            "version": live.release.version,
            "unit_digest": live.release.unit.digest,
            "reviewer": live.release.approval.reviewer,
            "runtime": live.release.unit.runtime,
        }
    )
    return report if live.server is None else _with_server(report, live, live.server, running)


def _with_server(report: Status, live: Placement, server: Server, running: Proxy | None) -> Status:
    now = serve.condition(server)
    proxy_ok = False
    if now.healthy and running is not None and proxy.current(running) == server.url:
        with suppress(RoutingError, ConfigError):
            proxy.check(running, live.settings().promote)
            proxy_ok = True
    coming = now.state in ("starting", "restarting") or (now.state == "running" and not now.healthy)
    return report.model_copy(
        update={
            "state": "live" if proxy_ok else "restarting" if coming else "down",
            "proxy_ok": proxy_ok,
            "server_url": server.url,
            "log": server.log,
            "pid": now.pid,
            "container": now.container,
            "uptime_s": now.uptime_s,
            "restarts": now.restarts,
            "in_flight": now.in_flight,
            "why": now.why,
        }
    )


def _version(placement: Placement | None) -> str | None:
    return placement.release.version if placement else None


def log_file(name: str) -> Path:
    """The log of the live server, or of one being started. Raises ServingError when there is none."""
    deployment = state.read(name)
    for placement in (deployment.live, deployment.wanted):
        if placement is not None and placement.server is not None:
            serve.refresh_log(placement.server)
            return placement.server.log
    raise ServingError("no server runs, so there is no log", key=name, remedy=f"tunegate promote {name}")


def _serves(deployment: Deployment, promotion: Promotion) -> bool:
    """Whether the live server is that release and answers; one that is being restarted is waited for."""
    live = deployment.live
    if live is None or live.server is None or not live.is_of(promotion.release, promotion.config):
        return False
    until = time.monotonic() + promotion.config.serve.startup_timeout
    has_told = False
    while serve.is_alive(live.server) and time.monotonic() < until:
        if serve.condition(live.server).healthy:
            return True
        if not has_told:
            promotion.on_event({"event": "message", "text": "the server is not answering; waiting for its restart"})
            has_told = True
        time.sleep(0.2)
    return False
