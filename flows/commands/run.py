"""`tunegate run`: the build flow from a terminal, with or without a Prefect server."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from flows.commands import check
from pipeline.errors import GateFailed, Problem
from pipeline.plan import resolve


def run(options: argparse.Namespace) -> int:
    """Build from a config; a build that is done and unchanged is only reported.

    Raises GateFailed when the verdict isn't a pass, whether it was reached now or before.
    """
    config = resolve.resolve(options.config, options.set, options.data_dir)
    build_plan = check.show(config, options.config, look=options.dry_run)
    if options.dry_run:
        return 0
    note = build_plan.finished
    if note is None or options.again:
        note = build_here(config, again=options.again)
    else:
        _take_over(note, config)
        print("nothing that is judged changed since; this is that build's result (--again measures anew)")
    report(note)
    return 0


def _take_over(note: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Give a version that may be promoted today's config sections that no gate judges, and print their names."""
    from pipeline.registry import runs

    sections = runs.take_over(note, config)
    if sections:
        again = f"tunegate promote {note['name']} --version {note['version']}"
        print(f"taken over from the config, for the next promotion ({again}): {', '.join(sections)}")


def build_here(config: Mapping[str, Any], *, again: bool = False) -> Mapping[str, Any]:
    """Run the build flow in this process, its progress on this terminal."""
    from flows.commands.services import prefect_for_a_run

    prefect_for_a_run()
    from prefect import flow

    from flows import build, progress

    with progress.shown() as on_event:

        @flow(name="build", flow_run_name=str(config["name"]), persist_result=False, validate_parameters=False)
        def from_terminal() -> dict[str, Any]:
            return build.run(config, on_event, again=again)

        return from_terminal()


def report(note: Mapping[str, Any]) -> None:
    """Print a finished build's tables and the next command; raises GateFailed unless it passed."""
    from flows.commands.tables import print_build

    print_build(str(note["build_key"]))
    if note["outcome"] != "pass":
        raise GateFailed(
            Problem(
                f"the verdict is {note['outcome']}; nothing was registered",
                file=str(note["page"]),
                allowed="every check of the policy passes",
                remedy="read the table above; change data, training or policy, then run again",
            )
        )
    print(f"\n{standing(str(note['name']), str(note['version']), str(note['page']))}")


def standing(name: str, version: str, page: str) -> str:
    """The place of a passed version between its gate and its clients, and the next commands.

    Raises ReviewError when it was deleted in MLflow.
    """
    from pipeline.deployment import state
    from pipeline.registry import versions

    approval = versions.version(name, version).approval
    head = f"{name} version {version} passed"
    if approval is None:
        verbs = ", then ".join(f"tunegate {verb} {name}" for verb in ("review", "approve", "promote"))
        return f"{head} and waits for review: {page}\n  next: {verbs}"
    if approval.decision == "rejected":
        return f"{head} and was rejected by {approval.reviewer}: {approval.reason}\n  next: tunegate review {name}"
    approved_head = f"{head} and was approved by {approval.reviewer}"
    live = state.read(name).live
    if live is None or live.release.version != version:
        return f"{approved_head}: {page}\n  next: tunegate promote {name} --version {version}"
    return f"{approved_head} and promoted: {page}\n  next: tunegate status {name}"
