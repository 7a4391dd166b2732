"""One pipeline stage as a Prefect task: its environment, the GPU slot, retries, the cache and live progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from flows import jobs
from pipeline import file_digests, hardware, program, store
from pipeline.artifacts import Artifact
from pipeline.environments import interpreters
from pipeline.errors import Problem, RegistryError, ServingError, StageFailed, TunegateError
from pipeline.kubernetes import manifests
from pipeline.plan import plan
from pipeline.plan.steps import Step, section

# A gated model or dataset needs the user's token; no other stage program sees a secret unless its caller names it.
SECRETS_OF = {
    "pipeline.model.base": ("HF_TOKEN",), "pipeline.data.prepare": ("HF_TOKEN",), "pipeline.evaluation.lm_eval_tasks": ("HF_TOKEN",),
}  # fmt: skip
GIVEN_BACK_S = 5.0  # what a GPU may take to have the memory of an ended process back
OnEvent = Callable[[program.Event], None]


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """A crashed stage or a server that did not come up or answer may do better next time; a user's mistake won't."""
    try:
        state.result()
    except (StageFailed, ServingError, RegistryError, TimeoutError):
        return True
    except Exception:  # noqa: BLE001 - whatever it was, trying again doesn't mend it
        return False
    return False


def run(
    step: Step, config: Mapping[str, Any], inputs: Mapping[str, Artifact], sources: Mapping[str, str], on_event: OnEvent
) -> Artifact:
    """Return the step's artefact: from the store, or made now by its stage program as a named Prefect task."""
    made_by = plan.versions(step, config)
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    device = manifests.device_of(config, step.stage, hardware.device().name)
    key = plan.key_of(step, config, plan.inputs_of(step, digests, sources, device), made_by)
    found = store.find(step.stage, key)
    if found is not None:
        on_event({"event": "stage", "stage": step.stage, "state": "cached", "seconds": 0.0, "key": key})
        return found
    named = _make.with_options(
        name=step.stage,
        retries=step.retries,
        retry_delay_seconds=10,
        retry_condition_fn=worth_retrying,
        timeout_seconds=timedelta(hours=step.timeout_hours).total_seconds(),
    )
    records = inputs_json(inputs, tuple(inputs))
    key = named(step, dict(config), records, key, digests, made_by, on_event)
    artifact = store.find(step.stage, key)
    if artifact is None:
        raise StageFailed(
            f"the {step.stage} artefact {key} is gone from the store", remedy="run the same command again"
        )
    return artifact


@task(cache_policy=NO_CACHE, persist_result=False)
def _make(
    step: Step,
    config: dict[str, Any],
    inputs: dict[str, Any],
    key: str,
    parents: dict[str, str],
    made_by: dict[str, str],
    on_event: OnEvent,
) -> str:
    """Run the stage program under the key's lock and put what it made into the store."""
    with store.making(step.stage, key) as partial:
        if store.peek(step.stage, key):  # another run made it while this one waited
            return key
        started = time.monotonic()
        on_event(
            {"event": "stage", "stage": step.stage, "state": "running", "log": str(partial / "log.txt"), "key": key}
        )
        request = program.Request(
            {name.rpartition(".")[2]: section(config, name) for name in step.sections}, inputs, partial
        )
        try:
            job = manifests.pod_of(config, step.stage)  # with a GPU of its own
            with nullcontext() if job else device_slot(on_event):
                detail = run_program(step.program, step.environment, config, request, on_event, step=step)
        except TunegateError:
            on_event({"event": "stage", "stage": step.stage, "state": "failed", "seconds": time.monotonic() - started})
            raise
        store.finish(step.stage, key, partial, parents=parents, made_by=made_by, detail=detail)
        on_event({"event": "stage", "stage": step.stage, "state": "done", "seconds": time.monotonic() - started})
    return key


def run_program(
    module: str,
    environment: str,
    config: Mapping[str, Any],
    request: program.Request,
    on_event: OnEvent,
    *,
    keep: tuple[str, ...] = (),
    pythonpath: tuple[Path, ...] = (),
    step: Step | None = None,
) -> dict[str, Any]:
    """Run `python -m MODULE` in the named environment, with the secrets in `keep` and further folders to import from.

    A child process, or on a cluster the job that the config gives this `step`.
    """
    found = interpreters.find(environment, interpreters.settings(config))
    found = replace(found, pythonpath=(*found.pythonpath, *pythonpath))
    environ = interpreters.child_environ(found, (*SECRETS_OF.get(module, ()), *keep))
    for name in interpreters.secrets_named(config) - set(keep):
        environ.pop(name, None)
    if step and manifests.pod_of(config, step.stage):
        return jobs.run(step, config, found, environ, SECRETS_OF.get(module, ()), request, on_event)
    return program.run(interpreters.command(found, module), environ, request, on_event)


@contextmanager
def device_slot(on_event: OnEvent) -> Iterator[None]:
    """One stage at a time on the GPUs, across all runs of this machine; a CPU is shared by the system itself.

    It is one slot for all GPUs, also while a stage uses one of several: a served model may take them all. Memory that
    somebody else holds is told, so that a stage that finds too little isn't a riddle. A flow's pod on a cluster has GPUs of its own,
    and the locks lie on a volume that it shares with others: it holds none.
    """
    if hardware.device().kind != "cuda":
        yield
        return
    with nullcontext() if manifests.CLAIM in os.environ else store.lock("gpu"):
        for card in hardware.settled_gpu_memory(lambda card: card.free >= card.total // 2, GIVEN_BACK_S):
            if card.free < card.total // 2:
                on_event({"event": "message", "text": f"GPU memory: {card.told()}"})
        yield


def inputs_json(artifacts: Mapping[Any, Artifact], names: tuple[str, ...]) -> dict[str, Any]:
    """The records a program takes, as JSON by name.

    Raises StageFailed for every one whose files aren't those it was recorded with: what is built on must be what was made.
    """
    changed = [artifacts[name] for name in names if name in artifacts and not file_digests.is_intact(artifacts[name])]
    if changed:
        raise StageFailed(
            [
                Problem(
                    f"the {artifact.stage} artefact was changed after it was made",
                    file=str(artifact.payload),
                    allowed=f"files of the digest {artifact.digest[:12]}, as recorded",
                    remedy=f"rm -r {artifact.path}, then the same command makes it again",
                )
                for artifact in changed
            ]
        )
    return {name: artifacts[name].model_dump(mode="json") for name in names if name in artifacts}
