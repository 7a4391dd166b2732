"""Promotion, rollback, status and stop of what serves, as plain steps that `kill -9` can't confuse.

What is wanted is written down before its server starts. Until the proxy is switched a failure stops the new
server and leaves the old one serving and the alias where it was; after the switch the same command, or the
next, goes forward. A rollback is the promotion of the release that was live before.

Limits: one machine; two servers side by side must fit its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline import store
from pipeline.config.schema import Config
from pipeline.deployment import proxy as routing
from pipeline.deployment import state
from pipeline.deployment.proxy import Proxy
from pipeline.deployment.state import Deployment, Placement
from pipeline.deployment.status import Status
from pipeline.deployment.steps import STEPS, Promotion, Step, abandon, note_a_switch, stop_server
from pipeline.errors import ConfigError, RoutingError, ServingError
from pipeline.serving import serve
from pipeline.serving.server import Server

Each = Callable[[str, Step, Promotion], None]


def directly(name: str, step: Step, promotion: Promotion) -> None:
    """Take one step and tell how long it took."""
    started = time.monotonic()
    promotion.on_event({"event": "stage", "stage": name, "state": "running"})
    try:
        step(promotion)
    except BaseException:
        promotion.on_event({"event": "stage", "stage": name, "state": "failed", "seconds": time.monotonic() - started})
        raise
    promotion.on_event({"event": "stage", "stage": name, "state": "done", "seconds": time.monotonic() - started})


def promote(promotion: Promotion, each: Each = directly) -> Deployment:
    """Bring the release to where clients reach it; what is done already isn't done again.

    `each` takes one named step; flows/promote.py makes it a Prefect task.

    Raises Busy when another command changes this deployment, ReviewError when the unit isn't what was
    approved, ServingError when the new server doesn't start or answer, RoutingError when the proxy can't be
    told.
    """
    name = promotion.name
    with store.lock(f"deployment/{name}", wait=False):
        note_a_switch(name)
        steps = due(promotion)
        if "verify" not in steps:  # what is live is what is asked for; drop anything else that was under way
            abandon(name)
        for step in steps:
            try:
                each(step, STEPS[step], promotion)
            except BaseException:
                abandon(name)
                raise
        return state.read(name)


def due(promotion: Promotion) -> tuple[str, ...]:
    """The steps that are missing until the release serves; none when it does.

    Waits for a live server that is being restarted.
    """
    deployment = state.read(promotion.name)
    if not _serves(deployment, promotion):
        return tuple(STEPS)
    live = deployment.live
    folder = state.proxy_folder(promotion.name)
    proxy = routing.find(folder) if routing.matches(promotion.config.promote, folder) else None
    routed = live and live.server and proxy and routing.current(proxy) == live.server.url
    missing = {
        "switch": not routed,
        "drain": bool(deployment.leaving),
        "alias": deployment.champion != promotion.release.version,
    }
    return tuple(step for step, wanted in missing.items() if wanted)


def is_settled(promotion: Promotion) -> bool:
    """Whether the release serves already and nothing else is under way: promoting it would do nothing."""
    return not due(promotion) and state.read(promotion.name).wanted is None


def loss(name: str, config: Config) -> str | None:
    """Why a promotion with this config would drop requests, although promotions don't; None where it drops none.

    Raises ConfigError when the proxy needs a key that isn't set, RoutingError when it couldn't listen at its port.
    """
    routing.preflight(config.promote, state.proxy_folder(name))
    return routing.loss(config.promote, state.proxy_folder(name))


def previous(name: str) -> Placement | None:
    """What `rollback` brings back, or None; a rollback that was cut short keeps its target.

    Its config is the one it was served with, but for the proxy, which stays where clients find it now.
    """
    deployment = state.read(name)
    live, wanted = deployment.live, deployment.wanted
    earlier = {placement.release.version for placement in deployment.history}
    if wanted is not None and wanted.release.version in earlier:
        target = wanted
    elif live is not None and deployment.went_back and deployment.is_unfinished:
        target = live
    elif deployment.history:
        target = deployment.history[-1]
    else:
        return None
    config = {**target.config, "promote": live.config["promote"]} if live else target.config
    return target.model_copy(update={"config": config, "server": None})


def stop(name: str, timeout_s: float = 10.0) -> bool:
    """Stop the deployment's servers and proxy; what is in flight has `timeout_s` (seconds).

    The next promote starts them again. Returns whether there was a deployment.
    """
    if name not in state.names():
        return False
    with store.lock(f"deployment/{name}", wait=False):
        deployment = state.read(name)
        proxy = routing.find(state.proxy_folder(name))
        if proxy is not None:
            routing.stop(proxy, timeout_s)
        routing.forget_upstream(state.proxy_folder(name))
        placements = [deployment.live, deployment.wanted, deployment.kept, *deployment.leaving]
        for placement in placements:
            if placement is not None:
                stop_server(placement, timeout_s)
        live = deployment.live.model_copy(update={"server": None}) if deployment.live else None
        state.write(deployment.with_changes(live=live, wanted=None, kept=None, leaving=()))
    return True


def status(name: str) -> Status:
    """How the deployment is now, asked of its processes; MLflow isn't needed.

    Raises RoutingError when its proxy hangs.
    """
    deployment = state.read(name)
    live = deployment.live
    proxy = routing.find(state.proxy_folder(name))
    missing = {
        "drain": bool(deployment.leaving),
        "alias": live is not None and deployment.champion != live.release.version,
    }
    found = Status(
        name=name,
        state="none" if live is None else "stopped",
        since=deployment.since,
        url=proxy.url if proxy else None,
        proxy_pid=proxy.pid if proxy else None,
        wanted=_version(deployment.wanted),
        kept=_version(deployment.kept),
        unfinished=tuple(step for step, is_missing in missing.items() if is_missing),
        previous=tuple(placement.release.version for placement in deployment.history),
    )
    if live is None:
        return found
    found = found.model_copy(
        update={
            "version": live.release.version,
            "unit_digest": live.release.unit.digest,
            "reviewer": live.release.approval.reviewer,
            "runtime": live.release.unit.runtime,
        }
    )
    return found if live.server is None else _with_server(found, live, live.server, proxy)


def _with_server(found: Status, live: Placement, server: Server, proxy: Proxy | None) -> Status:
    now = serve.condition(server)
    proxy_ok = False
    if now.healthy and proxy is not None and routing.current(proxy) == server.url:
        with suppress(RoutingError, ConfigError):
            routing.check(proxy, live.settings().promote)
            proxy_ok = True
    coming = now.state in ("starting", "restarting") or (now.state == "running" and not now.healthy)
    return found.model_copy(
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
    told = False
    while serve.is_alive(live.server) and time.monotonic() < until:
        if serve.condition(live.server).healthy:
            return True
        if not told:
            promotion.on_event({"event": "message", "text": "the server is not answering; waiting for its restart"})
            told = True
        time.sleep(0.2)
    return False
