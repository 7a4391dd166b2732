"""Each system served once by vLLM, scored on the holdout and load-tested: base, merged, candidate and incumbent.

An evaluation is kept by the digests of the served unit and the holdout. A load test is kept for one build only, so that
candidate and incumbent are measured side by side at every gate.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import llm_judges, lm_eval, prompts, stages
from flows.stages import OnEvent
from flows.systems import System, systems
from pipeline import program, store
from pipeline.artifacts import (
    Artifact,
    Evaluation,
    LoadTest,
    PromptResult,
    Reports,
    ServedUnit,
    Stage,
    TaskResult,
)
from pipeline.config.schema import Config
from pipeline.digests import digest_of
from pipeline.evaluation import plugins
from pipeline.plan import code
from pipeline.serving import runtimes, serve
from pipeline.serving.server import Server, ToServe

GATED = ("candidate", "incumbent")  # also load-tested, and sent the must-pass prompts
# Parts of `evaluate` that don't decide how the holdout is answered and scored.
BESIDE_SCORERS = {"compare", "prompts", "tasks", "judges", "ledger_items"}
EVALUATE = "pipeline.evaluation.evaluate"


@dataclass(frozen=True)
class Measurement:
    """All figures of one system; only systems in GATED have prompts and a load test."""

    evaluation: Evaluation
    tasks: tuple[TaskResult, ...]
    prompts: tuple[PromptResult, ...] = ()
    loadtest: LoadTest | None = None


def measure(
    config: Config,
    build_key: str,
    artifacts: Mapping[Stage, Artifact],
    unit: ServedUnit,
    show: OnEvent,
    *,
    again: bool = False,
) -> Reports:
    """Serve and measure every system that the config compares; earlier measurements are read back unless `again`."""
    attempt = uuid.uuid4().hex if again else ""
    if again:
        for folder in store.build_folder(build_key).glob("loadtest-*"):
            shutil.rmtree(folder)
    measurements: dict[str, Measurement] = {}
    for system in systems(config, artifacts, unit, show):
        measure_system = _measure.with_options(name=f"measure-{system.role}")
        measurements[system.role] = measure_system(config, build_key, dict(artifacts), system, attempt, show)
    evaluations = {role: measurement.evaluation for role, measurement in measurements.items()}
    return Reports(
        evaluations=evaluations,
        loadtests={role: entry.loadtest for role, entry in measurements.items() if entry.loadtest},
        prompts={role: entry.prompts for role, entry in measurements.items() if entry.prompts},
        tasks={role: entry.tasks for role, entry in measurements.items() if entry.tasks},
        judged=llm_judges.reports(config, evaluations, attempt, show),
    )


@task(retries=1, retry_delay_seconds=10, retry_condition_fn=stages.worth_retrying, timeout_seconds=6 * 3600,
      cache_policy=NO_CACHE, persist_result=False)  # fmt: skip
def _measure(
    config: Config,
    build_key: str,
    artifacts: dict[Stage, Artifact],
    system: System,
    attempt: str,
    show: OnEvent,
) -> Measurement:
    """Measure one system on one vLLM start; no start when everything was measured before."""
    with ExitStack() as stack:
        server = _Lazy(build_key, system, show, stack)
        evaluation = _evaluate(config, artifacts, system, attempt, server, show)
        tasks = lm_eval.task_results(config, system, attempt, server, show)
        if system.role not in GATED:
            return Measurement(evaluation, tasks)
        results = prompts.prompt_results(config, system.unit, attempt, lambda: _where(config, system, server()), show)
        return Measurement(evaluation, tasks, results, _loadtest(config, build_key, artifacts, system, server, show))


class _Lazy:
    """A server that starts at the first call."""

    def __init__(self, build_key: str, system: System, show: OnEvent, stack: ExitStack) -> None:
        self._arguments = (build_key, system, show)
        self._stack = stack
        self._server: Server | None = None

    def __call__(self) -> Server:
        """The running server."""
        if self._server is None:
            build_key, system, show = self._arguments
            config, folder = system.config, store.build_folder(build_key) / f"serve-{system.role}"
            show({"event": "stage", "stage": "serve", "state": "running", "log": system.role})
            self._stack.enter_context(stages.device_slot(show))
            environment = runtimes.environment_of(config.model_dump(mode="json"))
            to_serve = ToServe(system.unit, system.model, config.serve, config.name, folder, environment)
            self._server = self._stack.enter_context(serve.running(to_serve, show))
        return self._server


def _evaluate(
    config: Config,
    artifacts: dict[Stage, Artifact],
    system: System,
    attempt: str,
    server: Callable[[], Server],
    show: OnEvent,
) -> Evaluation:
    inputs: tuple[Stage, ...] = ("prepare", "finetune") if system.role in ("merged", "candidate") else ("prepare",)
    parents = {"unit": system.unit.digest} | {str(name): artifacts[name].digest for name in inputs}
    metrics = [scorer.metric for scorer in config.evaluate.scorers]
    scorers = plugins.versions(metrics)

    def make(folder: Path) -> stages.Origin:
        show({"event": "stage", "stage": "evaluate", "state": "running", "log": system.role})
        settings = {
            "evaluate": config.evaluate.model_dump(mode="json"),
            "gate": config.gate.model_dump(mode="json"),
            **_where(config, system, server()),
        }
        request = program.Request(settings, stages.inputs_json(artifacts, inputs), folder)
        places = plugins.places(metrics)
        detail = stages.run_program(EVALUATE, "control", config, request, show, pythonpath=places)
        return stages.Origin(parents, {"vllm": system.unit.vllm_version, **scorers}, detail)

    parts = {
        "system": system.role,
        "inputs": parents,
        "config": config.evaluate.model_dump(mode="json", exclude=BESIDE_SCORERS),
        "scorers": scorers,
        "seed": config.seed,
        "confidence": config.gate.confidence,
        "source": code.source_digest(EVALUATE),
        "attempt": attempt,
    }
    artifact = stages.kept("evaluate", digest_of(parts)[:32], make, server)
    report = Evaluation.model_validate_json((artifact.payload / "report.json").read_text(encoding="utf-8"))
    scores = ", ".join(f"{name} {score.value:.3f}" for name, score in report.metrics.items())
    show({"event": "stage", "stage": "evaluate", "state": system.role, "seconds": report.seconds})
    show({"event": "message", "text": f"{system.role}: {scores} of {len(report.items)} items, {report.errors} failed"})
    return report


def _loadtest(
    config: Config,
    build_key: str,
    artifacts: dict[Stage, Artifact],
    system: System,
    server: Callable[[], Server],
    show: OnEvent,
) -> LoadTest:
    """The build's load test of a system, whose folder lies in the build's own: no other build may read it back."""
    folder = store.build_folder(build_key) / f"loadtest-{system.role}"
    file = folder / "payload" / "report.json"
    is_finished = (folder / "result.json").is_file() and system.unit.digest in file.read_text(encoding="utf-8")
    if not is_finished:
        address = _where(config, system, server())
        show({"event": "stage", "stage": "loadtest", "state": "running", "log": system.role})
        section = config.loadtest.model_dump(mode="json")
        settings = {"loadtest": section, "model_path": str(system.model), **address}
        bench = runtimes.RUNTIMES[system.unit.runtime].loadtest
        settings |= bench.settings(system.unit.runtime_digest, system.config.serve.model_dump(mode="json"))
        request = program.Request(settings, stages.inputs_json(artifacts, ("prepare",)), folder)
        stages.run_program(bench.program, bench.environment, system.config, request, show)
    report = LoadTest.model_validate_json(file.read_text(encoding="utf-8"))
    show({"event": "stage", "stage": "loadtest", "state": system.role})
    for level in report.levels:
        speed = fmean(level.metrics["output_throughput"])
        text = f"{system.role}: {speed:.0f} output tokens/s by {level.max_concurrency} at once, {level.failed} failed"
        show({"event": "message", "text": text})
    return report


def _where(config: Config, system: System, server: Server) -> dict[str, Any]:
    """The server's part of a stage's request, and the config's seed."""
    of_system = {"system": system.role, "unit_digest": system.unit.digest, "seed": config.seed}
    return {**of_system, "url": server.url, "model": server.model}
