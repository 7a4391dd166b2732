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
    """List a model's versions, and show the waiting one (or that of --version) with scores and gate table.

    Raises ReviewError for an unknown name or version.
    """
    name = one_name(options.name)
    all_versions = versions.versions(name)
    for entry in all_versions:
        print(_line(entry))
    waits = next((entry for entry in all_versions if entry.approval is None), None)
    version = versions.version(name, options.version) if options.version else waits
    if version is None:
        print(f"nothing waits for review; next: tunegate status {name}")
        return 0
    tables.print_build(version.build_key, version)
    print(f"\nv{version.version} page: {versions.page(name, version.version, version.run_id)}")
    if version.approval is None:
        print("next: any of")
        if version == waits:  # chat starts this one
            print(f"  tunegate chat {name} --candidate")
        print(f"  tunegate approve {name} --version {version.version} --reviewer NAME")
        print(f'  tunegate reject {name} --version {version.version} --reviewer NAME --reason "…"')
    return 0


def _line(version: Version) -> str:
    approval = version.approval
    unit, day = version.unit.digest[:12], f"{version.created:%Y-%m-%d %H:%M}"
    head = f"{version.name} v{version.version}  unit {unit}  {day}"
    decision = (
        f"{approval.decision} by {approval.reviewer}, {approval.at:%Y-%m-%d %H:%M}" if approval else "waits for review"
    )
    why = f": {approval.reason}" if approval and approval.reason else ""
    later_verdict = "" if version.verdict == "pass" else f"  (judged again: {version.verdict})"
    aliases = f"  [{', '.join(version.aliases)}]" if version.aliases else ""
    return f"{head}  {decision}{why}{later_verdict}{aliases}"


def approve(options: argparse.Namespace) -> int:
    """Approve a version: that of --version, or the only one that waits."""
    return _decide(options, "approved")


def reject(options: argparse.Namespace) -> int:
    """Reject a version: that of --version, or the only one that waits."""
    return _decide(options, "rejected")


def _decide(options: argparse.Namespace, decision: Literal["approved", "rejected"]) -> int:
    name = one_name(options.name)
    with store.lock(f"review/{name}"):
        target = options.version or _only_waiting(name)
        approval = versions.decide(name, target, decision, options.reviewer or "", options.reason)
    print(f"{name} v{target} {approval.decision} by {approval.reviewer}: unit {approval.unit_digest[:12]}")
    live = state.read(name).live
    serves = live is not None and live.server is not None and live.release.version == target
    if decision == "approved" and not serves:
        print(f"next: {shlex.join(['tunegate', 'promote', name, '--version', target])}")
    if decision == "rejected" and serves:
        back = f"tunegate rollback {name}, or " if promote.previous(name) else ""
        print(f"v{target} serves until you change that; next: {back}tunegate down")
    return 0


def _only_waiting(name: str) -> str:
    """The version that waits; raises ReviewError for none or several: nobody approves a version unseen."""
    numbers = [version.version for version in versions.waiting(name)]
    if not numbers:
        raise ReviewError("no version waits for review", key=name, remedy=f"tunegate review {name}")
    if len(numbers) > 1:
        raise ReviewError(
            f"{len(numbers)} versions wait for review",
            key=name,
            allowed=f"--version with one of {', '.join(numbers)}",
            remedy=f"tunegate review {name} --version {numbers[0]}",
        )
    return numbers[0]


def waiting(name: str) -> Version | None:
    """The newest version that waits for a decision."""
    return next(iter(versions.waiting(name)), None)


def one_name(name: str | None) -> str:
    """The name itself, or the only name of a registered or deployed model.

    Raises ReviewError with the names when it is unknown, or none is given and not exactly one exists.
    """
    deployments = state.names()
    if name and name in deployments:
        return name  # without MLflow, which is slow to ask and may be away
    names = sorted({*versions.names(), *deployments})
    if name in names or (name is None and len(names) == 1):
        return name or names[0]
    unknown = f"no model is registered as {name}" if name else "no model is registered"
    defect = "several models are registered" if names and not name else unknown
    remedy = "name one of them" if names else "tunegate run CONFIG"
    raise ReviewError(defect, allowed=", ".join(names) or None, remedy=remedy)
