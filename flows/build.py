"""The build: base → prepare → finetune → merge → quantize → evaluate → loadtest → gate → ledger → register, top to bottom.

`build` is the Prefect flow. Its artefacts are kept by digest: a second run makes only the missing ones. Measurements and the
verdict lie in mlruns/work/build/KEY/ and in the build's MLflow run.
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

from flows import curves, llm_judges, progress, stages
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

    Returns the content of `finished.json`: outcome, run_id, version (or null), unit digest, page, time.
    Raises the TunegateError of the stage that failed; artefacts that were finished before it stay.
    """
    settings = resolve.resolve(Path(config), overrides or [], Path(data_dir) if data_dir else None)
    return run(settings, progress.logged(get_run_logger()), again=again)


def run(config_json: Mapping[str, Any], on_event: OnEvent, *, again: bool = False) -> dict[str, Any]:
    """Build from a resolved config, and show events by `on_event`. Must be called inside a Prefect flow.

    The plan and MLflow take the config as JSON; every stage and measurement takes it as a Config.
    """
    sources = resolve.sources(config_json)
    build_plan = plan.make(config_json, sources, hardware.device().name)
    if build_plan.finished and not again:
        runs.take_over(build_plan.finished, config_json)
        return dict(build_plan.finished)
    plan.raise_for_too_few_gpus(config_json)
    config = Config.model_validate(config_json)
    with _turn(build_plan, on_event), store.running(build_plan.name):
        if client.is_new():
            on_event({"event": "message", "text": "MLflow makes its database, once; some seconds"})
        run_id = runs.open_run(build_plan.name, build_plan.key, config_json, build_plan.digests)
        show = curves.tee(on_event, run_id)
        _show_plan(build_plan)
        try:
            artifacts, unit = _make(config, sources, run_id, show)
            run_id = runs.run_of_unit(run_id, build_plan.name, build_plan.key, config_json, unit.digest)
            for artifact in artifacts.values():
                runs.log_artifact(run_id, artifact)
            show = curves.tee(on_event, run_id)
            build_record = _measure_and_gate(config, build_plan.key, sources, artifacts, unit, show, again=again)
            summary = _conclude(build_record, run_id, config, show)
        except BaseException as error:
            with suppress(RegistryError):  # the first error is the one that the user must read
                runs.close_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        runs.close_run(run_id, "FINISHED")
    return summary


def _show_plan(build_plan: plan.Plan) -> None:
    """Leave the plan in Prefect's page of the run."""
    lines: list[str] = []
    plan.render(build_plan, Path(build_plan.name), lines.append)
    text = "```\n" + "\n".join(lines) + "\n```"
    create_markdown_artifact(text, key="plan", description=f"Plan of {build_plan.name}")


@contextmanager
def _turn(build_plan: plan.Plan, on_event: OnEvent) -> Iterator[None]:
    """Hold the build's lock. While another process holds it, wait for it and say so at once."""
    name = f"build/{build_plan.key}"
    with ExitStack() as locks:
        try:
            locks.enter_context(store.lock(name, wait=False))
        except Busy:
            on_event({"event": "message", "text": _waits_for(build_plan.name)})
            locks.enter_context(store.lock(name))
        yield


def _waits_for(name: str) -> str:
    """The process that a build of `name` waits for, and the commands that end or watch it."""
    builds = [build for build in store.running_builds() if build.name == name]
    waits = f"waiting for the build of {name}"
    if not builds:
        return f"{waits} that began a moment ago"
    by = " or ".join(f"process {build.pid}" + ("" if build.is_here else f" on {build.host}") for build in builds)
    return f"{waits} by {by} (tunegate cancel {name} ends it, tunegate logs --stage STAGE shows it)"


def _make(
    config: Config, sources: Mapping[str, str], run_id: str, show: OnEvent
) -> tuple[dict[Stage, Artifact], ServedUnit]:
    """All artefacts, each recorded in the run at once, and the unit that would be served."""
    llm_judges.need_keys(config)
    config_json = config.model_dump(mode="json")
    artifacts: dict[Stage, Artifact] = {}
    for step in steps.steps(config_json):
        inputs = {name: artifacts[cast("Stage", name)] for name in step.inputs}
        artifacts[cast("Stage", step.stage)] = artifact = stages.run(step, config, inputs, sources, show)
        runs.log_artifact(run_id, artifact)
    environment = runtimes.environment_of(config_json)
    return artifacts, serve.served_unit(_model_path(artifacts), config.serve, config.name, environment)


def _model_path(artifacts: Mapping[Stage, Artifact]) -> Path:
    """The folder that is measured, gated and served."""
    return artifacts["quantize" if "quantize" in artifacts else "merge"].payload


def _measure_and_gate(
    config: Config,
    build_key: str,
    sources: Mapping[str, str],
    artifacts: dict[Stage, Artifact],
    unit: ServedUnit,
    show: OnEvent,
    *,
    again: bool,
) -> Build:
    """The build's record: the unit measured, its verdict, and the loss ledger that explains it."""
    reports = measure(config, build_key, artifacts, unit, show, again=again)
    verdict = decide(reports, config, unit, show)
    return Build(
        name=config.name,
        key=build_key,
        config=config.model_dump(mode="json"),
        artifacts=artifacts,
        unit=unit,
        model_path=_model_path(artifacts),
        ledger=ledger_of(config, build_key, artifacts, reports.evaluations["candidate"], sources, show),
        verdict=verdict,
        **dict(reports),
    )


def decide(reports: Reports, config: Config, unit: ServedUnit, show: OnEvent) -> Verdict:
    """The gate's verdict on the reports, shown and left in Prefect's page of the run."""
    verdict = _gate(reports, config, unit.digest)
    show({"event": "stage", "stage": "gate", "state": verdict.outcome})
    create_markdown_artifact(render.gate_table(verdict), key="gate", description=f"Verdict: {verdict.outcome}")
    return verdict


@task(name="gate", cache_policy=NO_CACHE, persist_result=False)
def _gate(reports: Reports, settings: Config, unit_digest: str) -> Verdict:
    return gate.verdict_of(reports, settings.gate, unit_digest)


@task(name="register", retries=2, retry_delay_seconds=10, retry_condition_fn=stages.worth_retrying,
      timeout_seconds=1800, cache_policy=NO_CACHE, persist_result=False)  # fmt: skip
def _register(record: Build, run_id: str) -> str | None:
    runs.record_build(run_id, record)
    if record.verdict and record.verdict.outcome == "pass":
        return versions.register(run_id, record)
    versions.note_verdict(run_id, record)
    return None


def _conclude(record: Build, run_id: str, config: Config, show: OnEvent) -> dict[str, Any]:
    """Record the build in MLflow, register a passing one, tell the reviewer, leave finished.json; return its content."""
    version = _register(record, run_id)
    create_markdown_artifact(render.markdown(record), key="report", description=f"For the reviewer of {record.name}")
    show({"event": "stage", "stage": "register", "state": f"v{version}" if version else "recorded"})
    page = versions.page(record.name, version, run_id)
    label = f"{record.name} {'version ' + version if version else 'run'} in MLflow"
    create_markdown_artifact(f"[{label}]({page})", key="mlflow")
    summary = {
        "name": record.name,
        "build_key": record.key,
        "outcome": cast("Verdict", record.verdict).outcome,
        "run_id": run_id,
        "version": version,
        "unit_digest": record.unit.digest,
        "page": page,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder = store.build_folder(record.key)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "build.json", json.loads(record.model_dump_json()))
    files.write_json(folder / "finished.json", summary)
    if version:
        notify.review_waits(summary, config.notify)
    return summary
