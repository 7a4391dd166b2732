"""Where a stage runs, and on which device."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.released import a_config

from pipeline.errors import ConfigError
from pipeline.kubernetes import manifests, place

IMAGE = f"registry.example.com/tunegate-pipeline@sha256:{'0' * 64}"
GPU = {"resources": {"limits": {"nvidia.com/gpu": 1, "memory": "9Gi"}}, "node_selector": {"zone": "b"}}


@pytest.fixture
def in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process runs in a flow's pod."""
    monkeypatch.setenv(manifests.CLAIM, "tunegate")
    monkeypatch.setenv(manifests.IMAGE, IMAGE)


def resolved(**cluster: Any) -> dict[str, Any]:
    """A config that trains in a pod with a GPU."""
    return a_config(kubernetes={"image": IMAGE, "jobs": {"finetune": GPU}, **cluster}).model_dump(mode="json")


@pytest.mark.usefixtures("in_a_pod")
def test_a_stage_with_a_job_has_a_pod_and_the_others_have_none() -> None:
    """The others are child processes in the flow's own pod."""
    config = resolved()
    pod = place.pod_of(config, "finetune")
    assert pod == config["kubernetes"]["jobs"]["finetune"]
    assert place.pod_of(config, "merge") is None


def test_outside_a_pod_every_stage_is_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same config on a machine, and a config without a cluster."""
    monkeypatch.delenv(manifests.CLAIM, raising=False)
    assert place.pod_of(resolved(), "finetune") is None
    assert place.device_of(resolved(), "finetune", "cpu") == "cpu"
    monkeypatch.setenv(manifests.CLAIM, "tunegate")
    assert place.pod_of(a_config().model_dump(mode="json"), "finetune") is None


@pytest.mark.usefixtures("in_a_pod")
def test_a_job_on_another_node_has_a_device_of_its_own() -> None:
    """A GPU pod's result isn't taken for that of the flow's CPU."""
    config = resolved()
    assert place.device_of(config, "quantize", "cpu") == "cpu"
    device = json.loads(place.device_of(config, "finetune", "cpu"))
    assert device == {"asked": {"nvidia.com/gpu": 1}, "node": {"zone": "b"}}


def test_devices_are_the_limits_of_a_device_plugin() -> None:
    """Memory and processors aren't devices."""
    pod = {"resources": {"limits": {"cpu": "4", "memory": "9Gi", "amd.com/gpu": 2}}}
    assert place.devices(pod) == {"amd.com/gpu": 2}


@pytest.mark.usefixtures("in_a_pod")
def test_another_image_or_claim_than_the_flows_is_refused() -> None:
    """Code and files would differ from the flow's; the remedy deploys again."""
    config = resolved(image=IMAGE.replace("0" * 64, "1" * 64), claim_name="another")
    with pytest.raises(ConfigError) as error:
        place.pod_of(config, "finetune")
    assert [problem.key for problem in error.value.problems] == ["kubernetes.image", "kubernetes.claim_name"]
    assert all("tunegate deploy" in problem.remedy for problem in error.value.problems)
