"""How builds run on a cluster, in the names of Kubernetes and of Prefect's worker for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section import PositiveInt, Section

# Forms that Kubernetes takes: names (RFC 1123), labels with their values, environment variables, quantities.
NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
DnsLabel = Annotated[str, Field(pattern=f"^{NAME}$", examples=["tunegate"])]
DnsName = Annotated[
    str, Field(pattern=rf"^{NAME}(\.{NAME})*$", max_length=253, examples=["tunegate", "tunegate.example"])
]
LabelKey = Annotated[str, Field(pattern=rf"^({NAME}(\.{NAME})*/)?{LABEL}$")]
LabelValue = Annotated[str, Field(pattern=f"^({LABEL})?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Quantity = Annotated[
    str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i|[eE][0-9]+)?$", examples=["500m", "200Gi"])
]


class ResourcesConfig(Section):
    """A pod's requests to its node, in Kubernetes' own names and quantities, such as {cpu: 2, memory: 8Gi, nvidia.com/gpu: 1}."""

    requests: dict[LabelKey, Quantity | int] = Field(default_factory=dict)
    limits: dict[LabelKey, Quantity | int] = Field(default_factory=dict)


class PodConfig(Section):
    """A pod's node, and its share of it."""

    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    tolerations: tuple[dict[str, str | int], ...] = Field(
        (), description="as in a pod's spec: key, operator, effect, …"
    )


class KubernetesConfig(Section):
    """Flow runs as jobs on a cluster, and the stages that get a job of their own; names are Kubernetes' and its Prefect worker's."""

    image: str = Field(
        pattern=r"@sha256:[0-9a-f]{64}$",
        examples=["registry.example/tunegate@sha256:DIGEST"],
        description="docker/pipeline.Dockerfile's image with its digest, name@sha256:…",
    )
    namespace: DnsLabel = "tunegate"
    claim_name: DnsName = Field("tunegate", description="the PersistentVolumeClaim (ReadWriteMany) that holds mlruns")
    storage: Quantity = Field("200Gi", description="size of that claim")
    storage_class_name: DnsName | None = Field(None, description="of that claim; default: the cluster's own")
    service_account_name: DnsName = Field("tunegate", description="of flow runs, which make the stages' jobs")
    secret_name: DnsName = Field("tunegate", description="the Secret whose keys are variables, such as HF_TOKEN")
    image_pull_secrets: tuple[DnsName, ...] = ()
    env: dict[VariableName, str] = Field(
        default_factory=dict, description="of every pod, such as MLFLOW_TRACKING_URI; no secrets"
    )
    flow: PodConfig = Field(
        default_factory=PodConfig,
        description="where flows run, stages without a job too, and vLLM for the measurements",
    )
    jobs: dict[Literal["base", "prepare", "finetune", "merge", "quantize", "ledger"], PodConfig] = Field(
        default_factory=dict, description="stages that run as jobs of their own"
    )
    pod_watch_timeout_seconds: PositiveInt = Field(1800, description="how long a stage's pod may wait for a node")
    finished_job_ttl: PositiveInt = Field(86400, description="seconds that a finished job can still be looked at")
