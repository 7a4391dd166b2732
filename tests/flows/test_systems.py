"""The systems that a build measures, and the settings that serve the incumbent."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.released import ENVIRONMENT, FAKE_SITE, a_config, a_model, a_release

from flows import systems
from pipeline.environments.interpreters import Environment
from pipeline.errors import EnvironmentMissing
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


def measured(world: SimpleNamespace, **serve: object) -> list[systems.System]:
    """What is to be measured for the candidate, under today's settings."""
    config = world.config.model_copy(update={"serve": world.config.serve.model_copy(update=serve)})
    unit = serving.served_unit(world.candidate, config.serve, config.name, ENVIRONMENT)
    artifacts = {"quantize": SimpleNamespace(payload=world.candidate)}
    return systems.systems(config, artifacts, unit, world.said.append)


def test_the_incumbent_is_served_as_it_was_judged(world: SimpleNamespace) -> None:
    """A flag that changed since is the candidate's alone."""
    candidate, incumbent = measured(world, max_num_seqs=3)
    assert (candidate.role, incumbent.role) == ("candidate", "incumbent")
    assert incumbent.unit == world.champion.unit
    assert candidate.unit.flags != incumbent.unit.flags
    assert world.said == []


def test_another_vllm_does_not_keep_new_builds_out(world: SimpleNamespace, tmp_path: Path) -> None:
    """The champion is measured as today's environment would serve it, and that is said."""
    more = tmp_path / "more"
    (more / "extra-1.0.dist-info").mkdir(parents=True)
    (more / "extra-1.0.dist-info" / "RECORD").write_text("extra.py,,\n")
    (more / "extra.py").write_text("")
    world.serve = Environment("serve", Path(sys.executable), (FAKE_SITE, more))
    _, incumbent = measured(world)
    assert incumbent.unit.runtime_digest != world.champion.unit.runtime_digest
    assert incumbent.unit.weights == world.champion.unit.weights
    (said,) = world.said
    assert said["text"].startswith("v1 can't be served as it was judged")
    assert "runtime_digest" in said["text"]


def test_settings_that_can_not_be_had_any_more_are_todays(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpreter or an image that is gone leaves the config's own."""
    asked = []

    def environment(config: dict) -> Environment:
        asked.append(config)
        if len(asked) == 2:  # the first is asked for the candidate's comparisons
            raise EnvironmentMissing("the serve environment isn't there")
        return ENVIRONMENT

    monkeypatch.setattr(runtimes, "environment_of", environment)
    _, incumbent = measured(world, max_num_seqs=3)
    assert incumbent.config.serve.max_num_seqs == 3
