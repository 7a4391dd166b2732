"""Promotion as a Prefect flow: each step of pipeline.deployment.steps.STEPS is a task of its name.

From a terminal the steps run as a flow when a Prefect server answers, so that they show there. Otherwise they run
without Prefect: a temporary server takes longer to start than a promotion's own work, and a rollback must never
wait for one. Both take the steps in the table's order, with its retries and time limits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings
from prefect.tasks import Task

from flows import progress
from pipeline import store
from pipeline.artifacts import Release
from pipeline.config.schema import Config
from pipeline.deployment import promote as deployment
from pipeline.deployment.state import Deployment
from pipeline.deployment.steps import Promotion, PromotionStep
from pipeline.environments.interpreters import Environment
from pipeline.errors import RegistryError, RoutingError, ServingError
from pipeline.program import Event
from pipeline.registry import versions
from pipeline.serving import runtimes

SetChampion = Callable[[str, str], None]
RETRY_DELAY_S = 2
ANSWERS_WITHIN_S = 2.0  # a Prefect server that is silent for longer is away: the steps run without it


@flow(name="promote", flow_run_name="promote-{name}", persist_result=False)
def promote(name: str, version: str | None = None) -> dict[str, Any]:
    """Put an approved version behind the proxy: the newest approved one unless a version is named.

    Returns the deployment's status. Raises the TunegateError of the step that failed.
    """
    release = versions.release(name, version)
    config = versions.config_of(release.run_id)
    environment = runtimes.environment_of(config.model_dump(mode="json"))
    on_event = progress.logged(get_run_logger())
    _take_steps(Promotion(release, config, environment, versions.set_champion, on_event))
    return deployment.status(name).model_dump(mode="json")


def run(
    release: Release,
    config: Config,
    environment: Environment | None,
    on_event: Callable[[Event], None],
    set_champion: SetChampion = versions.set_champion,
) -> None:
    """Bring a release to where clients reach it; one that serves already is left alone at once.

    Raises the TunegateErrors of deployment.promote unchanged, with Prefect and without it.
    """
    promotion = Promotion(release, config, environment, set_champion, on_event)
    if deployment.is_settled(promotion):
        return
    url = _prefect_url()
    if url is None:
        deployment.promote(promotion)
        return

    @flow(name="promote", flow_run_name=f"promote-{release.name}", persist_result=False)
    def from_terminal() -> None:
        _take_steps(promotion)

    with temporary_settings({PREFECT_API_URL: url, PREFECT_SERVER_ANALYTICS_ENABLED: False}):
        from_terminal()


def _take_steps(promotion: Promotion) -> Deployment:
    """Take the steps as Prefect tasks and leave an artifact with the deployment's status."""
    record = deployment.promote(promotion, as_task)
    now = deployment.status(promotion.name)
    lines = "\n".join(now.lines())
    create_markdown_artifact(
        f"```\n{lines}\n```", key="serves", description=f"{now.name} v{now.version} is {now.state}"
    )
    if now.url:
        create_link_artifact(f"{now.url}/v1/models", key="proxy", link_text=f"{now.name} v{now.version}")
    return record


def as_task(step: PromotionStep, promotion: Promotion) -> None:
    """Take one step as a Prefect task of its name; its error comes out unchanged."""
    timeout_s = step.timeout_s(promotion.config)
    run_task = _step.with_options(
        name=step.name,
        retries=step.retries,
        retry_delay_seconds=RETRY_DELAY_S,
        retry_condition_fn=_worth_retrying,
        timeout_seconds=timeout_s,
    )
    try:
        run_task(step, promotion)
    except TimeoutError as error:
        raise ServingError(
            f"{step.name} took longer than {timeout_s:.0f} s",
            key=promotion.name,
            remedy="tunegate status",
        ) from error


@task(cache_policy=NO_CACHE, persist_result=False)
def _step(step: PromotionStep, promotion: Promotion) -> None:
    deployment.directly(step, promotion)


def _worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    try:
        state.result()
    except (RoutingError, RegistryError, OSError):
        return True
    except Exception:  # noqa: BLE001 - any other error stays the same when the step is repeated
        return False
    return False


def _prefect_url() -> str | None:
    """The API of a Prefect server that answers: the environment's, or the one that `tunegate up` started."""
    note = store.home() / "services" / "prefect-api-url"
    url = os.environ.get("PREFECT_API_URL") or (note.read_text(encoding="utf-8").strip() if note.is_file() else "")
    try:
        return url if url and httpx.get(f"{url}/health", timeout=ANSWERS_WITHIN_S).is_success else None
    except httpx.HTTPError:
        return None
