"""The process runtime's own parts: the server's environment, its port and its state. `test_serve.py` starts real ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import pytest
from support.released import ENVIRONMENT, a_model

from pipeline import processes
from pipeline.config.schema import ServeConfig
from pipeline.errors import EnvironmentMissing, ServingError
from pipeline.serving import process, serve
from pipeline.serving.server import Server
from pipeline.serving.supervisor import State


@pytest.fixture
def unit(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    return serve.served_unit(a_model(tmp_path / "model"), ServeConfig(), "tickets", ENVIRONMENT)


@pytest.fixture
def supervisor():
    """A process that stands where a supervisor does."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as child:
        yield processes.find(child.pid)
        child.kill()


def a_server(folder, supervisor, state=None):
    """The record of a server, and the state that its supervisor wrote, if any."""
    folder.mkdir()
    if state is not None:
        (folder / "state.json").write_text(json.dumps(state))
    return Server(
        runtime="process", unit_digest="u", url="http://127.0.0.1:1", model="m", folder=folder, log=folder / "vllm.log",
        pid=supervisor.pid, started=supervisor.started,
    )  # fmt: skip


def test_caches_lie_at_home_and_are_one_for_all_servers(unit, tmp_path):
    """A promotion finds what an evaluation compiled, whatever the user's own caches are."""
    environ = process.environ(unit, ENVIRONMENT)
    here = str(tmp_path / "home" / "vllm-cache")
    names = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")
    assert all(environ[name].startswith(here) for name in names)


def test_a_server_gets_the_hosts_say_on_multicast_and_no_other_variable_of_the_shell(unit, monkeypatch):
    """NVLink multicast that is kept off stays off; the config alone changes how vLLM computes."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "TORCH_SDPA")
    environ = process.environ(unit, ENVIRONMENT)
    assert environ["NCCL_NVLS_ENABLE"] == "0"
    assert "VLLM_ATTENTION_BACKEND" not in environ


def test_the_units_variables_win_over_inherited_ones(unit, monkeypatch):
    """They were judged."""
    monkeypatch.setenv("LANG", "C")
    judged = unit.model_copy(update={"env": {"OMP_NUM_THREADS": "2"}})
    environ = process.environ(judged, ENVIRONMENT)
    assert (environ["LANG"], environ["OMP_NUM_THREADS"], environ["HF_HUB_OFFLINE"]) == ("C", "2", "1")


def test_the_process_runtime_needs_an_environment(tmp_path):
    """Without one the error names the command that makes it."""
    with pytest.raises(EnvironmentMissing, match="make setup"):
        serve.served_unit(a_model(tmp_path / "model"), ServeConfig(), "tickets", None)
    assert process.identity(ServeConfig(), ENVIRONMENT).vllm_version == "0.0.0"


def test_a_port_that_is_taken_is_not_free():
    """Free is one of its range; where all are taken, the error names the range."""
    assert process.free_port() in process.PORTS
    with socket.create_server((process.HOST, 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServingError, match="are taken") as caught:
            process.free_port(range(port, port + 1))
    assert caught.value.problems[0].allowed == f"a free port from {port} to {port}"


def test_a_state_counts_only_for_its_own_supervisor(tmp_path, supervisor):
    """The folder may be another server's by now; before the first state a server is starting."""
    foreign = a_server(tmp_path / "foreign", supervisor, {"state": "failed", "supervisor": supervisor.pid + 1})
    assert process.state(foreign) == State()
    own = a_server(tmp_path / "own", supervisor, {"state": "running", "supervisor": supervisor.pid, "restarts": 2})
    assert (process.state(own).state, process.state(own).restarts) == ("running", 2)
    assert process.state(a_server(tmp_path / "none", supervisor)).state == "starting"


def test_a_server_without_its_process_is_restarting_while_its_supervisor_lives(tmp_path, supervisor):
    """Then dead, with the reason that the supervisor left."""
    state = {"state": "restarting", "supervisor": supervisor.pid, "restarts": 1, "why": "ended with status 1"}
    server = a_server(tmp_path / "server", supervisor, state)
    assert process.is_alive(server)
    now = process.condition(server)
    assert (now.state, now.restarts, now.pid) == ("restarting", 1, None)
    gone = server.model_copy(update={"started": supervisor.started + 1})
    assert not process.is_alive(gone)
    now = process.condition(gone)
    assert (now.state, now.restarts, now.why) == ("dead", 1, "ended with status 1")


def test_the_servers_own_process_is_known_by_pid_and_start(tmp_path, supervisor):
    """A reused pid isn't vLLM; a real one counts its seconds and is running once it was ready."""
    state = {"state": "running", "supervisor": supervisor.pid, "pid": supervisor.pid, "started": supervisor.started}
    server = a_server(tmp_path / "server", supervisor, state)
    assert process.vllm(server) == supervisor
    assert process.condition(server).state == "starting"
    (server.folder / "ready").touch()
    now = process.condition(server)
    assert (now.state, now.pid) == ("running", supervisor.pid)
    assert 0 <= now.uptime_s < 60
    reused = a_server(tmp_path / "reused", supervisor, {**state, "started": 5})
    assert process.vllm(reused) is None


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_a_death_before_readiness_is_told_in_the_logs_words(tmp_path, supervisor, state):
    """With the state's reason; a supervisor that is gone without a state is an error of its own log."""
    server = a_server(
        tmp_path / "server", supervisor, {"state": state, "supervisor": supervisor.pid, "why": "ended with status 1"}
    )
    server.log.write_text("ValueError: No available memory for the cache blocks\n")
    with pytest.raises(ServingError, match="vLLM ended with status 1: ValueError: No available memory"):
        process.raise_if_dead(server)
    gone = a_server(tmp_path / "gone", processes.Process(supervisor.pid, 1))
    (gone.folder / "supervisor.log").write_text("Traceback\nOSError: no room\n")
    with pytest.raises(ServingError, match="supervisor ended: OSError: no room") as caught:
        process.raise_if_dead(gone)
    assert caught.value.problems[0].remedy


def test_the_supervisor_gets_packages_and_no_secret(monkeypatch):
    """PYTHONPATH reaches it, for hosts without virtual environments."""
    monkeypatch.setenv("PYTHONPATH", "/packages")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    environ = process._supervisor_environ()
    assert environ["PYTHONPATH"].split(os.pathsep)[1:] == ["/packages"]
    assert "HF_TOKEN" not in environ
