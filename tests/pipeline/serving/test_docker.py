"""The docker runtime: against a real engine, where the image's own vLLM answers, and what needs none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import httpx
import pytest
from support import programs
from support.engine import PLAIN, engine, inspect, labelled, pinned
from support.released import a_model
from support.wire import answers, fake_vllm, under_way, wait_for

from pipeline import hardware, program
from pipeline.config.schema import ServeConfig
from pipeline.environments import interpreters
from pipeline.errors import ServingError
from pipeline.serving import docker as serving_docker
from pipeline.serving import serve as serving
from pipeline.serving.digests import Installed
from pipeline.serving.server import Server, ToServe

pytestmark = pytest.mark.timeout(600)
container = pytest.mark.container

NAME = "tiny"


class World:
    """A home, a tiny model, an engine, and one server that runs for all tests here."""

    def __init__(self, folder, host):
        self.folder, self.host, self.model = folder, host, folder / "model"
        programs.tiny(self.model)
        (self.model / "model.safetensors").chmod(0o600)  # as safetensors writes it
        self.serve = ServeConfig.model_validate(
            {
                "runtime": "docker", "image": pinned(host), "container": PLAIN, "enforce_eager": True,
                "max_model_len": 512, "max_num_seqs": 4, "kv_cache_memory": "64MiB", "shutdown_timeout": 30,
            }
        )  # fmt: skip
        self.events = []
        self.unit = serving.served_unit(self.model, self.serve, NAME, None)
        self.server = self.start(self.folder / "server", keep=True)

    def start(self, folder, serve=None, unit=None, **options):
        """Start a server of the model."""
        to_serve = ToServe(unit or self.unit, self.model, serve or self.serve, NAME, folder, None)
        return serving.start(to_serve, on_event=self.events.append, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docker")
    with engine(folder) as host, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", host)
        patch.setenv("TUNEGATE_HOME", str(folder / "home"))
        made = World(folder, host)
        yield made
        serving.stop(made.server, 0)
        assert made.server.container not in labelled(host, serving_docker.UNIT_LABEL)


@container
def test_the_unit_names_the_image_and_the_vllm_in_it(world):
    """The runtime's digest is the image's, and the version is what the container itself says."""
    assert (world.unit.runtime, world.unit.runtime_digest) == ("docker", world.serve.image.rpartition("@")[2])
    assert httpx.get(f"{world.server.url}/version").json()["version"] == world.unit.vllm_version
    shown = inspect(world.host, world.server.container)
    assert shown["Image"] == world.unit.runtime_digest
    assert {mount["Destination"] for mount in shown["Mounts"]} == {"/model", "/cache"}


@container
def test_the_container_is_kept_in(world):
    """By the engine's own words: another user, a read-only root, no capability, no new privilege, the model read-only."""
    shown = inspect(world.host, world.server.container)
    host = shown["HostConfig"]
    assert shown["Config"]["User"] == "65532:65532"
    assert host["ReadonlyRootfs"]
    assert not host["Privileged"]
    assert "no-new-privileges" in " ".join(host["SecurityOpt"])
    mounts = {mount["Destination"]: mount for mount in shown["Mounts"]}
    assert (mounts["/model"]["Source"], mounts["/model"]["RW"]) == (str(world.model), False)
    lines = Path(f"/proc/{shown['State']['Pid']}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    assert status["Uid"].split() == ["65532"] * 4
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"


@container
@pytest.mark.parametrize("place", ["/model/x", "/etc/x", "/opt/vllm/x"])
def test_nothing_in_it_can_be_written_but_scratch(world, place):
    """A write to the model, to the system or to vLLM itself fails inside."""
    client = docker.DockerClient(base_url=world.host)
    code, said = client.containers.get(world.server.container).exec_run(["touch", place])
    client.close()
    assert code != 0
    assert b"Read-only file system" in said


@container
def test_its_health_check_passes(world):
    """The command that the engine would run says that it is well."""
    shown = inspect(world.host, world.server.container)
    check = shown["Config"].get("Healthcheck") or shown["Config"]["HealthCheck"]
    client = docker.DockerClient(base_url=world.host)
    code, said = client.containers.get(world.server.container).exec_run(check["Test"][1:])
    client.close()
    assert code == 0, said


@container
def test_its_start_was_told_and_its_log_is_kept(world):
    """Phases reach who waits, out of the container's own log."""
    said = [event.get("text", "") for event in world.events]
    assert any("loads the weights" in text or "starts its engine" in text for text in said)
    assert "answers after" in said[-1]
    serving.refresh_log(world.server)
    assert "vLLM" in world.server.log.read_text()


@container
def test_it_is_found_again_and_known_to_be_well(world):
    """Start in the same folder takes the running container over; its condition is the engine's and its own."""
    assert world.start(world.folder / "server", keep=True) == world.server
    now = serving.condition(world.server)
    assert (now.state, now.healthy, now.restarts, now.container) == ("running", True, 0, world.server.container)
    assert 0 < now.uptime_s < 900


@container
def test_a_load_test_runs_in_the_image(world):
    """The image's own vLLM bench measures the server; this machine's environments aren't asked."""
    data = world.folder / "data"
    (data / "payload").mkdir(parents=True)
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "x"}]}
    (data / "payload" / "holdout.jsonl").write_text(json.dumps(row) + "\n")
    config = {
        "loadtest": {"max_concurrency": [2], "num_prompts": 4, "max_tokens": 4, "repeats": 1}, "system": "candidate",
        "url": world.server.url, "model": NAME, "unit_digest": world.unit.digest, "model_path": str(world.model),
        "image": world.unit.runtime_digest, "container": world.serve.container.model_dump(),
    }  # fmt: skip
    folder, events = world.folder / "loadtest", []
    request = program.Request(config, {"prepare": programs.artifact(data, "prepare", {})}, folder)
    command = interpreters.command(interpreters.find("control"), "pipeline.evaluation.loadtest_container")
    detail = program.run(command, programs.environ("control"), request, events.append)
    assert detail == {"levels": [2], "failed": 0}
    report = json.loads((folder / "payload" / "report.json").read_text())
    assert report["levels"][0]["completed"] == 4
    assert [event["done"] for event in events if event["event"] == "progress"] == [4]
    assert len(labelled(world.host, serving_docker.UNIT_LABEL)) == 1


