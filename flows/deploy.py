"""What `tunegate up` tells Prefect's server: deployments for one config, their pool, a GPU limit, zombies.

Self-hosted Prefect leaves a run that was killed in the state Running for ever; an automation made here calls
it crashed when its heartbeats stop. A schedule that a person switched on in Prefect's page stays as it is
unless the config names one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import environments, resolve, store
from pipeline.errors import ServingError

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.yaml"
HEARTBEATS_STOPPED_S = 120
ZOMBIES = "tunegate: a run whose heartbeats stopped has crashed"


def rendered(config: Path | None, data_dir: Path | None) -> dict[str, Any]:
    """The deployments of prefect.yaml for a config (default: the demo's), with absolute paths.

    Raises ConfigError when the config is wrong.
    """
    import yaml

    file = config or DEMO
    folder = data_dir or (None if config else store.home() / "demo")
    settings = resolve.resolve(file, data_dir=folder)
    plan: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    plan["pull"] = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    for deployment in plan["deployments"]:
        deployment["name"] = settings["name"]
        deployment["parameters"] = _parameters(deployment, settings["name"], file, folder)
        if "schedules" in deployment and settings["schedule"]["cron"]:
            chosen = {"cron": settings["schedule"]["cron"], "timezone": settings["schedule"]["timezone"]}
            deployment["schedules"] = [{**chosen, "slug": "config", "active": True}]
    return plan


def _parameters(deployment: Mapping[str, Any], name: str, file: Path, folder: Path | None) -> dict[str, Any]:
    if "config" not in deployment["parameters"]:
        return {"name": name}
    return {"config": str(file.resolve()), "data_dir": str(folder.resolve()) if folder else None}


def deploy(plan: Mapping[str, Any], pool: str) -> list[str]:
    """Tell the server that PREFECT_API_URL names; returns the deployments' names as Prefect says them."""
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.workers.process import ProcessWorker

    with (
        temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"]}),
        get_client(sync_client=True) as client,
    ):
        client.upsert_global_concurrency_limit_by_name("gpu", 1)
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template), overwrite=True)
        _watch_for_zombies(client)
        names = [
            f"{deployment['entrypoint'].rpartition(':')[2]}/{deployment['name']}" for deployment in plan["deployments"]
        ]
        deployments = [
            _keeping_schedules(client, name, deployment)
            for name, deployment in zip(names, plan["deployments"], strict=True)
        ]
    _prefect_deploy({**plan, "deployments": deployments})
    return names


def _keeping_schedules(client: Any, name: str, deployment: Mapping[str, Any]) -> dict[str, Any]:
    """The deployment less prefect.yaml's sleeping schedule where the server has the deployment already."""
    from prefect.exceptions import ObjectNotFound

    asleep = not any(schedule["active"] for schedule in deployment.get("schedules", ()))
    try:
        client.read_deployment_by_name(name)
    except ObjectNotFound:
        return dict(deployment)
    return {key: value for key, value in deployment.items() if not (key == "schedules" and asleep)}


def _watch_for_zombies(client: Any) -> None:
    """Make or renew the automation that turns a run without heartbeats into a crashed one."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    ends = ("Completed", "Failed", "Cancelled", "Crashed")
    automation = AutomationCore(
        name=ZOMBIES,
        description=f"No heartbeat for {HEARTBEATS_STOPPED_S} s and no end: the process was killed.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ends)},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=HEARTBEATS_STOPPED_S,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="Its heartbeats stopped: the process was killed. Run it again; it goes on.",
            )
        ],
    )
    known = client.read_automations_by_name(ZOMBIES)
    if known:
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)


def _prefect_deploy(plan: Mapping[str, Any]) -> None:
    """Run `prefect deploy` on the rendered file, which stays beside the services' logs."""
    import yaml

    file = store.home() / "services" / "prefect.yaml"
    file.write_text(yaml.safe_dump(dict(plan), sort_keys=False), encoding="utf-8")
    control = environments.find("control")
    command = environments.command(control, "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file))
    environ = environments.child_environ(control, tuple(os.environ))
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ServingError(
            f"prefect deploy failed: {(ended.stdout + ended.stderr).strip()[-500:]}",
            file=str(file),
            remedy="tunegate down, then tunegate up",
        )


def main() -> None:
    """`python -m flows.deploy CONFIG [DATA_DIR]`: the deployments alone, where `tunegate up` starts no worker."""
    config, *data = map(Path, sys.argv[1:])
    (store.home() / "services").mkdir(parents=True, exist_ok=True)
    print(*deploy(rendered(config, data[0] if data else None), "tunegate"), sep="\n")


if __name__ == "__main__":
    main()
