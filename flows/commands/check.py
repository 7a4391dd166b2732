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
from pipeline.plan import doctor as environments_doctor
from pipeline.plan import memory, plan, resolve


def check(options: argparse.Namespace) -> int:
    """Print the plan of a config.

    Raises ConfigError, DataError, ModelError or EnvironmentMissing with all that is wrong.
    """
    config = resolve.resolve(options.config, options.set, options.data_dir)
    if options.resolved:
        print(json.dumps(config, indent=2))
    show(config, options.config, look=True)
    return 0


def show(config: Mapping[str, Any], path: Path, *, look: bool = False) -> plan.Plan:
    """Print and return the plan of a resolved config, with warnings where its builds can't pass.

    `look`: data that is still to be prepared is read as far as that is quick; raises DataError with what is wrong with it.
    """
    planned = plan.make(config, resolve.sources(config), hardware.device().name)
    looked = _looked_at(config, planned) if look else None
    plan.render(planned, path, print)
    if looked:
        print(f"  data    {looked}")
    for warning in (*resolve.warnings(config, path), *_too_large(config, planned, path)):
        print(f"warning: {warning}")
    return planned


def _looked_at(config: Mapping[str, Any], planned: plan.Plan) -> str | None:
    """What a look at the data's files says; None where they were prepared as they are."""
    from pipeline.plan import data_look

    prepared = any(step.record for step in planned.steps if step.step.stage == "prepare")
    return None if prepared else data_look.look(config["data"])


def _too_large(config: Mapping[str, Any], planned: plan.Plan, path: Path) -> list[Problem]:
    """What can't fit into the memory here; nothing where a cluster's pod asks for GPUs of its own."""
    cluster = config["kubernetes"]
    if cluster and place.devices(cluster["flow"]):
        return []
    return list(memory.too_large(config, planned.memory, hardware.device(), path))


def schema(_options: argparse.Namespace) -> int:
    """Print the JSON Schema of a config file."""
    from pipeline.config.file import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Print what the machine has and lacks, for every config or for this one too; 1 when something needed is missing."""
    config = resolve.resolve(options.config) if options.config else {}
    found = environments_doctor.doctor(interpreters.settings(config), config.get("serve", {}).get("runtime", "process"))
    if config:
        from pipeline.plan import needs

        found += needs.needs(config)
    findings = {finding.name: finding for finding in found}.values()  # what the config needs wins
    for finding in findings:
        mark = "ok" if finding.ok else "missing" if finding.needed else "absent"
        print(f"{mark:<9}{finding.name:<22}{finding.detail}")
        if not finding.ok and finding.remedy:
            print(f"{'':<9}{'':<22}→ {finding.remedy}{'' if finding.needed else f'  ({finding.when})'}")
    return int(any(not finding.ok and finding.needed for finding in findings))
