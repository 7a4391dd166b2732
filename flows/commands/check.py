"""`tunegate check`, `schema` and `doctor`: answers that need no build. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import hardware
from pipeline.environments import interpreters
from pipeline.errors import Problem
from pipeline.kubernetes import place
from pipeline.plan import memory, plan, resolve


def check(options: argparse.Namespace) -> int:
    """Print the plan of a config.

    Raises ConfigError, DataError, ModelError or EnvironmentMissing with all problems.
    """
    config = resolve.resolve(options.config, options.set, options.data_dir)
    if options.resolved:
        print(json.dumps(config, indent=2))
    show(config, options.config, look=True)
    return 0


def show(config: Mapping[str, Any], path: Path, *, look: bool = False) -> plan.Plan:
    """Print and return the plan of a resolved config, with warnings where its builds can't pass.

    `look`: data that is still to be prepared is read as far as that is quick; raises DataError with its problems.
    """
    build_plan = plan.make(config, resolve.sources(config), hardware.device().name)
    data_line = _data_line(config, build_plan) if look else None
    plan.render(build_plan, path, print)
    if data_line:
        print(f"  data    {data_line}")
    for warning in (*resolve.warnings(config, path), *_too_large(config, build_plan, path)):
        print(f"warning: {warning}")
    return build_plan


def _data_line(config: Mapping[str, Any], build_plan: plan.Plan) -> str | None:
    """The summary of a look at the data's files; None where an earlier build prepared the same files."""
    from pipeline.plan import data_look

    is_prepared = any(step.record for step in build_plan.steps if step.step.stage == "prepare")
    return None if is_prepared else data_look.look(config["data"])


def _too_large(config: Mapping[str, Any], build_plan: plan.Plan, path: Path) -> list[Problem]:
    """The stages that can't fit into the memory here; none where a cluster's pod asks for GPUs of its own."""
    cluster = config["kubernetes"]
    if cluster and place.devices(cluster["flow"]):
        return []
    return list(memory.too_large(config, build_plan.memory, hardware.device(), path))


def schema(_options: argparse.Namespace) -> int:
    """Print the JSON Schema of a config file."""
    from pipeline.config.file import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Print what is there and what is missing, for every config or for this one too; 1 when a needed part is missing."""
    config = resolve.resolve(options.config) if options.config else {}
    from pipeline.plan import doctor as doctors  # here because check never asks

    reports = doctors.doctor(interpreters.settings(config), config.get("serve", {}).get("runtime", "process"))
    if config:
        from pipeline.plan import needs

        reports += needs.needs(config)
    findings = {finding.name: finding for finding in reports}.values()  # the config's own needs win
    for finding in findings:
        mark = "ok" if finding.ok else "missing" if finding.needed else "absent"
        print(f"{mark:<9}{finding.name:<22}{finding.detail}")
        if not finding.ok and finding.remedy:
            print(f"{'':<9}{'':<22}→ {finding.remedy}{'' if finding.needed else f'  ({finding.when})'}")
    return int(any(not finding.ok and finding.needed for finding in findings))