@container
def test_requests_in_flight_finish_and_a_stopped_container_is_gone(world):
    """A stream under way at stop ends with its last token; then nothing of the container is left."""
    server = world.start(world.folder / "other", keep=False)
    body = {"model": NAME, "prompt": "Hello", "max_tokens": 480, "ignore_eos": True, "stream": True}

    def stream() -> str:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
            return [line for line in response.iter_lines() if line][-1]

    with ThreadPoolExecutor(1) as pool:
        last = under_way(pool, stream, lambda: serving.in_flight(server) == 1)
        serving.stop(server, 60)
        assert last.result() == "data: [DONE]"
    serving.stop(server, 60)
    assert serving.condition(server).state == "dead"
    assert server.container not in labelled(world.host, serving_docker.UNIT_LABEL)
    assert serving.is_alive(world.server)


@container
def test_vllms_own_refusal_is_told_and_leaves_no_container(world):
    """A length that the model wasn't made for: vLLM's words, the setting to lower, nothing left."""
    serve = world.serve.model_copy(update={"max_model_len": 100_000})
    unit = serving.served_unit(world.model, serve, NAME, None)
    with pytest.raises(ServingError) as caught:
        world.start(world.folder / "refused", serve=serve, unit=unit, keep=True)
    assert "100000" in caught.value.problems[0].what
    assert "serve.max_model_len" in caught.value.problems[0].remedy
    assert labelled(world.host, serving_docker.UNIT_LABEL) == [world.server.container]


@container
def test_an_image_that_is_not_here_is_named(world):
    """Nothing is pulled: the error names the image and how to get it."""
    absent = world.serve.model_copy(update={"image": "localhost/absent@sha256:" + "0" * 64})
    with pytest.raises(ServingError) as caught:
        serving_docker.identity(absent, None)
    assert "isn't here" in caught.value.problems[0].what
    assert "docker/README.md" in caught.value.problems[0].remedy


@container
def test_another_image_than_the_judged_one_is_refused(world):
    """A unit of another digest isn't the unit of the image that the config names."""
    unit = world.unit.model_copy(update={"runtime_digest": "sha256:" + "0" * 64})
    with pytest.raises(ServingError) as caught:
        world.start(world.folder / "else", unit=unit, keep=False)
    assert [problem.key for problem in caught.value.problems] == ["unit.runtime_digest"]
    assert world.unit.device == hardware.device().device_class


