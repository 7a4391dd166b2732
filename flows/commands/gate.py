"""`tunegate gate`: a finished build's stored reports judged again, by its own policy or another. Nothing is run or changed."""

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

    Raises ReviewError when there is no such build, ConfigError for a policy file with mistakes, GateFailed when the
    reports lack what the policy asks for.
    """
    finished = _chosen(options.name, options.build)
    made = tables.read_build(str(finished["build_key"]))
    policy = file.load_policy(options.policy) if options.policy else Config.model_validate(made.config).gate
    verdict = gate.verdict_of(made.reports, policy, made.unit.digest)
    if options.json:
        print(verdict.model_dump_json(indent=1))
    else:
        by = f"by {options.policy}" if options.policy else "by its own policy"
        print(f"{made.name}, build {made.key[:12]} of {finished['at']}, judged {by}; it was {finished['outcome']}")
        tables.print_verdict(verdict)
        print(
            "nothing was run or changed; for a verdict that counts, put the policy into the config: tunegate run CONFIG"
        )
    return 0 if verdict.outcome == "pass" else GateFailed.exit_code


def _chosen(name: str | None, key: str | None) -> Mapping[str, Any]:
    """The newest finished build of that name, or the one whose key begins so."""
    builds = store.finished_builds(name)
    found = [build for build in builds if str(build["build_key"]).startswith(key or "")]
    if not found or (name is None and key is None and len({build["name"] for build in builds}) > 1):
        known = [f"{build['name']} --build {str(build['build_key'])[:12]}" for build in store.finished_builds()]
        raise ReviewError(
            "several models were built here" if found else "no such finished build",
            key=" ".join(filter(None, (name, key))) or None,
            allowed=", ".join(known[:10]) or None,
            remedy="name one of them: tunegate gate NAME" if known else "tunegate run CONFIG",
        )
    return found[0]
