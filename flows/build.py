"""The build: base → prepare → finetune → merge → quantize → evaluate → loadtest → gate → ledger → register, top to bottom.

`build` is the Prefect flow. What it makes is cached by digest, so running it again does only what is missing; what it
measured and decided lies in mlruns/work/build/KEY/ and in the build's MLflow run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import curves, judges, progress, stages
from flows.ledger import ledger_of
from flows.measure import measure
from flows.stages import OnEvent
from pipeline import files, hardware, store
from pipeline.artifacts import Artifact, Build, Reports, ServedUnit, Stage, Verdict
from pipeline.config.schema import Config
from pipeline.errors import Busy, RegistryError
from pipeline.gate import gate
from pipeline.plan import plan, resolve, steps
from pipeline.registry import client, notify, runs, versions
from pipeline.report import render
from pipeline.serving import runtimes, serve


@flow(name="build", persist_result=False)
def build(config: str = "configs/demo.yaml", data_dir: str | None = None, overrides: list[str] | None = None,
          again: bool = False) -> dict[str, Any]:  # fmt: skip
    """Take a config file to a verdict, and to a registered model version when that is a pass.

    Returns what `finished.json` holds: outcome, run_id, version (or null), unit digest, page, time.
    Raises the TunegateError of the stage that failed; what was finished before it stays.
    """
    resolved = resolve.resolve(Path(config), overrides or [], Path(data_dir) if data_dir else None)
    return run(resolved, progress.logged(get_run_logger()), again=again)


def run(config: Mapping[str, Any], on_event: OnEvent, *, again: bool = False) -> dict[str, Any]:
    """The build itself, with its events shown by the caller. Must be called inside a Prefect flow."""
    sources = resolve.sources(config)
    planned = plan.make(config, sources, hardware.device().name)
    if planned.finished and not again:
        runs.take_over(planned.finished, config)
        return dict(planned.finished)
    plan.raise_for_too_few_gpus(config)
    with _turn(planned, on_event), store.running(planned.name):
        if client.is_new():
            on_event({"event": "message", "text": "MLflow makes its database, once; some seconds"})
        run_id = runs.open_run(planned.name, planned.key, config, planned.digests)
        show = curves.tee(on_event, run_id)
        lines: list[str] = []
        plan.render(planned, Path(planned.name), lines.append)
        create_markdown_artifact(
            "```\n" + "\n".join(lines) + "\n```", key="plan", description=f"Plan of {planned.name}"
        )
        try:
            artifacts, unit = _make(config, sources, run_id, show)
            run_id = runs.run_of_unit(run_id, planned.name, planned.key, config, unit.digest)
            for artifact in artifacts.values():
                runs.log_artifact(run_id, artifact)
            show = curves.tee(on_event, run_id)
            finished = _judged(config, planned, sources, artifacts, unit, run_id, show, again=again)
        except BaseException as error:
            with suppress(RegistryError):  # what went wrong first is what the user must read
                runs.close_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        runs.close_run(run_id, "FINISHED")
    return finished


@contextmanager
def _turn(planned: plan.Plan, on_event: OnEvent) -> Iterator[None]:
    """Hold the build's lock; one that another process holds is waited for, and told at once."""
    name = f"build/{planned.key}"
    with ExitStack() as held:
        try:
            held.enter_context(store.lock(name, wait=False))
        except Busy:
            on_event({"event": "message", "text": _waits_for(planned.name)})
            held.enter_context(store.lock(name))
        yield


def _waits_for(name: str) -> str:
    """Whom a build of `name` waits for, and how to end or watch that."""
    builds = [build for build in store.running_builds() if build.name == name]
    waits = f"waiting for the build of {name}"
    if not builds:
        return f"{waits} that began a moment ago"
    by = " or ".join(f"process {build.pid}" + ("" if build.is_here else f" on {build.host}") for build in builds)
    return f"{waits} by {by} (tunegate cancel {name} ends it, tunegate logs --stage STAGE shows it)"


