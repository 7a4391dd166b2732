"""`tunegate gate`: the verdict on a finished build's stored reports, by its own policy or another. Nothing is run or changed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from flows.commands import tables
from pipeline import store
from pipeline.config import file
from pipeline.config.schema import Config
from pipeline.errors import GateFailed, ReviewError
from pipeline.gate import gate


def gate_again(options: argparse.Namespace) -> int:
    """Print the verdict on a build's reports; the exit code is a gate's own: 0 for a pass, else 4.

    Raises ReviewError when no build fits, ConfigError for a policy file with mistakes, GateFailed when the reports
    lack a part that the policy needs.
    """
    note = _finished_build(options.name, options.build)
    build = tables.read_build(str(note["build_key"]))
    policy = file.load_policy(options.policy) if options.policy else Config.model_validate(build.config).gate
    verdict = gate.verdict_of(build.reports, policy, build.unit.digest)
    if options.json:
        print(verdict.model_dump_json(indent=1))
    else:
        by = f"by {options.policy}" if options.policy else "by its own policy"
        print(f"{build.name}, build {build.key[:12]} of {note['at']}, decided {by}; it was {note['outcome']}")
        tables.print_verdict(verdict)
        print(
            "nothing was run or changed; for a verdict that counts, put the policy into the config: tunegate run CONFIG"
        )
    return 0 if verdict.outcome == "pass" else GateFailed.exit_code


def _finished_build(name: str | None, key: str | None) -> Mapping[str, Any]:
    """The newest finished build of that name, or the one whose key begins so; raises ReviewError."""
    builds = store.finished_builds(name)
    matches = [build for build in builds if str(build["build_key"]).startswith(key or "")]
    if not matches or (name is None and key is None and len({build["name"] for build in builds}) > 1):
        choices = [f"{build['name']} --build {str(build['build_key'])[:12]}" for build in store.finished_builds()]
        raise ReviewError(
            "several models were built here" if matches else "no finished build fits",
            key=" ".join(filter(None, (name, key))) or None,
            allowed=", ".join(choices[:10]) or None,
            remedy="name one of them: tunegate gate NAME" if choices else "tunegate run CONFIG",
        )
    return matches[0]
