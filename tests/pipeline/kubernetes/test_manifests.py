"""What would be applied: by Kubernetes' own schemas, by Prefect's own worker, and by our promises."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import uuid
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from prefect import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from flows import cli, deployments
from pipeline.environments import interpreters
from pipeline.errors import ConfigError
from pipeline.kubernetes import manifests
from pipeline.plan.steps import all_steps

DOCUMENTED = Path(__file__).parents[3] / "docs" / "kubernetes.md"
VERSIONS = sorted(set(kubernetes_validate.utils.all_versions()))
KINDS = {"PersistentVolumeClaim", "ConfigMap", "ServiceAccount", "Role", "RoleBinding"}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A config with the section that docs/kubernetes.md shows, and all kinds of secrets."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    (section,) = re.findall(r"```yaml\n(kubernetes:.*?)```", DOCUMENTED.read_text(encoding="utf-8"), re.DOTALL)
    judge = "{base_url: 'http://judge/v1', model: m, api_key_env: JUDGE_KEY}"
    text = (
        f"name: tickets\ndatasets: [{{path: rows.jsonl}}]\nnotify: {{webhook_env: HOOK}}\nevaluate: {{judges: [{judge}]}}\n"
        f"gate: {{judges: [{{against: base}}]}}\n{section.replace('sha256:…', 'sha256:' + 'a' * 64)}"
    )
    made = tmp_path / "use.yaml"
    made.write_text(text, encoding="utf-8")
    return made


@pytest.fixture
def printed(file, capsys):
    """What `tunegate manifests` prints with these options."""

    def show(*options):
        with pytest.raises(SystemExit) as ended:
            cli.main(["manifests", str(file), *options])
        assert not ended.value.code
        return list(yaml.safe_load_all(capsys.readouterr().out))

    return show


@pytest.fixture
def stage_jobs(printed):
    """The jobs of the stages, by component."""
    _, *found = printed("--jobs")
    return {job["metadata"]["labels"]["app.kubernetes.io/component"]: job for job in found}


def pod_of(job):
    """A job's pod and its only container."""
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def worker_job(template, **variables):
    """The job that Prefect's worker makes of a pool's template for a flow run, by its own code."""
    make = KubernetesWorkerJobConfiguration.from_template_and_values
    made = asyncio.run(make(template, variables))
    made.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="brave-owl"))
    return made.job_manifest


