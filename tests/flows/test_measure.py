"""When systems are measured anew; the measuring itself is the chain's test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.released import ENVIRONMENT, a_config, a_model, a_release

from flows import measure
from pipeline import store
from pipeline.artifacts import Evaluation
from pipeline.registry import versions
from pipeline.serving import runtimes
from pipeline.serving import serve as serving


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A champion and a candidate, what was said, and the environment that serves now."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    config = a_config(evaluate={"compare": []})
    champion = a_release(a_model(tmp_path / "old"), "1", config)
    made = SimpleNamespace(
        config=config, champion=champion, said=[], serve=ENVIRONMENT, candidate=a_model(tmp_path / "new")
    )
    monkeypatch.setattr(versions, "champion", lambda _name: champion)
    monkeypatch.setattr(versions, "config_of", lambda _run: config)
    monkeypatch.setattr(runtimes, "environment_of", lambda _config: made.serve)
    return made


def test_again_measures_anew(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load tests of the build are thrown away, and evaluations are asked for under another key."""
    attempts = []
    report = Evaluation(
        system="candidate", unit_digest="u", holdout_digest="h", metrics={}, items=(), errors=0, seconds=1.0
    )

    def measured(_config, _key, _artifacts, system, attempt, _show):
        attempts.append((system.role, attempt))
        return measure.Measurement(report.model_copy(update={"system": system.role}), ())

    monkeypatch.setattr(measure, "_measure", SimpleNamespace(with_options=lambda **_: measured))
    old = store.build_folder("0" * 32) / "loadtest-candidate"
    unit = serving.served_unit(world.candidate, world.config.serve, world.config.name, ENVIRONMENT)
    artifacts = {"quantize": SimpleNamespace(payload=world.candidate)}
    for again in (False, True):
        old.mkdir(parents=True, exist_ok=True)
        measure.measure(world.config, "0" * 32, artifacts, unit, world.said.append, again=again)
        assert old.exists() is not again
    assert [role for role, _ in attempts] == ["candidate", "incumbent"] * 2
    first, _, anew, other = (attempt for _, attempt in attempts)
    assert first == ""
    assert anew == other
    assert anew
