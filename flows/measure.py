"""Each system served once by vLLM, scored on the holdout and load-tested: base, merged, candidate and incumbent.

An evaluation is kept by the digests of the served unit and the holdout. Load tests are kept for one build only, so that
candidate and incumbent are measured side by side at every gate. The incumbent is served as it was judged; where that can't be
any more, because vLLM or the machine is another by now, it is measured as it would be served today.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import judges, prompts, stages
from flows.stages import OnEvent
from pipeline import environments, plan, program, registry, scoring_plugins, serving, store
from pipeline.artifacts import (
    Artifact,
    Evaluation,
    LoadTest,
    PromptResult,
    Release,
    Reports,
    ServedUnit,
    Stage,
    TaskResult,
)
from pipeline.config import Config
from pipeline.digests import digest_of
from pipeline.errors import EnvironmentMissing, Problem, RegistryError, ServingError
from pipeline.serving_server import Server

JUDGED = ("candidate", "incumbent")  # also load-tested and asked the must-pass prompts


@dataclass(frozen=True)
class System:
    """A model folder in a role, and the config that it is served with: the incumbent keeps the one it was judged with."""

    role: str
    model: Path
    unit: ServedUnit
    config: Mapping[str, Any]


def measure(
    config: Mapping[str, Any],
    build_key: str,
    artifacts: Mapping[Stage, Artifact],
    unit: ServedUnit,
    show: OnEvent,
    *,
    again: bool = False,
) -> Reports:
    """Serve and measure every system that the config compares; what was measured before is read back unless `again`."""
    evaluations: dict[str, Evaluation] = {}
    loadtests: dict[str, LoadTest] = {}
    asked: dict[str, tuple[PromptResult, ...]] = {}
    tasks: dict[str, tuple[TaskResult, ...]] = {}
    attempt = uuid.uuid4().hex if again else ""
    if again:
        for folder in store.build_folder(build_key).glob("loadtest-*"):
            shutil.rmtree(folder)
    for system in systems(config, artifacts, unit, show):
        named = _measure.with_options(name=f"measure-{system.role}")
        evaluation, loadtest = named(dict(config), build_key, dict(artifacts), system, attempt, show)
        evaluations[system.role] = evaluation
        if loadtest:
            loadtests[system.role] = loadtest
        if system.role in JUDGED:
            asked[system.role] = prompts.results(config, system.unit, attempt)
        tasks |= judges.task_results(config, system, attempt)
    return Reports(
        evaluations=evaluations,
        loadtests=loadtests,
        prompts={role: results for role, results in asked.items() if results},
        tasks=tasks,
        judged=judges.judged(config, evaluations, attempt, show),
    )


def systems(
    config: Mapping[str, Any], artifacts: Mapping[Stage, Artifact], unit: ServedUnit, show: OnEvent
) -> list[System]:
    """The systems to measure, in order; merged is left out where it is itself the candidate."""
    settings = Config.model_validate(config)
    environment = environments.serving(config)
    found = []
    for role in settings.evaluate.compare:
        model = artifacts["base" if role == "base" else "merge"].payload
        other = serving.served_unit(model, settings.serve, settings.name, environment)
        if other.digest != unit.digest:
            found.append(System(role, model, other, config))
    candidate = artifacts["quantize" if "quantize" in artifacts else "merge"].payload
    found.append(System("candidate", candidate, unit, config))
    champion = registry.champion(settings.name)
    if champion and champion.unit.digest != unit.digest:
        found.append(_incumbent(champion, settings, config, show))
    return found


def _incumbent(champion: Release, settings: Config, config: Mapping[str, Any], show: OnEvent) -> System:
    """The champion with the settings it was judged with, or with today's where those can't be had here."""
    judged_with = registry.config_of(champion.run_id)
    for serve, whole in ((judged_with.serve, judged_with.model_dump(mode="json")), (settings.serve, config)):
        try:
            environment = environments.serving(whole)
            unit = serving.served_unit(champion.model_path, serve, settings.name, environment)
        except (EnvironmentMissing, ServingError) as error:
            why = str(error.problems[0].what)
            continue
        _must_be_the_champion(champion, unit)
        if unit.digest != champion.unit.digest:
            fields = [name for name in ServedUnit.model_fields if getattr(unit, name) != getattr(champion.unit, name)]
            text = (
                f"v{champion.version} can't be served as it was judged; it is measured with today's {', '.join(fields)}"
            )
            show({"event": "message", "text": text})
        return System("incumbent", champion.model_path, unit, whole)
    raise ServingError(f"v{champion.version}, the champion, can't be served here: {why}", key="serve")


def _must_be_the_champion(champion: Release, unit: ServedUnit) -> None:
    """Raise RegistryError when the champion's folder isn't what was approved: a candidate would be held against something else."""
    changed = [
        Problem(
            f"is {getattr(unit, part)[:12]}",
            file=str(champion.model_path),
            key=f"unit.{part}",
            allowed=f"{getattr(champion.unit, part)[:12]}, as v{champion.version} was approved",
            remedy=f"restore the folder, or give the alias champion of {champion.name} to another version",
        )
        for part in ("weights", "tokenizer", "configuration")
        if getattr(unit, part) != getattr(champion.unit, part)
    ]
    if changed:
        raise RegistryError(changed)


@task(retries=1, retry_delay_seconds=10, retry_condition_fn=stages.worth_retrying, timeout_seconds=6 * 3600,
      cache_policy=NO_CACHE, persist_result=False)  # fmt: skip
def _measure(
    config: dict[str, Any],
    build_key: str,
    artifacts: dict[Stage, Artifact],
    system: System,
    attempt: str,
    show: OnEvent,
) -> tuple[Evaluation, LoadTest | None]:
    """Evaluate and load-test one system on one vLLM start; no start when both are there already."""
    with ExitStack() as stack:
        server = _Lazy(build_key, system, show, stack)
        evaluation = _evaluate(config, artifacts, system, attempt, server, show)
        judges.run_tasks(config, system, attempt, server, show)
        loadtest = None
        if system.role in JUDGED:
            prompts.ask(config, system.unit, attempt, lambda: _where(config, system, server()), show)
            loadtest = _loadtest(config, build_key, artifacts, system, server, show)
    return evaluation, loadtest


class _Lazy:
    """A server that starts when it is first asked for."""

    def __init__(self, build_key: str, system: System, show: OnEvent, stack: ExitStack) -> None:
        self._arguments = (build_key, system, show)
        self._stack = stack
        self._server: Server | None = None

    def __call__(self) -> Server:
        """The running server."""
        if self._server is None:
            build_key, system, show = self._arguments
            settings = Config.model_validate(system.config)
            show({"event": "stage", "stage": "serve", "state": "running", "log": system.role})
            self._stack.enter_context(stages.device_slot(show))
            self._server = self._stack.enter_context(
                serving.running(
                    system.unit, system.model, settings.serve, settings.name, store.build_folder(build_key) / f"serve-{system.role}",
                    environments.serving(system.config), show,
                )
            )  # fmt: skip
        return self._server


def _evaluate(
    config: dict[str, Any],
    artifacts: dict[Stage, Artifact],
    system: System,
    attempt: str,
    server: _Lazy,
    show: OnEvent,
) -> Evaluation:
    trained = system.role in ("merged", "candidate")
    needed: tuple[str, ...] = ("prepare", "finetune") if trained else ("prepare",)
    inputs = {name: artifacts[name] for name in needed}  # type: ignore[index]
    parents = {"unit": system.unit.digest, **{name: artifact.digest for name, artifact in inputs.items()}}
    metrics = [scorer["metric"] for scorer in config["evaluate"]["scorers"]]
    scorers = scoring_plugins.versions(metrics)
    key = digest_of(
        {
            "system": system.role,
            "inputs": parents,
            "config": {name: value for name, value in config["evaluate"].items() if name not in judges.BESIDE_SCORERS},
            "scorers": scorers,
            "seed": config["seed"],
            "confidence": config["gate"]["confidence"],
            "source": plan.source_digest("evaluate"),
            "attempt": attempt,
        }
    )[:32]
    if store.find("evaluate", key) is None:
        running = server()
        with store.making("evaluate", key) as partial:
            show({"event": "stage", "stage": "evaluate", "state": "running", "log": system.role})
            settings = {"evaluate": config["evaluate"], "gate": config["gate"], **_where(config, system, running)}
            request = program.Request(settings, stages.inputs_json(artifacts, needed), partial)
            places = scoring_plugins.places(metrics)
            detail = stages.run_program("evaluate", "control", config, request, show, pythonpath=places)
            made_by = {"vllm": system.unit.vllm_version, **scorers}
            store.finish("evaluate", key, partial, parents=parents, made_by=made_by, detail=detail)
    found = store.find("evaluate", key)
    assert found is not None  # noqa: S101 - finished above
    report = Evaluation.model_validate_json((found.payload / "report.json").read_text(encoding="utf-8"))
    scores = ", ".join(f"{name} {score.value:.3f}" for name, score in report.metrics.items())
    show({"event": "stage", "stage": "evaluate", "state": system.role, "seconds": report.seconds})
    show({"event": "message", "text": f"{system.role}: {scores} of {len(report.items)} items, {report.errors} failed"})
    return report


def _loadtest(
    config: dict[str, Any],
    build_key: str,
    artifacts: dict[Stage, Artifact],
    system: System,
    server: _Lazy,
    show: OnEvent,
) -> LoadTest:
    folder = store.build_folder(build_key) / f"loadtest-{system.role}"
    file = folder / "payload" / "report.json"
    done = folder / "result.json"
    if not (done.is_file() and system.unit.digest in file.read_text(encoding="utf-8")):
        running = server()
        show({"event": "stage", "stage": "loadtest", "state": "running", "log": system.role})
        settings = {"loadtest": config["loadtest"], "model_path": str(system.model), **_where(config, system, running)}
        module, environment = "loadtest", "serve"
        if system.unit.runtime == "docker":  # vLLM's bench is in the image
            module, environment = "loadtest_container", "control"
            settings |= {"image": system.unit.runtime_digest, "container": system.config["serve"]["container"]}
        request = program.Request(settings, stages.inputs_json(artifacts, ("prepare",)), folder)
        stages.run_program(module, environment, system.config, request, show)
    report = LoadTest.model_validate_json(file.read_text(encoding="utf-8"))
    show({"event": "stage", "stage": "loadtest", "state": system.role})
    for level in report.levels:
        speed = fmean(level.metrics["output_throughput"])
        text = f"{system.role}: {speed:.0f} output tokens/s by {level.max_concurrency} at once, {level.failed} failed"
        show({"event": "message", "text": text})
    return report


def _where(config: Mapping[str, Any], system: System, server: Server) -> dict[str, Any]:
    """What both stage programs are told of the server, and the config's seed."""
    of_system = {"system": system.role, "unit_digest": system.unit.digest, "seed": config["seed"]}
    return {**of_system, "url": server.url, "model": server.model}