@pytest.fixture
def flow_job(file):
    """The job of a flow run, with Prefect's places in it."""
    return deployments.template(deployments._cluster_config(file))["job_configuration"]["job_manifest"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid_by_kubernetes_own_schema(printed, stage_jobs, version):
    """Strictly, an unknown field being an error, in each version that the package carries."""
    needed = printed()
    assert {each["kind"] for each in needed} == KINDS
    assert len(needed) == len(KINDS)
    for manifest in [*needed, *stage_jobs.values()]:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schema_refuses_a_misspelt_field(stage_jobs):
    """So the test above can fail."""
    job = stage_jobs["finetune"]
    job["spec"]["activeDeadlineSecond"] = 5
    with pytest.raises(kubernetes_validate.ValidationError, match="activeDeadlineSecond"):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.slow
def test_a_server_is_told_and_its_pool_makes_a_valid_job(file, tmp_path, monkeypatch):
    """The pool and both deployments are on a real server; Prefect's own worker makes its job of what the server has.

    But for two fields in the pod, which the worker itself demands and a cluster ignores, the job is valid.
    """
    with prefect_test_harness(server_startup_timeout=120):
        monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
        (tmp_path / "home" / "services").mkdir(parents=True)
        monkeypatch.setattr(sys, "argv", ["deploy", str(file), "/mlruns/rows", "--pool", "kubernetes"])
        with pytest.raises(SystemExit) as ended:
            deployments.main()
        assert ended.value.code in (0, None)
        with get_client(sync_client=True) as client:
            pool = client.read_work_pool("tunegate-kubernetes-tickets")
            found = [client.read_deployment_by_name(f"{name}/tickets") for name in ("build", "retrain")]
        job = worker_job(pool.base_job_template, env={"PREFECT_API_URL": "http://prefect:4200/api"})
    assert pool.type == "kubernetes"
    for deployment in found:
        assert deployment.work_pool_name == pool.name
        assert deployment.parameters == {"config": "/config/tickets.yaml", "data_dir": "/mlruns/rows"}
        assert deployment.pull_steps == [{deployments.WORKING: {"directory": "/tunegate"}}]
    pod, container = pod_of(job)
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    kubernetes_validate.validate(job, VERSIONS[-1], strict=True)
    assert container["args"] == ["prefect", "flow-run", "execute"]
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["PREFECT_API_URL"]["value"] == "http://prefect:4200/api"
    assert env[manifests.CLAIM]["value"] == "tunegate"
    assert env[manifests.IMAGE]["value"] == container["image"]
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "tunegate"
    assert job["spec"]["backoffLimit"] == 0
    assert job["metadata"]["generateName"].endswith("-")
    assert job["metadata"]["labels"]["app.kubernetes.io/component"] == "flow"


def test_the_template_offers_what_prefects_own_offers(file):
    """A deployment's job_variables that are offered are those that Prefect's Kubernetes worker knows."""
    ours = deployments.template(deployments._cluster_config(file))
    theirs = KubernetesWorker.get_default_base_job_template()
    assert set(ours["variables"]["properties"]) < set(theirs["variables"]["properties"])
    assert set(ours["job_configuration"]) <= set(theirs["job_configuration"])


def test_each_pod_is_kept_in(file, flow_job, stage_jobs):
    """Not root, no privilege, a read-only root, nothing retried by the cluster; only a flow may speak to the API."""
    for job in (flow_job, *stage_jobs.values()):
        pod, container = pod_of(job)
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == manifests.USER
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert pod["restartPolicy"] == "Never"
        assert job["spec"]["backoffLimit"] == 0
        assert job["spec"]["ttlSecondsAfterFinished"] > 0
        assert not {"hostPath"} & {kind for volume in pod["volumes"] for kind in volume}
        assert (pod.get("automountServiceAccountToken") is False) == (job is not flow_job)
    rules = manifests.needed(deployments._cluster_config(file)["kubernetes"], "x", "")[3]["rules"]
    assert not any("*" in values for rule in rules for values in rule.values())
    assert not any("secrets" in rule["resources"] for rule in rules)


def test_a_killed_flows_pod_and_so_its_stages_job_goes_soon(flow_job, stage_jobs):
    """A stage's finished job stays as long as the config says."""
    assert flow_job["spec"]["ttlSecondsAfterFinished"] == manifests.FLOW_TTL_S
    assert {job["spec"]["ttlSecondsAfterFinished"] for job in stage_jobs.values()} == {86400}


def test_no_secret_stands_in_a_manifest(file, flow_job, printed, monkeypatch):
    """Each is named by its key in the user's Secret, also when it is set where the manifests are made."""
    for name in ("HF_TOKEN", "JUDGE_KEY", "HOOK", "TUNEGATE_API_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "a-secret-value")
    shown = json.dumps([*printed(), *printed("--jobs"), deployments.template(deployments._cluster_config(file))])
    assert "a-secret-value" not in shown
    _, container = pod_of(flow_job)
    asked = {entry["name"] for entry in container["env"] if "secretKeyRef" in entry.get("valueFrom", {})}
    assert asked == {"HF_TOKEN", "JUDGE_KEY", "HOOK", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"}
    assert not any(interpreters.SECRET.search(entry["name"]) for entry in container["env"] if "value" in entry)


def test_a_secret_among_the_plain_variables_is_refused(file):
    """With the command that puts it where it belongs."""
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r"  env:.*\n", "  env:\n    HF_TOKEN: hf_x\n", text), encoding="utf-8")
    with pytest.raises(ConfigError, match="kubectl create secret generic tunegate --from-literal=HF_TOKEN") as error:
        deployments._cluster_config(file)
    assert "use.yaml:" in str(error.value)


@pytest.mark.parametrize(
    ("section", "variable", "words"),
    [
        ("kubernetes", "HOOK: https://hooks.example.com/T0/B0", "is a secret"),  # by notify.webhook_env alone
        ("kubernetes", "JUDGE_KEY: j", "is a secret"),
        ("kubernetes", "MLFLOW_TRACKING_URI: http://user:hunter2@mlflow:5000", "MLFLOW_TRACKING_PASSWORD"),
        ("kubernetes", "DATABASE: postgresql://:hunter2@db/prefect", "holds a password"),
        ("kubernetes", "DATABASE: host=db password=hunter2", "holds a password"),
        ("serve", "VLLM_S3: http://user:hunter2@s3", "holds a password"),
    ],
)
def test_a_secret_of_any_name_or_inside_a_url_is_refused(file, section, variable, words):
    """It would stand in the ConfigMap, in each pod, in Prefect's pool and in MLflow; the error doesn't repeat it."""
    text = file.read_text(encoding="utf-8")
    if section == "kubernetes":
        text = re.sub(r"  env:.*\n", "  env:\n", text)
        text = text.replace("    MLFLOW_TRACKING_URI: http://mlflow.tunegate:5000\n", f"    {variable}\n")
    else:
        text += f"serve:\n  env:\n    {variable}\n"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as error:
        deployments._cluster_config(file)
    assert f"{section}.env.{variable.partition(':')[0]}" in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("value", ["http://mlflow:5000/a@b", "https://host/v1?x=1", "all"])
def test_a_plain_address_is_no_secret(file, value):
    """A port isn't a password."""
    text = file.read_text(encoding="utf-8").replace("http://mlflow.tunegate:5000", value)
    file.write_text(text, encoding="utf-8")
    assert deployments._cluster_config(file)["kubernetes"]["env"] == {"MLFLOW_TRACKING_URI": value}


def test_a_stages_job_is_its_program_on_the_node_that_the_config_asks_for(file, stage_jobs):
    """The command of a child process, the stage's own timeout, the GPU, and secrets for those that read the hub."""
    config = deployments._cluster_config(file)
    steps = {step.stage: step for step in all_steps(config)}
    assert set(stage_jobs) == set(config["kubernetes"]["jobs"])
    for stage, job in stage_jobs.items():
        pod, container = pod_of(job)
        assert container["command"][1:4] == ["-P", "-m", steps[stage].program]
        assert container["command"][4].endswith("/request.json")
        assert job["spec"]["activeDeadlineSeconds"] == steps[stage].timeout_hours * 3600
        asked = config["kubernetes"]["jobs"][stage]
        assert container["resources"].get("limits", {}) == {k: str(v) for k, v in asked["resources"]["limits"].items()}
        assert pod.get("nodeSelector", {}) == asked["node_selector"]
        assert {"name": "mlruns", "mountPath": "/mlruns"} in container["volumeMounts"]
    _, container = pod_of(stage_jobs["finetune"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert not any("valueFrom" in entry for entry in container["env"])


def test_the_image_has_what_the_manifests_say():
    """Its user, its folder and its volume are the Dockerfile's."""
    text = (Path(__file__).parents[3] / "docker" / "pipeline.Dockerfile").read_text(encoding="utf-8")
    assert f"USER {manifests.USER}:{manifests.USER}" in text
    assert f"WORKDIR {manifests.WORKDIR}\n" in text
    assert f"TUNEGATE_HOME={manifests.HOME} " in text


def test_a_clusters_deployments_are_those_that_a_pod_can_run(file):
    """Build and retrain, with the mounted config and the volume's data; promotion is left to the serving machine."""
    found = deployments.rendered_for_cluster(file, None)
    assert [entry["entrypoint"].rpartition(":")[2] for entry in found["deployments"]] == ["build", "retrain"]
    for entry in found["deployments"]:
        assert entry["work_pool"] == {"name": "tunegate-kubernetes-tickets"}
        assert entry["parameters"] == {"config": "/config/tickets.yaml", "data_dir": "/mlruns/data"}
    assert found["pull"] == [{deployments.WORKING: {"directory": "/tunegate"}}]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("namespace", "Über"), ("namespace", "a.b"), ("claim_name", "my claim"), ("secret_name", "a_b"), ("storage", "200 GB"),
        ("service_account_name", "-a"), ("storage_class_name", "Fast"), ("image_pull_secrets", ["x!"]), ("env", {"A-B": "x"}),
        ("flow", {"node_selector": {"a": "b c!!"}}), ("flow", {"node_selector": {"b c!!": "a"}}),
        ("flow", {"resources": {"limits": {"memory": "64 Gi"}}}), ("flow", {"resources": {"requests": {"cpu cores": 4}}}),
    ],
)  # fmt: skip
def test_what_a_cluster_would_refuse_is_refused_in_the_config(file, key, value):
    """With the key and the line, before anything is applied."""
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config["kubernetes"][key] = value
    file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        deployments._cluster_config(file)
    assert f"kubernetes.{key}" in str(error.value)
    assert "use.yaml:" in str(error.value)


def test_what_a_cluster_takes_is_taken(file):
    """Quantities and names as they are common."""
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    quantities = {"cpu": "1.5", "memory": "1e9", "ephemeral-storage": "20Gi", "nvidia.com/mig-1g.5gb": 1}
    config["kubernetes"] |= {"storage_class_name": "fast.nfs-4", "claim_name": "a.b"}
    config["kubernetes"]["flow"] = {
        "resources": {"limits": quantities, "requests": {"cpu": "500m"}},
        "node_selector": {"topology.kubernetes.io/zone": "eu_1.A", "empty": ""},
    }
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert deployments._cluster_config(file)["kubernetes"]["flow"]["resources"]["limits"] == quantities


def test_two_configs_share_a_cluster(file, printed):
    """Each has a ConfigMap and a pool of its own, and its pods mount its own; volume and rights are common."""
    text = file.read_text(encoding="utf-8")
    seen = []
    for name in ("tickets", "Letters.v2"):
        file.write_text(text.replace("name: tickets", f"name: {name}"), encoding="utf-8")
        job = deployments.template(deployments._cluster_config(file))["job_configuration"]["job_manifest"]
        (mounted,) = (volume["configMap"] for volume in pod_of(job)[0]["volumes"] if "configMap" in volume)
        (deployment, *_) = deployments.rendered_for_cluster(file, None)["deployments"]
        (shown, *shared) = sorted(printed(), key=lambda manifest: manifest["kind"])
        assert shown["metadata"]["name"] == mounted["name"]
        assert deployment["parameters"]["config"] == f"/config/{next(iter(shown['data']))}"
        seen.append((mounted["name"], deployment["work_pool"]["name"], shared))
    assert seen[0][0] == "tunegate-config-tickets"
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]
    assert seen[0][2] == seen[1][2]


