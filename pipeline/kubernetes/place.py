"""Where a stage runs: as a child process of its flow, or on a cluster in a pod of its own. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError, Problem
from pipeline.kubernetes.manifests import CLAIM, IMAGE


def pod_of(config: Mapping[str, Any], stage: str) -> Mapping[str, Any] | None:
    """The pod that a resolved config gives this stage; None where the stage is a child process, as everywhere outside a cluster.

    Raises ConfigError when the image or the claim differs from the flow's own pod, in which this process runs.
    """
    cluster = config.get("kubernetes")
    if not cluster or CLAIM not in os.environ or stage not in cluster["jobs"]:
        return None
    _raise_for_another(cluster)
    return dict(cluster["jobs"][stage])


def _raise_for_another(cluster: Mapping[str, Any]) -> None:
    of_flow = {"image": os.environ.get(IMAGE), "claim_name": os.environ[CLAIM]}
    problems = [
        Problem(
            f"is {cluster[name]} in the config, but the flow's pod has {flow_setting or 'none that it knows'}",
            key=f"kubernetes.{name}",
            allowed="the same for a flow and its stages: one code, one volume",
            remedy="deploy again: tunegate manifests CONFIG | kubectl apply -f -, then"
            " tunegate deploy CONFIG DATA --pool kubernetes",
        )
        for name, flow_setting in of_flow.items()
        if cluster[name] != flow_setting
    ]
    if problems:
        raise ConfigError(problems)


def device_of(config: Mapping[str, Any], stage: str, here: str) -> str:
    """The device that decides the stage's result: `here`, or the one that its own pod requests."""
    pod = pod_of(config, stage)
    if pod is None:
        return here
    return json.dumps({"asked": devices(pod), "node": dict(pod["node_selector"])}, sort_keys=True)


def devices(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The devices that a pod of the config requests, by their plugin's name, such as nvidia.com/gpu."""
    return {name: count for name, count in pod["resources"]["limits"].items() if "/" in name}
