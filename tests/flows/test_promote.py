"""The promote flow: the same steps with Prefect and without it, and errors that come through as they are."""

from __future__ import annotations

import os
import time

import pytest
from prefect import get_client
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness
from support.released import ENVIRONMENT, Aliases, a_config, a_model, a_release, servers_under
from support.wire import HTTP, chat, said, wait_for

from flows import promote
from pipeline.deployment import promote as deployment
from pipeline.deployment import proxy, steps
from pipeline.errors import RegistryError, ReviewError, RoutingError, ServingError
from pipeline.registry import versions
from pipeline.serving import runtimes

NAME = "tickets"
STEPS = list(steps.STEPS)


class World:
    """A home of its own with one proxy, and what was told."""

    def __init__(self, folder):
        self.folder = folder
        self.config = a_config()
        self.aliases = Aliases(folder)
        self.events = []

    def release(self, version, **behaviour):
        """An approved version that answers with its number."""
        model = a_model(self.folder / "models" / version, **{"answer": f"version {version}", **behaviour})
        return a_release(model, version, self.config)

    def run(self, release, set_champion=None):
        """What the terminal calls; returns the steps that were taken."""
        self.events.clear()
        promote.run(release, self.config, ENVIRONMENT, self.events.append, set_champion or self.aliases.set_champion)
        return [event["stage"] for event in self.events if event.get("state") == "done"]

    def answer(self):
        """What a client is answered now."""
        return said(chat(proxy.client_url(self.config.promote)))


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(steps, "SETTLE_S", 0.1)
    monkeypatch.setattr(promote, "RETRY_DELAY_S", 0)
    yield World(tmp_path)
    deployment.stop(NAME, timeout_s=0.2)
    assert servers_under(tmp_path) == []


@pytest.fixture(scope="module")
def prefect_server():
    """A Prefect server of the tests' own."""
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    with prefect_test_harness(server_startup_timeout=120):
        yield str(PREFECT_API_URL.value())


@pytest.fixture
def prefect(world, prefect_server, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    monkeypatch.setattr(promote, "ANSWERS_WITHIN_S", 60.0)


def newest_flow_run(server, tasks):
    """The newest flow run, once the server knows its task runs with these numbers of tries, which come by events."""
    with get_client(sync_client=True) as client:
        run = max(client.read_flow_runs(), key=lambda run: run.created)
    asked = {"flow_runs": {"id": {"any_": [str(run.id)]}}}

    def known():
        found = HTTP.post(f"{server}/task_runs/filter", json=asked).json()
        return {task["name"].rsplit("-", 1)[0]: task["run_count"] for task in found}

    wait_for(lambda: known() == tasks)
    return run


def test_without_a_server_the_steps_run_without_prefect(world, monkeypatch):
    """Nobody waits for a temporary Prefect server, also when the one that is configured is away."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert world.run(world.release("1")) == STEPS
    assert world.answer() == "version 1"
    assert world.aliases.moves == ["1"]


def test_what_is_live_is_left_alone_before_prefect_is_asked(world, monkeypatch):
    """Promoting what serves is decided from our own record: no flow, no step, well under a second."""
    release = world.release("1")
    world.run(release)
    monkeypatch.setattr(promote, "_prefect_url", lambda: pytest.fail("Prefect was asked"))
    took = []
    for _ in range(5):
        started = time.monotonic()
        assert world.run(release) == []
        took.append(time.monotonic() - started)
    assert min(took) < 0.5


def test_with_a_server_each_step_is_a_named_task(world, prefect, prefect_server):
    """The run shows in Prefect with its steps by name, and an artifact says what serves now."""
    assert world.run(world.release("1")) == STEPS
    run = newest_flow_run(prefect_server, dict.fromkeys(STEPS, 1))
    assert (run.name, run.state.name) == ("promote-tickets", "Completed")
    artifacts = HTTP.post(f"{prefect_server}/artifacts/filter", json={}).json()
    serves = [artifact["data"] for artifact in artifacts if artifact["key"] == "serves"]
    assert "tickets v1 is live" in serves[-1]


def test_errors_come_through_prefect_as_they_are(world, prefect, prefect_server):
    """A ReviewError keeps its problems and its exit code, a ServingError too, and neither is tried twice."""
    release = world.release("1")
    with pytest.raises(ReviewError) as refused:
        world.run(release.model_copy(update={"unit": release.unit.model_copy(update={"weights": "0" * 64})}))
    assert refused.value.exit_code == 5
    assert "unit.weights" in [problem.key for problem in refused.value.problems]
    with pytest.raises(ServingError) as failed:
        world.run(world.release("2", fail="ValueError: no such architecture"))
    assert "no such architecture" in str(failed.value)
    run = newest_flow_run(prefect_server, {"verify": 1, "start": 1})
    assert run.state.is_failed()
    assert servers_under(world.folder) == []


def test_an_alias_that_fails_for_a_moment_is_tried_again(world, prefect, prefect_server):
    """MLflow may be away for a moment: the step is repeated, the others are not."""
    tries = []

    def set_champion(name, version):
        tries.append(version)
        if len(tries) < 3:
            raise RegistryError("MLflow did not answer")
        world.aliases.set_champion(name, version)

    world.run(world.release("1"), set_champion)
    assert tries == ["1"] * 3
    assert world.aliases.moves == ["1"]
    newest_flow_run(prefect_server, {**dict.fromkeys(STEPS, 1), "alias": 3})


def test_a_new_step_needs_an_entry_in_the_table_alone(world, prefect, monkeypatch):
    """It is taken at its place, as a task with the table's name, retries and time limit."""
    tries, options, really = [], {}, promote._step.with_options

    def weigh(promotion):
        tries.append(promotion.name)
        if len(tries) < 3:
            raise RoutingError("away", remedy="wait")

    def noted(**chosen):
        options[chosen["name"]] = chosen
        return really(**chosen)

    new = steps.PromotionStep("weights", weigh, steps.STEPS["switch"].is_due, lambda config: 7.0, 2, "shift requests")
    table = [*steps.STEPS.values()]
    table.insert(3, new)
    monkeypatch.setattr(steps, "STEPS", {step.name: step for step in table})
    monkeypatch.setattr(promote._step, "with_options", noted)
    assert world.run(world.release("1")) == ["verify", "start", "canary", "weights", "switch", "drain", "alias"]
    assert tries == [NAME] * 3
    for name, step in steps.STEPS.items():
        chosen = options[name]
        assert (chosen["retries"], chosen["timeout_seconds"]) == (step.retries, step.timeout_s(world.config)), name


def test_the_flow_promotes_by_name(world, prefect, monkeypatch):
    """As a deployment of Prefect's it finds the release, its config and its environment by name."""
    release, asked = world.release("7"), []

    def find(name, version):
        asked.append((name, version))
        return release

    monkeypatch.setattr(versions, "release", find)
    monkeypatch.setattr(versions, "config_of", lambda run_id: world.config)
    monkeypatch.setattr(versions, "set_champion", world.aliases.set_champion)
    monkeypatch.setattr(runtimes, "environment_of", lambda config: ENVIRONMENT)
    now = promote.promote(NAME)
    assert asked == [(NAME, None)]
    assert (now["state"], now["version"]) == ("live", "7")
    assert world.answer() == "version 7"
    assert world.aliases.moves == ["7"]
