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
from statistics import fmean
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import judges, prompts, stages
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

JUDGED = ("candidate", "incumbent")  # also load-tested and asked the must-pass prompts


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
            to_serve = ToServe(
                system.unit, system.model, settings.serve, settings.name, store.build_folder(build_key) / f"serve-{system.role}",
                runtimes.environment_of(system.config),
            )  # fmt: skip
            self._server = self._stack.enter_context(serve.running(to_serve, show))
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
    scorers = plugins.versions(metrics)
    key = digest_of(
        {
            "system": system.role,
            "inputs": parents,
            "config": {name: value for name, value in config["evaluate"].items() if name not in judges.BESIDE_SCORERS},
            "scorers": scorers,
            "seed": config["seed"],
            "confidence": config["gate"]["confidence"],
            "source": code.source_digest("pipeline.evaluation.evaluate"),
            "attempt": attempt,
        }
    )[:32]
    if store.find("evaluate", key) is None:
        running = server()
        with store.making("evaluate", key) as partial:
            show({"event": "stage", "stage": "evaluate", "state": "running", "log": system.role})
            settings = {"evaluate": config["evaluate"], "gate": config["gate"], **_where(config, system, running)}
            request = program.Request(settings, stages.inputs_json(artifacts, needed), partial)
            places = plugins.places(metrics)
            detail = stages.run_program(
                "pipeline.evaluation.evaluate", "control", config, request, show, pythonpath=places
            )
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
        bench = runtimes.RUNTIMES[system.unit.runtime].loadtest
        settings |= bench.settings(system.unit.runtime_digest, system.config["serve"])
        request = program.Request(settings, stages.inputs_json(artifacts, ("prepare",)), folder)
        stages.run_program(bench.program, bench.environment, system.config, request, show)
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
