"""lm-eval's tasks on a served system, kept by the digests of the served unit and the task.

The key leaves out the system's role: an incumbent's results are those that it had as a candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter

from flows import stages
from flows.stages import OnEvent
from flows.systems import System
from pipeline import program
from pipeline.artifacts import TaskResult
from pipeline.config.schema import Config, TaskConfig
from pipeline.digests import digest_of
from pipeline.environments import interpreters
from pipeline.evaluation import lm_eval_files
from pipeline.plan import code, plan
from pipeline.serving.server import Server

PROGRAM = "pipeline.evaluation.lm_eval_tasks"
RESULTS = TypeAdapter(tuple[TaskResult, ...])


def task_results(
    config: Config, system: System, attempt: str, server: Callable[[], Server], show: OnEvent
) -> tuple[TaskResult, ...]:
    """The results of the config's lm-eval tasks on a system, task by task; a task that ran before needs no server."""
    tasks = config.evaluate.tasks
    versions = _versions(config) if tasks else {}
    return tuple(
        record for entry in tasks for record in _run_task(config, entry, system, versions, attempt, server, show)
    )


def _run_task(
    config: Config,
    entry: TaskConfig,
    system: System,
    versions: dict[str, str],
    attempt: str,
    server: Callable[[], Server],
    show: OnEvent,
) -> tuple[TaskResult, ...]:
    def make(folder: Path) -> stages.Origin:
        show({"event": "stage", "stage": "tasks", "state": "running", "log": f"{system.role}: {entry.task}"})
        settings = {
            "task": entry.model_dump(mode="json"), "url": server().url, "model": server().model,
            "model_path": str(system.model), "max_model_len": system.config.serve.max_model_len,
            "seed": config.seed, "concurrency": config.evaluate.concurrency,
        }  # fmt: skip
        detail = stages.run_program(PROGRAM, "judges", config, program.Request(settings, {}, folder), show)
        return stages.Origin({"unit": system.unit.digest}, {**versions, "vllm": system.unit.vllm_version}, detail)

    artifact = stages.kept("tasks", _key(config, entry, system, versions, attempt), make, server)
    show({"event": "stage", "stage": "tasks", "state": system.role, "log": Path(entry.task).name})
    return RESULTS.validate_json((artifact.payload / "records.json").read_text(encoding="utf-8"))


def _key(config: Config, entry: TaskConfig, system: System, versions: dict[str, str], attempt: str) -> str:
    """The key of a task's results on a system."""
    parts = {
        "unit": system.unit.digest,
        "task": entry.model_dump(mode="json"),
        "files": lm_eval_files.digest(entry.task),
        "max_model_len": system.config.serve.max_model_len,
        "seed": config.seed,
        "concurrency": config.evaluate.concurrency,
        "made_by": versions,
        "source": code.source_digest(PROGRAM),
        "attempt": attempt,
    }
    return digest_of(parts)[:32]


def _versions(config: Config) -> dict[str, str]:
    """The versions of lm-eval and of the packages that decide its results."""
    environment = interpreters.find("judges", interpreters.settings(config.model_dump(mode="json")))
    return interpreters.versions(environment, plan.JUDGES_PACKAGES)
