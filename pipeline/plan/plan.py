"""What a build will do and what of it is already done, decided from digests alone.

A stage's key is the digest of its inputs, its sections of the config, its own source and the versions of the packages that
decide its result. Works on the resolved config as JSON and on the standard library, so that `tunegate check` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import hardware, store
from pipeline.digests import digest_of
from pipeline.environments import interpreters
from pipeline.errors import ConfigError
from pipeline.evaluation import plugins
from pipeline.intervals.sample_size import DIFFERING, items_for_margin
from pipeline.kubernetes import place
from pipeline.plan import memory as plan_memory
from pipeline.plan.code import source_digest
from pipeline.plan.steps import Step, all_steps, section

# Sections that decide nothing about what is judged: a finished build takes them over as they are changed.
NOT_JUDGED = ("promote", "notify", "schedule", "environments", "kubernetes")


@dataclass(frozen=True)
class PlannedStep:
    """A step with its key, when its inputs are known, and the record of its finished artefact, when there is one."""

    step: Step
    key: str | None
    record: Mapping[str, Any] | None


@dataclass(frozen=True)
class Plan:
    """A build before it runs: `key` is the digest of all it depends on, `finished` the record of the same build done before."""

    name: str
    key: str
    steps: tuple[PlannedStep, ...]
    finished: Mapping[str, Any] | None
    memory: Mapping[str, int] = field(default_factory=dict)
    here: int = 0  # bytes of memory on this machine, or of one of its GPUs
    sizes: tuple[str, ...] = ()
    judges: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str | None]:
        """The digest of each artefact of the model's making that is there already, by stage; None for one still to be made."""
        made = (planned for planned in self.steps if planned.step.stage != "ledger")
        return {planned.step.stage: planned.record["digest"] if planned.record else None for planned in made}


JUDGES_PACKAGES = ("lm-eval", "transformers")
JUDGE_PROGRAMS = {"tasks": "pipeline.evaluation.lm_eval_tasks", "judge": "pipeline.evaluation.llm_judge"}


def versions(step: Step, config: Mapping[str, Any]) -> dict[str, str]:
    """The installed versions of the step's deciding packages.

    Raises EnvironmentMissing when the step's environment isn't there.
    """
    return interpreters.versions(interpreters.find(step.environment, interpreters.settings(config)), step.packages)


def key_of(step: Step, config: Mapping[str, Any], inputs: Mapping[str, str], made_by: Mapping[str, str]) -> str:
    """The key under which the step's artefact is stored; `inputs` are the digests of what it takes, by name."""
    return digest_of(
        {
            "stage": step.stage,
            "inputs": dict(inputs),
            "config": {name: section(config, name) for name in step.sections},
            "source": source_digest(step.program),
            "made_by": dict(made_by),
        }
    )[:32]


def make(config: Mapping[str, Any], sources: Mapping[str, str], device: str) -> Plan:
    """The plan of a resolved config.

    `sources` are the digests of what comes from outside, the base model's under "base" and the data files' under "prepare";
    `device` is the class of device, which decides how a model is trained.

    Raises EnvironmentMissing without a stage's environment, ConfigError where the base model can't be served as it says.
    """
    planned: list[PlannedStep] = []
    digests: dict[str, str] = {}
    made_by: dict[str, dict[str, str]] = {}
    for step in all_steps(config):
        made_by[step.stage] = versions(step, config)
        if all(name in digests for name in step.inputs):
            there = place.device_of(config, step.stage, device)
            key = key_of(step, config, inputs_of(step, digests, sources, there), made_by[step.stage])
            record = store.peek(step.stage, key)
        else:
            key, record = None, None
        if record:
            digests[step.stage] = record["digest"]
        planned.append(PlannedStep(step, key, record))
    plan_memory.raise_for_too_long(config, planned[0].record)
    build = digest_of(
        {
            "config": {name: value for name, value in config.items() if name not in NOT_JUDGED},
            "sources": dict(sources),
            "device": device,
            "code": {name: source_digest(name) for name in _programs(config)},
            "made_by": made_by | _judged_by(config),
            "served_by": served_by(config),
        }
    )[:32]
    finished = store.peek_build(build)
    base, here = planned[0].record, hardware.device()
    return Plan(
        config["name"],
        build,
        tuple(planned),
        finished,
        plan_memory.estimates(config, base, here),
        here.memory,
        tuple(sizes(config, planned)),
        judges(config),
    )


def raise_for_too_few_gpus(config: Mapping[str, Any]) -> None:
    """Raise ConfigError when vLLM is to serve on more GPUs than are visible to this process, which is to build."""
    here, wanted = hardware.device(), config["serve"]["tensor_parallel_size"]
    if here.kind == "cuda" and wanted > here.count:
        raise ConfigError(
            f"{wanted} GPUs are asked for, and {here.count} {'is' if here.count == 1 else 'are'} visible here",
            key="serve.tensor_parallel_size",
            allowed=f"1 to {here.count}",
            remedy="lower it, or let CUDA_VISIBLE_DEVICES name more GPUs",
        )