@container
def test_a_kept_server_that_dies_is_started_again(world):
    """Kill -9 of vLLM: the engine starts the same container at the same address, and the restart is counted."""
    os.kill(inspect(world.host, world.server.container)["State"]["Pid"], signal.SIGKILL)
    wait_for(lambda: not serving.condition(world.server).healthy, 30)
    wait_for(lambda: serving.condition(world.server).healthy, 200)
    now = serving.condition(world.server)
    assert (now.state, now.restarts, now.container) == ("running", 1, world.server.container)
    assert serving.find(world.folder / "server") == world.server


def test_an_engine_that_hangs_up_is_an_error_that_can_be_shown(tmp_path, monkeypatch):
    """It says its version, then closes the connection: no traceback of the HTTP client."""
    place = tmp_path / "engine.sock"
    version = json.dumps({"ApiVersion": "1.44"})
    answer = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(version)}\r\n\r\n{version}"

    def serve_once(listener: socket.socket) -> None:
        for words in (answer, ""):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(words.encode())

    monkeypatch.setenv("DOCKER_HOST", f"unix://{place}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        listener.settimeout(30)
        engines = threading.Thread(target=serve_once, args=(listener,))
        engines.start()
        with pytest.raises(ServingError, match="answers no more"), serving_docker.engine() as client:
            client.containers.list()
        engines.join()


def test_what_changes_while_a_container_loads_it_is_not_served(tmp_path, monkeypatch):
    """The model is mounted, so it can change outside: compared again before it is ready, the container is stopped."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    model, folder, stopped = a_model(tmp_path / "model"), tmp_path / "server", []
    serve = ServeConfig.model_validate({"runtime": "docker", "image": "vllm@sha256:" + "0" * 64, "max_model_len": 256})
    identity = Installed("sha256:" + "0" * 64, "0.0.0")
    with fake_vllm(NAME) as url:

        def spawn(to_serve, files, *, keep):
            (model / "model.safetensors").write_bytes(b"other")
            return Server(
                runtime="docker", unit_digest=to_serve.unit.digest, url=url, model=NAME, folder=folder, log=folder / "vllm.log"
            )  # fmt: skip

        monkeypatch.setattr(serving_docker, "identity", lambda serve, environment: identity)
        monkeypatch.setattr(serving_docker, "spawn", spawn)
        monkeypatch.setattr(serving_docker, "stop", lambda server, timeout_s: stopped.append(answers(f"{url}/health")))
        unit = serving.served_unit(model, serve, NAME, None)
        to_serve = ToServe(unit, model, serve, NAME, folder, None)
        with pytest.raises(ServingError) as caught:
            serving.start(to_serve, keep=True, on_event=lambda event: None)
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == (str(model / "model.safetensors"), "unit.weights")
    assert stopped[0]
    assert not (folder / "ready").exists()


@pytest.fixture
def owner(tmp_path, monkeypatch):
    """The owner label of a process that is gone, made as in a store of this test's own."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "my home"))
    code = (
        "from pathlib import Path\nfrom pipeline.serving import docker as s\n"
        "print(s.labels('u', Path('f'), keep=False)[s.OWNER_LABEL])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=interpreters.ROOT, capture_output=True, text=True, check=True
    )
    return shown.stdout.rstrip("\n")


def test_only_a_process_of_this_place_is_known_to_be_gone(owner, monkeypatch, tmp_path):
    """Another machine, pid namespace or store may share the engine: its containers are left alone, as are kept ones."""
    boot, namespace, rest = owner.split(" ", 2)
    assert serving_docker.is_orphan(owner)
    assert not serving_docker.is_orphan(f"another-boot {namespace} {rest}")
    assert not serving_docker.is_orphan(f"{boot} pid:[1] {rest}")
    assert not serving_docker.is_orphan(rest.rpartition(" ")[2])
    assert not serving_docker.is_orphan(None)
    mine = serving_docker.labels("u", tmp_path, keep=False)[serving_docker.OWNER_LABEL]
    assert not serving_docker.is_orphan(mine)
    assert serving_docker.OWNER_LABEL not in serving_docker.labels("u", tmp_path, keep=True)
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "another"))
    assert not serving_docker.is_orphan(owner)
