"""One pipeline stage as a Prefect task: its environment, the GPU slot, retries, the store and live progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
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
from pipeline.config.schema import Config
from pipeline.environments import interpreters
from pipeline.errors import Problem, RegistryError, ServingError, StageFailed, TunegateError
from pipeline.kubernetes import manifests, place
from pipeline.plan import plan
from pipeline.plan.steps import Step, section

# A gated model or dataset needs the user's token. Every other secret reaches a stage program only when its caller names it.
SECRETS_OF = {
    "pipeline.model.base": ("HF_TOKEN",), "pipeline.data.prepare": ("HF_TOKEN",), "pipeline.evaluation.lm_eval_tasks": ("HF_TOKEN",),
}  # fmt: skip
GIVEN_BACK_S = 5.0  # a GPU may take so long to free the memory of an ended process
OnEvent = Callable[[program.Event], None]


@dataclass(frozen=True)
class Origin:
    """A finished artefact's record beside its digest: its inputs' digests, the deciding versions, the stage program's result."""

    parents: dict[str, str]
    made_by: dict[str, str]
    detail: dict[str, Any]


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """A crashed stage, or a server that did not come up or answer, may do better next time; a user's mistake won't."""
    try:
        state.result()
    except (StageFailed, ServingError, RegistryError, TimeoutError):
        return True
    except Exception:  # noqa: BLE001 - trying again mends no other error
        return False
    return False


def run(
    step: Step, config: Config, inputs: Mapping[str, Artifact], sources: Mapping[str, str], on_event: OnEvent
) -> Artifact:
    """Return the step's artefact: from the store, or made now by its stage program as a Prefect task of its name."""
    config_json = config.model_dump(mode="json")
    made_by = plan.versions(step, config_json)
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    device = place.device_of(config_json, step.stage, hardware.device().name)
    key = plan.key_of(step, config_json, plan.inputs_of(step, digests, sources, device), made_by)
    artifact = store.find(step.stage, key)
    if artifact is not None:
        on_event({"event": "stage", "stage": step.stage, "state": "cached", "seconds": 0.0, "key": key})
        return artifact
    make = _make.with_options(
        name=step.stage,
        retries=step.retries,
        retry_delay_seconds=10,
        retry_condition_fn=worth_retrying,
        timeout_seconds=timedelta(hours=step.timeout_hours).total_seconds(),
    )
    return make(step, config, inputs_json(inputs, tuple(inputs)), key, digests, made_by, on_event)


@task(cache_policy=NO_CACHE, persist_result=False)
def _make(
    step: Step,
    config: Config,
    inputs: dict[str, Any],
    key: str,
    parents: dict[str, str],
    made_by: dict[str, str],
    on_event: OnEvent,
) -> Artifact:
    """Make the step's artefact, and show how that went."""
    starts: list[float] = []  # empty when another run made it while this one waited
    config_json = config.model_dump(mode="json")
    sections = {name.rpartition(".")[2]: section(config_json, name) for name in step.sections}

    def show_end(state: str) -> None:
        on_event({"event": "stage", "stage": step.stage, "state": state, "seconds": time.monotonic() - starts[0]})

    def make(folder: Path) -> Origin:
        starts.append(time.monotonic())
        on_event(
            {"event": "stage", "stage": step.stage, "state": "running", "log": str(folder / "log.txt"), "key": key}
        )
        request = program.Request(sections, inputs, folder)
        try:
            pod = place.pod_of(config_json, step.stage)  # it has a GPU of its own
            with nullcontext() if pod else device_slot(on_event):
                detail = run_program(step.program, step.environment, config, request, on_event, step=step)
        except TunegateError:
            show_end("failed")
            raise
        return Origin(parents, made_by, detail)

    artifact = kept(step.stage, key, make)
    if starts:
        show_end("done")
    return artifact


def kept(stage: str, key: str, make: Callable[[Path], Origin], before: Callable[[], object] | None = None) -> Artifact:
    """The artefact of this key: from the store, or made now by `make` in the folder that it is given.

    `before` starts whatever `make` needs, such as a server, and is called only when something is to be made. It comes
    before the key's lock: a server holds the GPU's lock, and a run that holds a key's lock may wait for that one.
    """
    artifact = store.find(stage, key)
    if artifact is not None:
        return artifact
    if before:
        before()
    with store.making(stage, key) as partial:
        artifact = store.find(stage, key)  # another run may have made it while this one waited
        if artifact is not None:
            return artifact
        origin = make(partial)
        return store.finish(stage, key, partial, parents=origin.parents, made_by=origin.made_by, detail=origin.detail)


def run_program(
    module: str,
    environment: str,
    config: Config,
    request: program.Request,
    on_event: OnEvent,
    *,
    keep: tuple[str, ...] = (),
    pythonpath: tuple[Path, ...] = (),
    step: Step | None = None,
) -> dict[str, Any]:
    """Run `python -m MODULE` in an environment, with the secrets in `keep` and further folders to import from.

    It is a child process, or on a cluster the job that the config gives this `step`.
    """
    config_json = config.model_dump(mode="json")
    interpreter = interpreters.find(environment, interpreters.settings(config_json))
    interpreter = replace(interpreter, pythonpath=(*interpreter.pythonpath, *pythonpath))
    environ = interpreters.child_environ(interpreter, (*SECRETS_OF.get(module, ()), *keep))
    for name in interpreters.secrets_named(config_json) - set(keep):
        environ.pop(name, None)
    if step and place.pod_of(config_json, step.stage):
        return jobs.run(step, config, interpreter, environ, SECRETS_OF.get(module, ()), request, on_event)
    return program.run(interpreters.command(interpreter, module), environ, request, on_event)


@contextmanager
def device_slot(on_event: OnEvent) -> Iterator[None]:
    """One stage at a time on the GPUs, across all runs of this machine; a CPU is shared by the system itself.

    All GPUs are one slot, also while a stage uses one of several: a served model may take them all. A message tells of memory
    that other processes hold, to explain a stage that finds too little. A flow's pod on a cluster takes no lock: its GPUs are
    its own, and the locks lie on a volume that it shares with other pods.
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

    Raises StageFailed for each whose files differ from its record: a stage must build on what was made.
    """
    changes = [artifacts[name] for name in names if name in artifacts and not file_digests.is_intact(artifacts[name])]
    if changes:
        raise StageFailed(
            [
                Problem(
                    f"the {artifact.stage} artefact was changed after it was made",
                    file=str(artifact.payload),
                    allowed=f"files of the digest {artifact.digest[:12]}, as recorded",
                    remedy=f"rm -r {artifact.path}, then the same command makes it again",
                )
                for artifact in changes
            ]
        )
    return {name: artifacts[name].model_dump(mode="json") for name in names if name in artifacts}
