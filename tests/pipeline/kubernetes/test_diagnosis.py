"""What a cluster's records are taken for; the runner's own tests (test_kubernetes.py) meet the rest on a wire."""

from __future__ import annotations

import pytest

from pipeline.errors import StageFailed
from pipeline.kubernetes import diagnosis

JOB = {"metadata": {"name": "tunegate-merge-1"}}
MORE = "kubectl describe job tunegate-merge-1 -n tunegate"


def pod(phase="Failed", **status):
    """A pod's record."""
    return {"metadata": {}, "spec": {"containers": [{}]}, "status": {"phase": phase, **status}}


def ended(code, **more):
    """The status of a container that ended."""
    return [{"state": {"terminated": {"exitCode": code, **more}}}]


def condition(kind, **more):
    """One condition that holds."""
    return [{"type": kind, "status": "True", **more}]


@pytest.mark.parametrize(
    ("job", "record", "words"),
    [
        (None, pod(), "the merge job was deleted while it ran"),
        (
            {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}},
            pod(containerStatuses=ended(143)),
            "the merge job was deleted while it ran",
        ),
        (JOB, pod(conditions=condition("DisruptionTarget", message="Taint manager: deleting due to NoExecute taint")),
         "the merge pod was evicted: Taint manager"),
        ({**JOB, "status": {"conditions": condition("Failed", message="Job has reached the specified backoff limit")}}, None,
         "the merge job lost its pod: Job has reached"),
        (JOB, pod(containerStatuses=ended(1, reason="Error")), "ended with status 1: Error"),
        (JOB, pod("Succeeded", containerStatuses=ended(0, reason="Completed")), "is the volume the same in both pods"),
        (JOB, pod("Running"), "ended without a status of its program"),
    ],
)  # fmt: skip
def test_each_end_is_told_apart(job, record, words):
    """None of them is a memory that ran out."""
    error = diagnosis.death(job, record, "merge", "/mlruns/log.txt", MORE)
    assert type(error) is StageFailed
    assert words in str(error)
    assert str(error).startswith("/mlruns/log.txt: ")
    assert job is None or "deletionTimestamp" in job["metadata"] or MORE in str(error)


def test_a_memory_limit_that_was_never_set_is_no_limit_of_none():
    """The whole node's memory ran out."""
    record = pod(containerStatuses=ended(137, reason="OOMKilled"))
    error = diagnosis.death(JOB, record, "merge", "log.txt", MORE)
    assert "None" not in str(error)
    assert "kubernetes.jobs.merge.resources.limits.memory" in str(error)


def test_a_pod_is_over_when_it_or_its_job_is():
    """A job without a pod that is neither complete nor failed goes on."""
    assert not diagnosis.is_over(JOB, None)
    assert not diagnosis.is_over(JOB, pod("Running"))
    assert diagnosis.is_over(JOB, pod())
    assert diagnosis.is_over(None, pod("Running"))
    assert diagnosis.is_over({"status": {"conditions": condition("Complete")}}, None)


def test_what_a_pod_waits_for_is_said_in_the_clusters_words():
    """Pulling an image is waiting, and no refusal."""
    waiting = [{"state": {"waiting": {"reason": "ContainerCreating"}}}]
    assert diagnosis.waits_for(pod("Pending", containerStatuses=waiting)) == "ContainerCreating"
    assert diagnosis.refusal(pod("Pending", containerStatuses=waiting), "merge", MORE) is None
    assert diagnosis.waits_for(pod("Pending")) == ""
