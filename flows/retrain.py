"""Retraining on a schedule or a trigger: build, if something changed. A new version waits for a person like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows.build import build
from pipeline import hardware
from pipeline.plan import plan, resolve
from pipeline.registry import runs


@flow(name="retrain", persist_result=False)
def retrain(
    config: str = "configs/demo.yaml", data_dir: str | None = None, overrides: list[str] | None = None
) -> dict[str, Any]:
    """Build from the config if its data, base model, settings or tunegate itself changed since the last time.

    Returns what the build found, now or then.
    """
    resolved = resolve.resolve(Path(config), overrides or [], Path(data_dir) if data_dir else None)
    planned = plan.make(resolved, resolve.sources(resolved), hardware.device().name)
    if planned.finished:
        runs.take_over(planned.finished, resolved)
        get_run_logger().info("nothing changed since build %s (%s)", planned.key[:12], planned.finished["outcome"])
        return dict(planned.finished)
    return build(config, data_dir, overrides)
