"""Judges beside the holdout's scorers: lm-eval's tasks on a served system, and LLM judges that compare two systems' answers.

Both are kept by the digests of what was asked: a task by the served unit, so that an incumbent's results are those that it
got as a candidate; a comparison by the answers compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import TypeAdapter

from flows import stages
from flows.stages import OnEvent
from flows.systems import System
from pipeline import program, store
from pipeline.artifacts import Evaluation, JudgeReport, TaskResult
from pipeline.digests import digest_of
from pipeline.environments import interpreters
from pipeline.errors import ConfigError
from pipeline.evaluation import llm_judge, lm_eval_files
from pipeline.plan import code, plan
from pipeline.serving.server import Server

TASKS = "pipeline.evaluation.lm_eval_tasks"
LLM_JUDGE = "pipeline.evaluation.llm_judge"
RESULTS = TypeAdapter(tuple[TaskResult, ...])
# Parts of `evaluate` that don't decide how the holdout is answered and scored.
BESIDE_SCORERS = ("compare", "prompts", "tasks", "judges", "ledger_items")


def need_keys(config: Mapping[str, Any]) -> None:
    """Raise ConfigError now, not after hours of training, when the key of an LLM judge isn't in the environment."""
    for entry in config["evaluate"]["judges"]:
        llm_judge.api_key(entry["api_key_env"], os.environ)


def run_tasks(
    config: Mapping[str, Any], system: System, attempt: str, server: Callable[[], Server], show: OnEvent
) -> None:
    """Run the config's lm-eval tasks on a system; one that was run before stays, and needs no server."""
    for entry, key in _tasks(config, system, attempt):
        if store.find("tasks", key) is None:
            running = server()
            with store.making("tasks", key) as partial:
                show({"event": "stage", "stage": "tasks", "state": "running", "log": f"{system.role}: {entry['task']}"})
                settings = {
                    "task": entry, "url": running.url, "model": running.model, "model_path": str(system.model),
                    "max_model_len": system.config["serve"]["max_model_len"], "seed": config["seed"],
                    "concurrency": config["evaluate"]["concurrency"],
                }  # fmt: skip
                request = program.Request(settings, {}, partial)
                detail = stages.run_program(TASKS, "judges", config, request, show)
                made_by = {**_lm_eval(config), "vllm": system.unit.vllm_version}
                store.finish(
                    "tasks", key, partial, parents={"unit": system.unit.digest}, made_by=made_by, detail=detail
                )
        show({"event": "stage", "stage": "tasks", "state": system.role, "log": Path(entry["task"]).name})


def task_results(config: Mapping[str, Any], system: System, attempt: str) -> dict[str, tuple[TaskResult, ...]]:
    """What lm-eval's tasks gave for a system that they were run on, by its role; empty where the config has no tasks."""
    found = {entry["task"]: store.find("tasks", key) for entry, key in _tasks(config, system, attempt)}
    if gone := [name for name, artifact in found.items() if artifact is None]:
        what = f"{', '.join(gone)} changed while the build ran"
        raise ConfigError(what, key="evaluate.tasks", remedy="run the same command again")
    files = [artifact.payload / "records.json" for artifact in found.values() if artifact]
    records = tuple(record for file in files for record in RESULTS.validate_json(file.read_text(encoding="utf-8")))
    return {system.role: records} if records else {}


def _tasks(config: Mapping[str, Any], system: System, attempt: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Each task of the config and the key of its results on the system."""
    asked = config["evaluate"]["tasks"]
    made_by = _lm_eval(config) if asked else {}
    for entry in asked:
        decides = {
            "unit": system.unit.digest,
            "task": entry,
            "files": lm_eval_files.digest(entry["task"]),
            "max_model_len": system.config["serve"]["max_model_len"],
            "seed": config["seed"],
            "concurrency": config["evaluate"]["concurrency"],
            "made_by": made_by,
            "source": code.source_digest(TASKS),
            "attempt": attempt,
        }
        yield entry, digest_of(decides)[:32]


def _lm_eval(config: Mapping[str, Any]) -> dict[str, str]:
    return interpreters.versions(interpreters.find("judges", interpreters.settings(config)), plan.JUDGES_PACKAGES)


def judged(
    config: Mapping[str, Any], evaluations: Mapping[str, Evaluation], attempt: str, show: OnEvent
) -> tuple[JudgeReport, ...]:
    """What the config's LLM judges say of the candidate against base and incumbent; a comparison without the other is skipped."""
    reports = []
    for entry in config["evaluate"]["judges"]:
        if entry["against"] in evaluations:
            reports.append(_judge(dict(config), dict(entry), dict(evaluations), attempt, show))
        else:
            show(
                {"event": "message", "text": f"{entry['model']} has nothing to compare: there is no {entry['against']}"}
            )
    return tuple(reports)


@task(name="judge", retries=1, retry_delay_seconds=10, retry_condition_fn=stages.worth_retrying, timeout_seconds=6 * 3600,
      cache_policy=NO_CACHE, persist_result=False)  # fmt: skip
def _judge(
    config: dict[str, Any], entry: dict[str, Any], evaluations: dict[str, Evaluation], attempt: str, show: OnEvent
) -> JudgeReport:
    ours, theirs = evaluations["candidate"], evaluations[entry["against"]]
    pairs = [
        {"id": one.id, "prompt": one.prompt, "expected": one.expected, "candidate": one.answer, "other": other.answer}
        for one, other in zip(ours.items, theirs.items, strict=True)
    ][: entry["max_items"]]
    asked = {name: value for name, value in entry.items() if name not in ("api_key_env", "concurrency")}
    settings = {"judge": entry, "gate": config["gate"], "seed": config["seed"]}
    parents = {"candidate": ours.unit_digest, "other": theirs.unit_digest, "pairs": digest_of(pairs)}
    decides = {
        "judge": asked,
        "pairs": parents["pairs"],
        "seed": config["seed"],
        "confidence": config["gate"]["confidence"],
        "source": code.source_digest(LLM_JUDGE),
        "attempt": attempt,
    }
    key = digest_of(decides)[:32]
    if store.find("judge", key) is None:
        with store.making("judge", key) as partial:
            show(
                {"event": "stage", "stage": "judge", "state": "running", "log": f"{entry['model']}: {entry['against']}"}
            )
            request = program.Request(settings, {"pairs": pairs}, partial)
            keys = (entry["api_key_env"],) if entry["api_key_env"] else ()
            detail = stages.run_program(LLM_JUDGE, "control", config, request, show, keep=keys)
            store.finish("judge", key, partial, parents=parents, made_by={"judge": entry["model"]}, detail=detail)
    found = store.find("judge", key)
    assert found is not None  # noqa: S101 - finished above
    show({"event": "stage", "stage": "judge", "state": entry["against"], "log": entry["model"]})
    return JudgeReport.model_validate_json((found.payload / "report.json").read_text(encoding="utf-8"))