def _make(
    config: Mapping[str, Any], sources: Mapping[str, str], run_id: str, show: OnEvent
) -> tuple[dict[Stage, Artifact], ServedUnit]:
    """All artefacts, each recorded in the run once it is there, and the unit that would be served."""
    judges.need_keys(config)
    artifacts: dict[Stage, Artifact] = {}
    for step in steps.steps(config):
        inputs = {name: artifacts[cast("Stage", name)] for name in step.inputs}
        artifacts[cast("Stage", step.stage)] = artifact = stages.run(step, config, inputs, sources, show)
        runs.log_artifact(run_id, artifact)
    served = artifacts[cast("Stage", steps.served_stage(config))]
    settings = Config.model_validate(config)
    unit = serve.served_unit(served.payload, settings.serve, settings.name, runtimes.environment_of(config))
    return artifacts, unit


def _judged(
    config: Mapping[str, Any],
    planned: plan.Plan,
    sources: Mapping[str, str],
    artifacts: dict[Stage, Artifact],
    unit: ServedUnit,
    run_id: str,
    show: OnEvent,
    *,
    again: bool,
) -> dict[str, Any]:
    """Measure and judge the unit, conclude the build."""
    settings = Config.model_validate(config)
    reports = measure(config, planned.key, artifacts, unit, show, again=again)
    verdict = judge(reports, settings, unit, show)
    made = Build(
        name=planned.name,
        key=planned.key,
        config=dict(config),
        artifacts=artifacts,
        unit=unit,
        model_path=artifacts[cast("Stage", steps.served_stage(config))].payload,
        ledger=ledger_of(config, planned.key, artifacts, reports.evaluations["candidate"], sources, show),
        verdict=verdict,
        **dict(reports),
    )
    return _conclude(made, run_id, settings, show)


def judge(reports: Reports, settings: Config, unit: ServedUnit, show: OnEvent) -> Verdict:
    """Judge the measurements as a named task."""
    verdict = _judge(reports, settings, unit.digest)
    show({"event": "stage", "stage": "gate", "state": verdict.outcome})
    create_markdown_artifact(render.gate_table(verdict), key="gate", description=f"Verdict: {verdict.outcome}")
    return verdict


@task(name="gate", cache_policy=NO_CACHE, persist_result=False)
def _judge(reports: Reports, settings: Config, unit_digest: str) -> Verdict:
    return gate.judge(reports, settings.gate, unit_digest)


@task(name="register", retries=2, retry_delay_seconds=10, retry_condition_fn=stages.worth_retrying,
      timeout_seconds=1800, cache_policy=NO_CACHE, persist_result=False)  # fmt: skip
def _register(made: Build, run_id: str) -> str | None:
    runs.record_build(run_id, made)
    if made.verdict and made.verdict.outcome == "pass":
        return versions.register(run_id, made)
    versions.note_verdict(run_id, made)
    return None


def _conclude(made: Build, run_id: str, settings: Config, show: OnEvent) -> dict[str, Any]:
    """Record the build in MLflow, register a passing one, tell the reviewer, leave finished.json."""
    version = _register(made, run_id)
    create_markdown_artifact(render.markdown(made), key="report", description=f"What a reviewer of {made.name} reads")
    show({"event": "stage", "stage": "register", "state": f"v{version}" if version else "recorded"})
    verdict = cast("Verdict", made.verdict)
    page = versions.page(made.name, version, run_id)
    create_markdown_artifact(
        f"[{made.name} {'version ' + version if version else 'run'} in MLflow]({page})", key="mlflow"
    )
    finished = {
        "name": made.name,
        "build_key": made.key,
        "outcome": verdict.outcome,
        "run_id": run_id,
        "version": version,
        "unit_digest": made.unit.digest,
        "page": page,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder = store.build_folder(made.key)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "build.json", json.loads(made.model_dump_json()))
    files.write_json(folder / "finished.json", finished)
    if version:
        notify.review_waits(finished, settings.notify)
    return finished
