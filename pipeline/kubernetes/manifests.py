"""Kubernetes manifests as plain JSON: a stage's job, the pod of a flow run, and what both need to be there.

A job's command is the stage program itself, with the request that lies on the volume. The volume is mounted where mlruns lies in
the flow's pod, so a path means the same in both. Containers don't run as root, root file systems are read-only, and secrets are
named and never read. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.digests import digest_of

Manifest = dict[str, Any]

USER = 65532  # docker/pipeline.Dockerfile's
WORKDIR = "/tunegate"
HOME = Path("/mlruns")
CONFIGS = Path("/config")
PLACES = {"TUNEGATE_HOME": str(HOME), "HF_HOME": str(HOME / "hub")}  # both on the volume
# Set in a flow's pod alone: the claim mounted as its mlruns, its image, and the pod that its jobs go with.
CLAIM, IMAGE, POD, POD_UID = "TUNEGATE_CLAIM", "TUNEGATE_IMAGE", "TUNEGATE_POD", "TUNEGATE_POD_UID"
# The secrets of a flow's own run, beside those that the config names.
SECRETS = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
CONTAINER = "stage"
FLOW_TTL_S = 900  # the job of a killed flow goes with its pod, and must not hold a GPU for a day


def named(prefix: str, name: str) -> str:
    """`prefix`-`name` as a DNS label (at most 63 of a-z, 0-9, -). A changed name gets its digest, so that names stay apart."""
    plain = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")
    whole = f"{prefix}-{plain}"
    return whole if plain == name and len(whole) <= 63 else f"{whole[:54].rstrip('-')}-{digest_of(name)[:8]}"


def config_file(name: str) -> Path:
    """Where a flow's pod has the config of this name mounted."""
    return CONFIGS / f"{name}.yaml"


def stage_job(
    cluster: Mapping[str, Any],
    stage: str,
    name: str,
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    secrets: Sequence[str] = (),
    timeout_s: float = 86400,
    home: Path = HOME,
    shm_size: str = "1GiB",
    owner: tuple[str, str] | None = None,
) -> Manifest:
    """The job that runs a stage program once.

    `owner` is the name and uid of the flow's pod: with it the cluster ends the job when that pod is deleted.
    """
    env = {**cluster["env"], **environ}
    container = _container(cluster, cluster["jobs"][stage], CONTAINER, _variables(env, cluster, secrets))
    job = _job(
        cluster, stage, _pod(cluster, cluster["jobs"][stage], {**container, "command": list(command)}, home, shm_size)
    )
    job["metadata"] |= {"name": name}
    job["spec"] |= {"activeDeadlineSeconds": int(timeout_s)}
    job["spec"]["template"]["spec"] |= {"automountServiceAccountToken": False}
    if owner:
        reference = {"apiVersion": "v1", "kind": "Pod", "name": owner[0], "uid": owner[1]}
        job["metadata"] |= {"ownerReferences": [reference]}
    return job


def flow_job(
    cluster: Mapping[str, Any], name: str, environ: Mapping[str, str], secrets: Sequence[str], shm_size: str = "1GiB"
) -> Manifest:
    """The job of a run of the config `name`, as Prefect's worker takes it: with placeholders for the values that the worker fills in."""
    plain = {**cluster["env"], **environ, **PLACES, CLAIM: cluster["claim_name"], IMAGE: cluster["image"]}
    env = _variables(plain, cluster, [*SECRETS, *secrets])
    for variable, field in ((POD, "metadata.name"), (POD_UID, "metadata.uid")):
        env.append({"name": variable, "valueFrom": {"fieldRef": {"fieldPath": field}}})
    container = _container(cluster, cluster["flow"], "prefect-job", env) | {"args": "{{ command }}"}
    pod = _pod(cluster, cluster["flow"], container, HOME, shm_size)
    pod["serviceAccountName"] = cluster["service_account_name"]
    pod["volumes"].append({"name": "config", "configMap": {"name": named("tunegate-config", name)}})
    container["volumeMounts"].append({"name": "config", "mountPath": str(CONFIGS), "readOnly": True})
    pod |= {"parallelism": 1, "completions": 1}  # no fields of a pod; Prefect's worker refuses a template without them
    job = _job(cluster, "flow", pod)
    job["spec"] |= {"ttlSecondsAfterFinished": min(cluster["finished_job_ttl"], FLOW_TTL_S)}
    job["metadata"] |= {"generateName": "{{ name }}-", "labels": "{{ labels }}", "annotations": "{{ annotations }}"}
    return job