def test_a_name_becomes_a_label_of_its_own():
    """As Kubernetes takes it, and two names never the same."""
    names = ["a", "A", "a.b", "a-b", "a_b", "x" * 63, f"{'x' * 62}y", "a-", "-".join("abcdefghijklmnopqrstuvwxyz")]
    made = [manifests.named("tunegate-kubernetes", name) for name in names]
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", label) for label in made)
    assert len(set(made)) == len(names)
    assert made[3] == "tunegate-kubernetes-a-b"


def test_a_files_name_is_no_name_in_a_cluster(file, monkeypatch, capsys):
    """A ConfigMap's keys have no blank."""
    other = file.with_name("my use.yaml")
    other.write_text(file.read_text(encoding="utf-8").replace("name: tickets\n", ""), encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["manifests", str(other)])
    shown = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(capsys.readouterr().out)}
    assert list(shown["ConfigMap"]["data"]) == ["my-use.yaml"]


def test_a_config_without_a_cluster_is_told_what_is_missing(tmp_path, monkeypatch, capsys):
    """Where the section is described, too."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    bare = tmp_path / "use.yaml"
    bare.write_text("datasets: [{path: rows.jsonl}]\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tunegate", "manifests", str(bare)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == ConfigError.exit_code
    assert "docs/kubernetes.md" in capsys.readouterr().err
