"""Builds that the fake vLLM can serve, for tests of what MLflow keeps and of the commands on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support.released import ENVIRONMENT, a_config, a_model, write_weights
from support.sample_build import POLICY, sample_build

from pipeline import store
from pipeline.artifacts import Artifact, Build, Reports
from pipeline.config.gate import GateConfig
from pipeline.config.schema import Config
from pipeline.digests import digest_folder
from pipeline.files import write_json
from pipeline.gate import gate
from pipeline.registry import runs, versions
from pipeline.serving import serve

EASY = POLICY.model_copy(update={"metrics": POLICY.metrics[:2]})
HARD = POLICY.model_copy(
    update={"metrics": tuple(check.model_copy(update={"min": 0.999}) for check in POLICY.metrics[:2])}
)


@cache
def _sample() -> Build:
    """The figures of every build here; making them up takes a second."""
    return sample_build(Path("artifacts"), count=120)


def a_build(
    folder: Path, number: int = 1, config: Config | None = None, policy: GateConfig = EASY, **behaviour: Any
) -> Build:
    """A build as a run leaves it: its folder is real, its unit what the fake vLLM would serve from it."""
    sample, place = _sample(), folder / f"build-{number}"
    config = config or a_config(gate=policy.model_dump())
    model = place / "quantize" / "payload"
    a_model(model, **{"answer": f"version {number}", **behaviour})
    write_weights(model, f"version {number}")
    unit = serve.served_unit(model, config.serve, config.name, ENVIRONMENT)
    about = {"unit_digest": unit.digest}
    candidate = sample.evaluations["candidate"].model_copy(update=about)
    evaluations = {**sample.evaluations, "candidate": candidate}
    loadtests = {"candidate": sample.loadtests["candidate"].model_copy(update=about)}
    quantized = Artifact(
        stage="quantize", key=f"{number:032x}", path=model.parent, digest=digest_folder(model), parents={},
        made_by={"torch": "2.13.0"}, detail={"method": "llmcompressor", "group_size": 64},
    )  # fmt: skip
    return sample.model_copy(
        update={
            "key": f"{number:032x}",
            "config": config.model_dump(mode="json"),
            "artifacts": {**sample.artifacts, "quantize": quantized},
            "unit": unit,
            "model_path": model,
            "evaluations": evaluations,
            "loadtests": loadtests,
            "verdict": gate.verdict_of(Reports(evaluations=evaluations, loadtests=loadtests), policy, unit.digest),
        }
    )


def opened(build: Build) -> str:
    """Its MLflow run, with the config alone."""
    return runs.open_run(build.name, build.key, build.config)


def registered(build: Build) -> str:
    """Its version, as a build registers it, with the record in the store."""
    run_id = opened(build)
    version = versions.register(run_id, build)
    keep(build, {"outcome": "pass", "run_id": run_id, "version": version})
    return version


def keep(build: Build, finished: dict[str, Any]) -> None:
    """Leave the build's own files in the store."""
    folder = store.build_folder(build.key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.json").write_text(build.model_dump_json(), encoding="utf-8")
    write_json(folder / "finished.json", {"name": build.name, "build_key": build.key, **finished})


@cache
def _empty_database() -> bytes:
    """MLflow's database without a run; making it takes seconds, so the tests of a session share one."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEGATE_HOME", folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        versions.names()
        return Path(folder, "mlflow.db").read_bytes()


def new_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of a test's own with an empty registry."""
    database = _empty_database()
    home = folder / "home"
    home.mkdir()
    (home / "mlflow.db").write_bytes(database)
    monkeypatch.setenv("TUNEGATE_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return home