def judges(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What judges beside the scorers, by program: lm-eval's tasks, and LLM judges with what they compare against."""
    asked = config["evaluate"]
    found = {
        "tasks": tuple(Path(entry["task"]).name for entry in asked["tasks"]),
        "judge": tuple(f"{entry['model']} against {entry['against']}" for entry in asked["judges"]),
    }
    return {program: names for program, names in found.items() if names}


def _judged_by(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The versions of what judges beside our own scorers; raises EnvironmentMissing or ConfigError for what isn't installed."""
    found = {"scorers": plugins.versions([scorer["metric"] for scorer in config["evaluate"]["scorers"]])}
    if config["evaluate"]["tasks"]:
        judges_environment = interpreters.find("judges", interpreters.settings(config))
        found["tasks"] = interpreters.versions(judges_environment, JUDGES_PACKAGES)
    return found


def served_by(config: Mapping[str, Any]) -> dict[str, str]:
    """What decides the served unit beside weights and settings: the packages that serve (an image is in the settings)."""
    found = {"command": source_digest("pipeline.serving.command")}
    if config["serve"]["runtime"] == "process":
        environment = interpreters.find("serve", interpreters.settings(config))
        found["packages"] = digest_of(interpreters.installed(environment))
    return found


def inputs_of(step: Step, digests: Mapping[str, str], sources: Mapping[str, str], device: str) -> dict[str, str]:
    """The digests that go into a step's key: of its input artefacts, of what it reads from outside, and the device for training."""
    inputs = {name: digests[name] for name in step.inputs}
    if step.stage in sources:
        inputs["source"] = sources[step.stage]
    if step.stage in ("finetune", "quantize", "ledger"):
        inputs["device"] = digest_of(device)
    return inputs


def _programs(config: Mapping[str, Any]) -> list[str]:
    """The dotted names of everything that decides a build's outcome."""
    asked = ["pipeline.evaluation.prompts"] if config["evaluate"]["prompts"] else []
    return [
        *(step.program for step in all_steps(config)),
        "pipeline.evaluation.evaluate",
        *asked,
        *(JUDGE_PROGRAMS[stage] for stage in judges(config)),
        "pipeline.evaluation.loadtest",
        "pipeline.gate.gate",
        "pipeline.ledger.scores",
    ]


def sizes(config: Mapping[str, Any], planned: Sequence[PlannedStep]) -> Iterator[str]:
    """What each comparison with a margin needs to be decided, against what there is, once the holdout is known."""
    gate, prepared = config["gate"], next(step.record for step in planned if step.step.stage == "prepare")
    held = prepared["detail"]["rows"]["holdout"] if prepared else None
    there = min(value for value in (held, config["evaluate"]["max_items"], math.inf) if value is not None)
    compared = [check for check in gate["metrics"] if check["against"] and check["margin"] > 0 and check["required"]]
    for check in compared:
        needed = items_for_margin(check["margin"], DIFFERING, gate["confidence"], comparisons=len(compared))
        few = f"; there are {there}" if there < needed else ""
        grouped = f", more where items of one {gate['cluster_by']} are alike" if gate["cluster_by"] else ""
        yield (
            f"{check['metric']} vs {check['against']} within {check['margin']:g}: about {needed}"
            f" if {DIFFERING:.0%} of the answers differ{grouped}{few}"
        )


def render(plan: Plan, path: Path, write: Callable[[str], None]) -> None:
    """Print the plan as a person reads it, a line a stage."""
    state = f"done: {plan.finished['outcome']}" if plan.finished else "to do"
    write(f"{plan.name}  build {plan.key[:12]}  {state}  ({path})")
    write(f"  {'stage':<10}{'environment':<15}{'state':<22}key")
    first = next((planned.step.stage for planned in plan.steps if planned.record is None), "")

    def show(planned: PlannedStep) -> None:
        what = "cached" if planned.record else "to do" if planned.key else f"to do, after {first}"
        write(f"  {planned.step.stage:<10}{planned.step.environment:<15}{what:<22}{(planned.key or '-')[:12]}")

    done = "recorded" if plan.finished else "to do"
    made = [planned for planned in plan.steps if planned.step.stage != "ledger"]
    for planned in made:
        show(planned)
    for stage, environment in (
        ("evaluate", "control+serve"),
        ("tasks", "judges+serve"),
        ("judge", "control"),
        ("loadtest", "control+serve"),
        ("gate", "control"),
    ):
        if stage not in ("tasks", "judge"):
            write(f"  {stage:<10}{environment:<15}{done}")
        elif stage in plan.judges:
            write(f"  {stage:<10}{environment:<15}{done:<22}{', '.join(plan.judges[stage])}")
    for planned in plan.steps[len(made) :]:
        show(planned)
    write(f"  {'register':<10}{'control':<15}{done}")
    here = f" of {plan_memory.gib(plan.here)} here" if plan.here else ""
    for what, size in plan.memory.items():
        write(f"  memory  {what}: about {plan_memory.gib(size)}{here}")
    for line in plan.sizes:
        write(f"  items   {line}")
    if not plan.memory:
        write("  memory  known once the base model's shape is (after the stage base)")
