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
    planned = check.show(config, options.config, look=options.dry_run)
    if options.dry_run:
        return 0
    finished = planned.finished
    if finished is None or options.again:
        finished = build_here(config, again=options.again)
    else:
        _take_over(finished, config)
        print("nothing that is judged changed since; this is what that build found (--again measures anew)")
    report(finished)
    return 0


def _take_over(finished: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Let a version that may be promoted have the sections that nobody judged as the config has them now, and say so."""
    from pipeline.registry import runs

    changed = runs.take_over(finished, config)
    if changed:
        again = f"tunegate promote {finished['name']} --version {finished['version']}"
        print(f"taken over from the config, for the next promotion ({again}): {', '.join(changed)}")


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


def report(finished: Mapping[str, Any]) -> None:
    """Print what a build came to and what comes next; raises GateFailed unless it passed."""
    from flows.commands.tables import print_build

    print_build(str(finished["build_key"]))
    if finished["outcome"] != "pass":
        raise GateFailed(
            Problem(
                f"the verdict is {finished['outcome']}; nothing was registered",
                file=str(finished["page"]),
                allowed="every check of the policy passes",
                remedy="read the table above; change data, training or policy, then run again",
            )
        )
    print(f"\n{standing(str(finished['name']), str(finished['version']), str(finished['page']))}")


def standing(name: str, version: str, page: str) -> str:
    """Where a passed version stands between its gate and its clients, and the next commands.

    Raises ReviewError when it was deleted in MLflow.
    """
    from pipeline.deployment import state
    from pipeline.registry import versions

    made = versions.version(name, version).approval
    passed = f"{name} version {version} passed"
    if made is None:
        verbs = ", then ".join(f"tunegate {verb} {name}" for verb in ("review", "approve", "promote"))
        return f"{passed} and waits for review: {page}\n  next: {verbs}"
    if made.decision == "rejected":
        return f"{passed} and was rejected by {made.reviewer}: {made.reason}\n  next: tunegate review {name}"
    approved = f"{passed} and was approved by {made.reviewer}"
    live = state.read(name).live
    if live is None or live.release.version != version:
        return f"{approved}: {page}\n  next: tunegate promote {name} --version {version}"
    return f"{approved} and promoted: {page}\n  next: tunegate status {name}"
