"""The deployments of one config on Prefect's server, with pool, GPU limit and an automation for zombies; a cluster's manifests.

Self-hosted Prefect leaves a killed run in the state Running for ever; an automation made here calls it crashed when its
heartbeats stop. A schedule that a person switched on in Prefect's page stays unless the config names one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.surroundings import QUIET
from pipeline import store
from pipeline.environments import interpreters
from pipeline.environments.interpreters import Environment
from pipeline.errors import ConfigError, ServingError
from pipeline.kubernetes import manifests
from pipeline.plan import resolve, steps

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.yaml"
WORKING = "prefect.deployments.steps.set_working_directory"
POOL = "tunegate"
CLUSTER_DATA = manifests.HOME / "data"
HEARTBEATS_STOPPED_S = 120
ZOMBIES = "tunegate: a run whose heartbeats stopped has crashed"


def cluster_pool(name: str) -> str:
    """The work pool of the config `name` on a cluster: its template is this config's."""
    return manifests.named("tunegate-kubernetes", name)


def rendered(config: Path | None, data_dir: Path | None) -> dict[str, Any]:
    """The deployments of prefect.yaml for a config (default: the demo's), with absolute paths.

    Raises ConfigError when the config is wrong.
    """
    import yaml

    file = config or DEMO
    folder = data_dir or (None if config else store.home() / "demo")
    settings = resolve.resolve(file, data_dir=folder)
    prefect_file: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    prefect_file["pull"] = [{WORKING: {"directory": str(ROOT)}}]
    for deployment in prefect_file["deployments"]:
        deployment["name"] = settings["name"]
        deployment["parameters"] = _parameters(deployment, settings["name"], file, folder)
        if "schedules" in deployment and settings["schedule"]["cron"]:
            schedule = {"cron": settings["schedule"]["cron"], "timezone": settings["schedule"]["timezone"]}
            deployment["schedules"] = [{**schedule, "slug": "config", "active": True}]
    return prefect_file


def rendered_for_cluster(config: Path, data_dir: Path | None) -> dict[str, Any]:
    """The deployments for flow runs in the pipeline's image: its folder, the config that a pod has mounted, data on the volume.

    Promotion is left out: it puts vLLM behind Caddy on the machine that it runs on. Raises ConfigError likewise.
    """
    prefect_file = rendered(config, data_dir or CLUSTER_DATA)
    prefect_file["pull"] = [{WORKING: {"directory": manifests.WORKDIR}}]
    prefect_file["deployments"] = [entry for entry in prefect_file["deployments"] if "config" in entry["parameters"]]
    for deployment in prefect_file["deployments"]:
        deployment["work_pool"] = {"name": cluster_pool(deployment["name"])}
        deployment["parameters"] |= {"config": str(manifests.config_file(deployment["name"]))}
    return prefect_file


def template(config: Mapping[str, Any]) -> dict[str, Any]:
    """The base job template of the cluster's work pool."""
    return manifests.base_job_template(_flow_job(config))


def show(options: argparse.Namespace) -> int:
    """`tunegate manifests`: print the objects to apply for a config's builds, or with --jobs the jobs that builds make.

    Nothing is applied. Raises ConfigError when the config is wrong or lacks the section `kubernetes`.
    """
    import yaml

    config = _cluster_config(options.config)
    if options.jobs:
        objects = jobs(config)
    else:
        text = options.config.read_text(encoding="utf-8")
        objects = manifests.needed(config["kubernetes"], config["name"], text)
    print(yaml.safe_dump_all(objects, sort_keys=False, width=140), end="")
    return 0


def jobs(config: Mapping[str, Any]) -> list[manifests.Manifest]:
    """The job of a flow run, with Prefect's placeholders, and each stage's job, for a folder whose key isn't known yet."""
    from flows.stages import SECRETS_OF

    stage_jobs = [_flow_job(config)]
    for step in steps.all_steps(config):
        if step.stage not in config["kubernetes"]["jobs"]:
            continue
        module, root = step.program, Path(manifests.WORKDIR)
        interpreter = Environment(step.environment, root / ".venv" / step.environment / "bin" / "python")
        request = manifests.HOME / "work" / step.stage / ".KEY.partial" / "request.json"
        command = [*interpreters.command(interpreter, module), str(request)]
        environ = {"PYTHONPATH": str(root), **manifests.PLACES}
        stage_jobs.append(
            manifests.stage_job(
                config["kubernetes"], step.stage, f"tunegate-{step.stage}-key", command, environ,
                secrets=SECRETS_OF.get(module, ()), timeout_s=step.timeout_hours * 3600, shm_size=_shm_size(config),
            )
        )  # fmt: skip
    return stage_jobs


