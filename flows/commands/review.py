"""`tunegate review`, `approve` and `reject`: a person decides on the digest that would serve."""

from __future__ import annotations

import argparse
import shlex
from typing import Literal

from flows.commands import tables
from pipeline import store
from pipeline.deployment import promote, state
from pipeline.errors import ReviewError
from pipeline.registry import versions
from pipeline.registry.versions import Version


def review(options: argparse.Namespace) -> int:
    """List a model's versions, and show the one that waits (or the one asked for) with scores and gate table.

    Raises ReviewError for an unknown name or version.
    """
    name = one_name(options.name)
    found = versions.versions(name)
    for version in found:
        print(_line(version))
    waits = next((version for version in found if version.approval is None), None)
    shown = versions.version(name, options.version) if options.version else waits
    if shown is None:
        print(f"nothing waits for review; next: tunegate status {name}")
        return 0
    tables.print_build(shown.build_key, shown)
    print(f"\nv{shown.version} page: {versions.page(name, shown.version, shown.run_id)}")
    if shown.approval is None:
        print("next: any of")
        if shown == waits:  # the one that chat starts
            print(f"  tunegate chat {name} --candidate")
        print(f"  tunegate approve {name} --version {shown.version} --reviewer NAME")
        print(f'  tunegate reject {name} --version {shown.version} --reviewer NAME --reason "…"')
    return 0


def _line(version: Version) -> str:
    made = version.approval
    unit, created = version.unit.digest[:12], f"{version.created:%Y-%m-%d %H:%M}"
    head = f"{version.name} v{version.version}  unit {unit}  {created}"
    decision = f"{made.decision} by {made.reviewer}, {made.at:%Y-%m-%d %H:%M}" if made else "waits for review"
    why = f": {made.reason}" if made and made.reason else ""
    judged = "" if version.verdict == "pass" else f"  (judged again: {version.verdict})"
    aliases = f"  [{', '.join(version.aliases)}]" if version.aliases else ""
    return f"{head}  {decision}{why}{judged}{aliases}"


def approve(options: argparse.Namespace) -> int:
    """Approve a version: the one asked for, or the only one that waits."""
    return _decide(options, "approved")


def reject(options: argparse.Namespace) -> int:
    """Reject a version: the one asked for, or the only one that waits."""
    return _decide(options, "rejected")


def _decide(options: argparse.Namespace, decision: Literal["approved", "rejected"]) -> int:
    name = one_name(options.name)
    with store.lock(f"review/{name}"):
        target = options.version or _only_waiting(name)
        made = versions.decide(name, target, decision, options.reviewer or "", options.reason)
    print(f"{name} v{target} {made.decision} by {made.reviewer}: unit {made.unit_digest[:12]}")
    live = state.read(name).live
    serves = live is not None and live.server is not None and live.release.version == target
    if decision == "approved" and not serves:
        print(f"next: {shlex.join(['tunegate', 'promote', name, '--version', target])}")
    if decision == "rejected" and serves:
        back = f"tunegate rollback {name}, or " if promote.previous(name) else ""
        print(f"v{target} serves until you change that; next: {back}tunegate down")
    return 0


def _only_waiting(name: str) -> str:
    """The version that waits; raises ReviewError when none does, or several: nobody approves one unseen."""
    found = [version.version for version in versions.waiting(name)]
    if not found:
        raise ReviewError("nothing waits for review", key=name, remedy=f"tunegate review {name}")
    if len(found) > 1:
        raise ReviewError(
            f"{len(found)} versions wait for review",
            key=name,
            allowed=f"--version with one of {', '.join(found)}",
            remedy=f"tunegate review {name} --version {found[0]}",
        )
    return found[0]


def waiting(name: str) -> Version | None:
    """The newest version that waits for a decision."""
    return next(iter(versions.waiting(name)), None)


def one_name(name: str | None) -> str:
    """The name given, or the only one there is, by what is registered and what was deployed.

    Raises ReviewError listing the names when there are several or none.
    """
    deployed = state.names()
    if name and name in deployed:
        return name  # without MLflow, which is slow to ask and may be away
    known = sorted({*versions.names(), *deployed})
    if name in known or (name is None and len(known) == 1):
        return name or known[0]
    unknown = f"no model is registered as {name}" if name else "no model is registered"
    what = "several models are registered" if known and not name else unknown
    remedy = "name one of them" if known else "tunegate run CONFIG"
    raise ReviewError(what, allowed=", ".join(known) or None, remedy=remedy)
