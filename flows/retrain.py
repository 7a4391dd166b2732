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

    Returns the build's summary, of now or of that time.
    """
    config_json = resolve.resolve(Path(config), overrides or [], Path(data_dir) if data_dir else None)
    build_plan = plan.make(config_json, resolve.sources(config_json), hardware.device().name)
    if build_plan.finished:
        runs.take_over(build_plan.finished, config_json)
        get_run_logger().info(
            "nothing changed since build %s (%s)", build_plan.key[:12], build_plan.finished["outcome"]
        )
        return dict(build_plan.finished)
    return build(config, data_dir, overrides)
