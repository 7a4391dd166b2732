"""The table of a promotion's steps: one entry decides order, when a step is due, its time limit, retries and text."""

from __future__ import annotations

import pytest
from support.released import a_config, a_model, a_release

from pipeline.deployment import state, steps
from pipeline.deployment.state import Deployment, Placement
from pipeline.deployment.steps import Progress
from pipeline.errors import ServingError

NAME = "tickets"


@pytest.fixture
def placement(tmp_path):
    """A version's placement, whose server isn't started."""
    config = a_config()
    release = a_release(a_model(tmp_path / "model"), "1", config)
    return Placement(release=release, config=config.model_dump(mode="json"), folder=tmp_path / "v1-1")


def names(progress: Progress) -> list[str]:
    """The steps that are due."""
    return [step.name for step in steps.due(progress)]


def test_a_release_that_does_not_serve_takes_every_step(placement):
    """In the table's order, also when the alias names it already."""
    deployment = Deployment(name=NAME, live=placement, champion="1")
    due = names(Progress(deployment, serves=False, is_routed=False))
    assert due == list(steps.STEPS) == ["verify", "start", "canary", "switch", "drain", "alias"]


def test_a_release_that_serves_takes_the_missing_steps_alone(placement):
    """The switch while the proxy sends elsewhere, the drain while an old server runs, the alias while it is behind."""
    settled = Deployment(name=NAME, live=placement, champion="1")
    left = settled.with_changes(leaving=(placement,))
    behind = settled.with_changes(champion="0")
    assert names(Progress(settled, serves=True, is_routed=True)) == []
    assert names(Progress(settled, serves=True, is_routed=False)) == ["switch"]
    assert names(Progress(left, serves=True, is_routed=True)) == ["drain"]
    assert names(Progress(behind, serves=True, is_routed=True)) == ["alias"]
    assert names(Progress(left.with_changes(champion=None), serves=True, is_routed=False)) == [
        "switch",
        "drain",
        "alias",
    ]


def test_unfinished_is_what_the_table_says_of_the_record(placement):
    """Of one that was never promoted nothing is; the order is the table's."""
    assert steps.unfinished(Deployment(name=NAME)) == ()
    deployment = Deployment(name=NAME, live=placement, champion="0", leaving=(placement,))
    assert steps.unfinished(deployment) == ("drain", "alias")
    assert set(steps.unfinished(deployment)) < set(steps.STEPS)


def test_a_steps_time_is_what_its_settings_allow_and_a_margin():
    """A flow that gave a start less than serve.startup_timeout would end servers that come up."""
    config = a_config(serve={"startup_timeout": 1000, "shutdown_timeout": 70}, promote={"drain_timeout": 5000})
    limits = {name: step.timeout_s(config) for name, step in steps.STEPS.items()}
    assert limits == {
        "verify": 3720.0, "start": 1120.0, "canary": 600.0, "switch": 600.0, "drain": 5190.0, "alias": 600.0,
    }  # fmt: skip


def test_only_caddy_and_mlflow_are_told_again():
    """A server that doesn't start or answer is not tried again; every step has a text for the terminal."""
    assert {name: step.retries for name, step in steps.STEPS.items() if step.retries} == {"switch": 2, "alias": 3}
    assert all(step.says and step.name == name for name, step in steps.STEPS.items())


@pytest.mark.parametrize("name", ["start", "canary", "switch", "alias"])
def test_a_step_without_a_promotion_under_way_names_the_command(monkeypatch, tmp_path, name, placement):
    """As after a stop from another terminal."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    promotion = steps.Promotion(placement.release, placement.settings(), None, lambda *_: None, lambda _: None)
    with pytest.raises(ServingError) as failed:
        steps.STEPS[name].take(promotion)
    assert [problem.remedy for problem in failed.value.problems] == ["tunegate promote tickets"]
    assert state.read(NAME) == Deployment(name=NAME)