def base_job_template(job: Manifest) -> Manifest:
    """The work pool's template around a flow's job: a deployment may choose command, variables, labels and annotations."""
    namespace = job["metadata"]["namespace"]
    mapping = {"type": "object", "additionalProperties": {"type": "string"}, "default": {}}
    properties = {
        "name": {"title": "Name", "type": "string", "default": "tunegate"},
        "command": {"title": "Command", "type": "string"},
        "env": {"title": "Environment Variables", **mapping},
        "labels": {"title": "Labels", **mapping, "default": _labels("flow")},
        "annotations": {"title": "Annotations", **mapping},
    }
    names = {name: f"{{{{ {name} }}}}" for name in properties}
    return {
        "job_configuration": {**names, "namespace": namespace, "job_manifest": job},
        "variables": {"type": "object", "properties": properties},
    }


def needed(cluster: Mapping[str, Any], name: str, config_text: str) -> list[Manifest]:
    """The objects that the first run of the config `name` needs: the volume, the config, and the right to make jobs.

    The configs of a namespace share all but the ConfigMap; the Secret is the user's.
    """
    account = cluster["service_account_name"]
    claim: Manifest = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": cluster["storage"]}},
    }
    if cluster["storage_class_name"]:
        claim["storageClassName"] = cluster["storage_class_name"]
    rules = [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    group = "rbac.authorization.k8s.io"
    binding = {
        "roleRef": {"apiGroup": group, "kind": "Role", "name": account},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": cluster["namespace"]}],
    }
    return [
        _object(cluster, "v1", "PersistentVolumeClaim", cluster["claim_name"], spec=claim),
        _object(cluster, "v1", "ConfigMap", named("tunegate-config", name), data={config_file(name).name: config_text}),
        _object(cluster, "v1", "ServiceAccount", account),
        _object(cluster, f"{group}/v1", "Role", account, rules=rules),
        _object(cluster, f"{group}/v1", "RoleBinding", account, **binding),
    ]


def _job(cluster: Mapping[str, Any], component: str, pod: Manifest) -> Manifest:
    job = _object(cluster, "batch/v1", "Job")
    job["metadata"]["labels"] = _labels(component)
    metadata = {
        "labels": _labels(component),
        "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
    }
    job["spec"] = {
        "backoffLimit": 0,  # Prefect retries, and knows which failures are worth it
        "ttlSecondsAfterFinished": cluster["finished_job_ttl"],
        "template": {"metadata": metadata, "spec": pod},
    }
    return job


def _pod(
    cluster: Mapping[str, Any], pod: Mapping[str, Any], container: Manifest, home: Path, shm_size: str
) -> Manifest:
    quantity = re.sub(r"\s|B$", "", shm_size)
    container["volumeMounts"] = [
        {"name": "mlruns", "mountPath": str(home)},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of the pod's own
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - likewise
    ]
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 30,
        "enableServiceLinks": False,  # a service called vllm would set VLLM_PORT
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "mlruns", "persistentVolumeClaim": {"claimName": cluster["claim_name"]}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": quantity}},
        ],
    }
    options = {
        "nodeSelector": dict(pod["node_selector"]),
        "tolerations": [dict(entry) for entry in pod["tolerations"]],
        "imagePullSecrets": [{"name": name} for name in cluster["image_pull_secrets"]],
    }
    return spec | {name: option for name, option in options.items() if option}


def _container(cluster: Mapping[str, Any], pod: Mapping[str, Any], name: str, env: list[Manifest]) -> Manifest:
    return {
        "name": name,
        "image": cluster["image"],
        "imagePullPolicy": "IfNotPresent",  # a digest never means another image
        "workingDir": WORKDIR,
        "env": env,
        "resources": {name: quantities for name, amounts in pod["resources"].items() if (quantities := _text(amounts))},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _variables(environ: Mapping[str, str], cluster: Mapping[str, Any], secrets: Sequence[str]) -> list[Manifest]:
    """Plain variables, then the secrets by their place in the user's Secret; a secret that it lacks stays unset."""
    plain = [{"name": name, "value": text} for name, text in environ.items()]
    keys = [{"name": cluster["secret_name"], "key": name, "optional": True} for name in dict.fromkeys(secrets)]
    return [*plain, *({"name": key["key"], "valueFrom": {"secretKeyRef": key}} for key in keys)]


def _text(quantities: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(quantity) for name, quantity in quantities.items()}


def _labels(component: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "tunegate", "app.kubernetes.io/component": component}


def _object(
    cluster: Mapping[str, Any], api_version: str, kind: str, name: str | None = None, **content: Any
) -> Manifest:
    metadata = {"namespace": cluster["namespace"], **({"name": name} if name else {})}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **content}