def _flow_job(config: Mapping[str, Any]) -> manifests.Manifest:
    environ = {
        **QUIET,
        "PREFECT_HOME": "/tmp/prefect",  # noqa: S108 - an emptyDir of the pod's own
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }
    secrets = sorted(interpreters.secrets_named(config) - {config["promote"]["api_key_env"]})
    return manifests.flow_job(config["kubernetes"], config["name"], environ, secrets, _shm_size(config))


def _shm_size(config: Mapping[str, Any]) -> str:
    return str(config["serve"]["container"]["shm_size"])


def _cluster_config(file: Path) -> dict[str, Any]:
    config = resolve.resolve(file, data_dir=CLUSTER_DATA)
    if not config["kubernetes"]:
        raise ConfigError(
            "the config must name a cluster",
            file=str(file),
            key="kubernetes",
            allowed="{image: name@sha256:…, flow: {resources: …}, jobs: {finetune: {resources: …}}}",
            remedy="add the section; docs/kubernetes.md shows one",
        )
    return config


def _parameters(deployment: Mapping[str, Any], name: str, file: Path, folder: Path | None) -> dict[str, Any]:
    if "config" not in deployment["parameters"]:
        return {"name": name}
    return {"config": str(file.resolve()), "data_dir": str(folder.resolve()) if folder else None}


def deploy(prefect_file: Mapping[str, Any], pool: str, cluster_template: Mapping[str, Any] | None = None) -> list[str]:
    """Make the deployments on the server that PREFECT_API_URL names; returns their names as Prefect shows them.

    The pool runs flows as processes of its worker, or with a template as a cluster's jobs.
    """
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.workers.process import ProcessWorker

    with (
        temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"]}),
        get_client(sync_client=True) as client,
    ):
        client.upsert_global_concurrency_limit_by_name("gpu", 1)
        kind = "kubernetes" if cluster_template else "process"
        pool_template = dict(cluster_template or ProcessWorker.get_default_base_job_template())
        client.create_work_pool(WorkPoolCreate(name=pool, type=kind, base_job_template=pool_template), overwrite=True)
        _watch_for_zombies(client)
        names = [
            f"{deployment['entrypoint'].rpartition(':')[2]}/{deployment['name']}"
            for deployment in prefect_file["deployments"]
        ]
        deployments = [
            _keeping_schedules(client, name, deployment)
            for name, deployment in zip(names, prefect_file["deployments"], strict=True)
        ]
    _prefect_deploy({**prefect_file, "deployments": deployments})
    return names


def _keeping_schedules(client: Any, name: str, deployment: Mapping[str, Any]) -> dict[str, Any]:
    """The deployment less prefect.yaml's sleeping schedule where the server has the deployment already."""
    from prefect.exceptions import ObjectNotFound

    asleep = not any(schedule["active"] for schedule in deployment.get("schedules", ()))
    try:
        client.read_deployment_by_name(name)
    except ObjectNotFound:
        return dict(deployment)
    return {key: entry for key, entry in deployment.items() if not (key == "schedules" and asleep)}


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
    automations = client.read_automations_by_name(ZOMBIES)
    if automations:
        client.update_automation(automations[0].id, automation)
    else:
        client.create_automation(automation)


def _prefect_deploy(prefect_file: Mapping[str, Any]) -> None:
    """Run `prefect deploy` on the rendered file, which stays beside the services' logs."""
    import yaml

    file = store.home() / "services" / "prefect.yaml"
    file.write_text(yaml.safe_dump(dict(prefect_file), sort_keys=False), encoding="utf-8")
    control = interpreters.find("control")
    command = interpreters.command(control, "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file))
    environ = interpreters.child_environ(control, tuple(os.environ))
    process = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if process.returncode:
        raise ServingError(
            f"prefect deploy failed: {(process.stdout + process.stderr).strip()[-500:]}",
            file=str(file),
            remedy="tunegate down, then tunegate up",
        )


def deploy_config(options: argparse.Namespace) -> int:
    """`tunegate deploy`: a config's deployments alone, where `tunegate up` starts no worker.

    Raises ConfigError when the config is wrong, ServingError when no Prefect server is named.
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise ServingError(
            "PREFECT_API_URL is not set",
            remedy="PREFECT_API_URL=http://HOST:4200/api tunegate deploy CONFIG, or tunegate up for a server here",
        )
    (store.home() / "services").mkdir(parents=True, exist_ok=True)
    if options.pool == "kubernetes":
        config = _cluster_config(options.config)
        pool = cluster_pool(config["name"])
        names = deploy(rendered_for_cluster(options.config, options.data_dir), pool, template(config))
        print(f"work pool {pool}:")
    else:
        names = deploy(rendered(options.config, options.data_dir), POOL)
    print(*names, sep="\n")
    return 0


def main() -> None:
    """`python -m flows.deployments`: the same as `tunegate deploy`."""
    from flows import cli

    cli.main(["deploy", *sys.argv[1:]])


if __name__ == "__main__":
    main()
