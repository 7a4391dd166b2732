"""The plan of a build: which stages are done and which are to do, decided from digests alone.

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
from pipeline.serving import runtimes

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
        of_model = (step for step in self.steps if step.step.stage != "ledger")
        return {step.step.stage: step.record["digest"] if step.record else None for step in of_model}


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
            "source": [source_digest(program) for program in (step.program, *step.parts)],
            "made_by": dict(made_by),
        }
    )[:32]


def make(config: Mapping[str, Any], sources: Mapping[str, str], device: str) -> Plan:
    """The plan of a resolved config.

    `sources` are digests from outside: the base model's under "base", the data files' under "prepare". `device` is the class
    of device, which decides how a model is trained.

    Raises EnvironmentMissing without a stage's environment, ConfigError where the base model can't be served as it says.
    """
    plan_steps: list[PlannedStep] = []
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
        plan_steps.append(PlannedStep(step, key, record))
    plan_memory.raise_for_too_long(config, plan_steps[0].record)
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
    base, here = plan_steps[0].record, hardware.device()
    return Plan(
        config["name"],
        build,
        tuple(plan_steps),
        finished,
        plan_memory.estimates(config, base, here),
        here.memory,
        tuple(sizes(config, plan_steps)),
        judges(config),
    )


def raise_for_too_few_gpus(config: Mapping[str, Any]) -> None:
    """Raise ConfigError when vLLM is to serve on more GPUs than are visible to this process, which is to build."""
    here, gpus = hardware.device(), config["serve"]["tensor_parallel_size"]
    if here.kind == "cuda" and gpus > here.count:
        raise ConfigError(
            f"{gpus} GPUs are asked for, and {here.count} {'is' if here.count == 1 else 'are'} visible here",
            key="serve.tensor_parallel_size",
            allowed=f"1 to {here.count}",
            remedy="lower it, or let CUDA_VISIBLE_DEVICES name more GPUs",
        )


def judges(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """lm-eval's tasks and LLM judges, each with its opponent, by stage."""
    section = config["evaluate"]
    names_by_stage = {
        "tasks": tuple(Path(entry["task"]).name for entry in section["tasks"]),
        "judge": tuple(f"{entry['model']} against {entry['against']}" for entry in section["judges"]),
    }
    return {program: names for program, names in names_by_stage.items() if names}


def _judged_by(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The versions of what judges beside our own scorers; raises EnvironmentMissing or ConfigError for what isn't installed."""
    packages = {"scorers": plugins.versions([scorer["metric"] for scorer in config["evaluate"]["scorers"]])}
    if config["evaluate"]["tasks"]:
        judges_environment = interpreters.find("judges", interpreters.settings(config))
        packages["tasks"] = interpreters.versions(judges_environment, JUDGES_PACKAGES)
    return packages


def served_by(config: Mapping[str, Any]) -> dict[str, str]:
    """Digests that decide the served unit beside weights and settings: the packages that serve (an image is in the settings)."""
    digests = {"command": source_digest("pipeline.serving.command")}
    if environment := runtimes.environment_of(config):
        digests["packages"] = digest_of(interpreters.installed(environment))
    return digests


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
    prompts = ["pipeline.evaluation.prompts"] if config["evaluate"]["prompts"] else []
    return [
        *(program for step in all_steps(config) for program in (step.program, *step.parts)),
        "pipeline.evaluation.evaluate",
        *prompts,
        *(JUDGE_PROGRAMS[stage] for stage in judges(config)),
        "pipeline.evaluation.loadtest",
        "pipeline.gate.gate",
        "pipeline.ledger.scores",
    ]


def sizes(config: Mapping[str, Any], plan_steps: Sequence[PlannedStep]) -> Iterator[str]:
    """The items that each comparison with a margin needs, and how many there are once the holdout is known."""
    gate, record = config["gate"], next(step.record for step in plan_steps if step.step.stage == "prepare")
    holdout = record["detail"]["rows"]["holdout"] if record else None
    there = min(value for value in (holdout, config["evaluate"]["max_items"], math.inf) if value is not None)
    comparisons = [check for check in gate["metrics"] if check["against"] and check["margin"] > 0 and check["required"]]
    for check in comparisons:
        items = items_for_margin(check["margin"], DIFFERING, gate["confidence"], comparisons=len(comparisons))
        few = f"; there are {there}" if there < items else ""
        clusters = f", more where items of one {gate['cluster_by']} are alike" if gate["cluster_by"] else ""
        yield (
            f"{check['metric']} vs {check['against']} within {check['margin']:g}: about {items}"
            f" if {DIFFERING:.0%} of the answers differ{clusters}{few}"
        )


def render(plan: Plan, path: Path, write: Callable[[str], None]) -> None:
    """Print the plan as a person reads it, a line a stage."""
    state = f"done: {plan.finished['outcome']}" if plan.finished else "to do"
    write(f"{plan.name}  build {plan.key[:12]}  {state}  ({path})")
    write(f"  {'stage':<10}{'environment':<15}{'state':<22}key")
    first = next((entry.step.stage for entry in plan.steps if entry.record is None), "")

    def show(entry: PlannedStep) -> None:
        user = "cached" if entry.record else "to do" if entry.key else f"to do, after {first}"
        write(f"  {entry.step.stage:<10}{entry.step.environment:<15}{user:<22}{(entry.key or '-')[:12]}")

    outcome = "recorded" if plan.finished else "to do"
    of_model = [entry for entry in plan.steps if entry.step.stage != "ledger"]
    for entry in of_model:
        show(entry)
    for stage, environment in (
        ("evaluate", "control+serve"),
        ("tasks", "judges+serve"),
        ("judge", "control"),
        ("loadtest", "control+serve"),
        ("gate", "control"),
    ):
        if stage not in ("tasks", "judge"):
            write(f"  {stage:<10}{environment:<15}{outcome}")
        elif stage in plan.judges:
            write(f"  {stage:<10}{environment:<15}{outcome:<22}{', '.join(plan.judges[stage])}")
    for entry in plan.steps[len(of_model) :]:
        show(entry)
    write(f"  {'register':<10}{'control':<15}{outcome}")
    here = f" of {plan_memory.gib(plan.here)} here" if plan.here else ""
    for user, size in plan.memory.items():
        write(f"  memory  {user}: about {plan_memory.gib(size)}{here}")
    for line in plan.sizes:
        write(f"  items   {line}")
    if not plan.memory:
        write("  memory  known once the base model's shape is (after the stage base)")
