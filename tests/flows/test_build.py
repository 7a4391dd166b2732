"""How a build's run ends when a stage fails, and a build that was done before; the whole way is the chain's test."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.registered import new_home
from support.released import a_config

from flows import build
from pipeline.errors import StageFailed
from pipeline.plan.plan import Plan
from pipeline.registry.client import asking

KEY = "a" * 32


def plan_of(monkeypatch: pytest.MonkeyPatch, finished: dict | None) -> None:
    """A plan without steps, and no page of Prefect's."""
    monkeypatch.setattr(build.resolve, "sources", lambda _config: {})
    monkeypatch.setattr(build.plan, "make", lambda *_: Plan("tickets", KEY, (), finished))
    monkeypatch.setattr(build, "_show_plan", lambda _plan: None)


@pytest.mark.parametrize(
    ("error", "status"), [(StageFailed("it broke", remedy="mend it"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_build_that_ends_early_closes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str
) -> None:
    """MLflow says how it ended, and the error comes out as it was; stages get the config as a Config."""
    new_home(tmp_path, monkeypatch)
    plan_of(monkeypatch, None)
    config, runs = a_config(), []

    def make(stage_config, _sources, run_id, _show):
        assert stage_config == config
        runs.append(run_id)
        raise error

    monkeypatch.setattr(build, "_make", make)
    with pytest.raises(type(error)) as caught:
        build.run(config.model_dump(mode="json"), lambda _event: None)
    assert caught.value is error
    with asking() as client:
        run = client.get_run(runs[0])
    assert (run.info.status, run.data.tags["tunegate.build"]) == (status, KEY)


def test_a_finished_build_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its summary is returned, and promotion's sections are taken over."""
    finished = {"outcome": "pass", "run_id": "r", "version": "1"}
    plan_of(monkeypatch, finished)
    refreshed: list[tuple] = []
    monkeypatch.setattr(build.runs, "take_over", lambda *arguments: refreshed.append(arguments))
    config = a_config().model_dump(mode="json")
    assert build.run(config, lambda _event: None) == finished
    assert refreshed == [(finished, config)]
