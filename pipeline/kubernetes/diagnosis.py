"""Why a stage's job waits or failed, from its job's and pod's records: an error that names the setting and the next command.

Pure: the records are the API's JSON, and kubelet, scheduler and job controller write the reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import EnvironmentMissing, Problem, ResourceError, StageFailed, TunegateError

Record = Mapping[str, Any]

NO_IMAGE = ("ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
NO_CONTAINER = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
OVER = ("Succeeded", "Failed")
KILLED = 137  # 128 + SIGKILL


def is_over(job: Record | None, pod: Record | None) -> bool:
    """Whether the job is over: its pod ended, or the job itself ended or is gone."""
    if job is None or _conditions(job, "Complete", "Failed"):
        return True
    return pod is not None and _status(pod).get("phase") in OVER


def is_running(pod: Record | None) -> bool:
    """Whether the pod's program started, and so has a log."""
    return pod is not None and _status(pod).get("phase") in ("Running", *OVER)


def went_well(job: Record | None, pod: Record | None) -> bool:
    """Whether the program ended with status 0."""
    return (job is not None and bool(_conditions(job, "Complete"))) or (
        pod is not None and _status(pod).get("phase") == "Succeeded"
    )


def denial(message: str, stage: str, namespace: str, describe: str) -> TunegateError:
    """The error of a request that the API answered with 401 or 403: a missing right, a full quota, or an admission rule."""
    if "exceeded quota" in message:
        return ResourceError(
            f"the {stage} job exceeds the namespace's quota: {message}",
            key=f"kubernetes.jobs.{stage}.resources",
            allowed="the rest of the quota",
            remedy=f"kubectl describe quota -n {namespace}; ask for less, or wait until other jobs are over",
        )
    if " cannot " in message or message.startswith("Unauthorized"):
        return EnvironmentMissing(
            f"the flow's service account may not do this: {message}",
            key="kubernetes.service_account_name",
            remedy="tunegate manifests CONFIG | kubectl apply -f -",
        )
    return StageFailed(f"the cluster doesn't admit the {stage} job: {message}", remedy=describe)


def waits_for(pod: Record | None) -> str:
    """The thing that a pod waits for before it runs, in the cluster's words; empty when the cluster gives none."""
    if pod is None:
        return "its pod to be made"
    condition = next(iter(_conditions(pod, "PodScheduled", status="False")), {})
    if condition:
        return f"a node: {condition.get('message') or condition.get('reason', '')}"
    waiting = _waiting(pod)
    return ": ".join(part for part in (waiting.get("reason"), waiting.get("message")) if part)


def refusal(pod: Record | None, stage: str, describe: str) -> TunegateError | None:
    """The error of a pod that can't start; None for a pod that still may."""
    waiting = _waiting(pod) if pod else {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in NO_IMAGE:
        return EnvironmentMissing(
            f"the node can't pull the image: {message or reason}",
            key="kubernetes.image",
            allowed="an image that the cluster's nodes can pull",
            remedy=f"correct kubernetes.image or kubernetes.image_pull_secrets; {describe}",
        )
    if reason in NO_CONTAINER:
        return StageFailed(f"the {stage} container can't be made: {message or reason}", remedy=describe)
    return None


def impatience(pod: Record | None, stage: str, waited_s: float, describe: str) -> TunegateError:
    """The error of a pod that found no node in time, with the scheduler's own reasons."""
    return ResourceError(
        f"the {stage} pod did not start within {waited_s:.0f} s; it waits for {waits_for(pod) or 'its container'}",
        key=f"kubernetes.jobs.{stage}",
        allowed="resources, node_selector and tolerations that a node of the cluster has free",
        remedy=f"{describe}; ask for less, or raise kubernetes.pod_watch_timeout_seconds",
    )


def death(job: Record | None, pod: Record | None, stage: str, log: str, describe: str) -> TunegateError:
    """The error of a job that ended without a result."""
    if job is None or job["metadata"].get("deletionTimestamp"):
        return StageFailed(f"the {stage} job was deleted while it ran", file=log, remedy="run the same command again")
    failure = next(iter(_conditions(job, "Failed")), {})
    if failure.get("reason") == "DeadlineExceeded":
        return StageFailed(f"the {stage} job took longer than the stage may take", file=log,
                           remedy=f"{describe}; running the same command again continues from the last finished step")  # fmt: skip
    end = _terminated(pod) if pod else {}
    if end.get("reason") == "OOMKilled" or (pod is not None and _status(pod).get("reason") == "OOMKilled"):
        return _no_memory(pod or {}, stage, log, describe)
    if pod is not None and (_status(pod).get("reason") == "Evicted" or _conditions(pod, "DisruptionTarget")):
        why = _status(pod).get("message") or next(iter(_conditions(pod, "DisruptionTarget")), {}).get("message", "")
        return StageFailed(f"the {stage} pod was evicted: {why}", file=log,
                           remedy=f"{describe}; running the same command again continues from the last finished step")  # fmt: skip
    if pod is None:
        return StageFailed(
            f"the {stage} job lost its pod: {failure.get('message') or 'its node is gone'}", file=log, remedy=describe
        )
    status = end.get("exitCode")
    if status == KILLED:
        text = f"the {stage} program was killed (status 137), by its node or by somebody"
    elif status == 0:
        text = (
            f"the {stage} program ended well, but its result can't be read here: is the volume the same in both pods?"
        )
    elif status is None:
        text = f"the {stage} job ended without a status of its program"
    else:
        text = f"the {stage} program ended with status {status}: {end.get('message') or end.get('reason', '')}"
    return StageFailed(text, file=log, remedy=f"read the log; {describe}")


def _no_memory(pod: Record, stage: str, log: str, describe: str) -> TunegateError:
    limits = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
    limit = limits.get("memory")
    return ResourceError(
        Problem(
            f"the {stage} pod ran out of memory (OOMKilled)" + (f" at its limit of {limit}" if limit else ""),
            file=log,
            key=f"kubernetes.jobs.{stage}.resources.limits.memory",
            allowed=f"more than {limit}" if limit else "as much as the stage needs; `tunegate check` estimates it",
            remedy=f"raise it, or lower micro_batch_size, sequence_len or num_calibration_samples; {describe}",
        )
    )


def _status(record: Record) -> Mapping[str, Any]:
    return record.get("status") or {}


def _conditions(record: Record, *kinds: str, status: str = "True") -> list[Mapping[str, Any]]:
    conditions = _status(record).get("conditions") or []
    return [condition for condition in conditions if condition["type"] in kinds and condition["status"] == status]


def _states(pod: Record) -> Iterator[Mapping[str, Any]]:
    for container in _status(pod).get("containerStatuses") or []:
        yield container.get("state") or {}


def _waiting(pod: Record) -> Mapping[str, Any]:
    return next((state["waiting"] for state in _states(pod) if state.get("waiting")), {})


def _terminated(pod: Record) -> Mapping[str, Any]:
    return next((state["terminated"] for state in _states(pod) if state.get("terminated")), {})
