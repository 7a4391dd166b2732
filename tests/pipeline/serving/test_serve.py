"""Starting, asking and stopping a server through the interface, against a fake vLLM run as a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.model_folder import safetensors_bytes
from support.released import ENVIRONMENT, a_model, processes_under
from support.wire import chat, said, stream_chat, under_way, wait_for

from pipeline import hardware
from pipeline.config.schema import ServeConfig
from pipeline.errors import ModelError, ServingError
from pipeline.serving import process as serving_process
from pipeline.serving import progress
from pipeline.serving import serve as serving
from pipeline.serving import server as serving_server
from pipeline.serving.server import ToServe

NAME = "tickets"
OTHER_WEIGHTS = safetensors_bytes(b'{"__metadata__":{"a":"b"}}')


class World:
    """A home and a model, and every server that was started there."""

    def __init__(self, folder):
        self.folder = folder
        self.serve = ServeConfig(startup_timeout=20, shutdown_timeout=5, max_model_len=256)
        self.events = []

    def model(self, **behaviour):
        """A model whose fake server behaves like that."""
        number = len(list(self.folder.glob("models/*")))
        return a_model(self.folder / "models" / str(number), **behaviour)

    def unit(self, model, serve=None):
        """The unit that would serve it."""
        return serving.served_unit(model, serve or self.serve, NAME, ENVIRONMENT)

    def start(self, model, *, keep=False, place="server", serve=None, unit=None):
        """Start it and wait."""
        serve = serve or self.serve
        to_serve = ToServe(unit or self.unit(model, serve), model, serve, NAME, self.folder / place, ENVIRONMENT)
        return serving.start(to_serve, keep=keep, on_event=self.events.append)

    def left(self):
        """Pids of its servers that still run."""
        return [p.pid for p in processes_under(self.folder, "-m") if p.pid != os.getpid()]


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    made = World(tmp_path)
    yield made
    for folder in tmp_path.glob("server*"):
        server = serving.find(folder)
        if server:
            serving.stop(server, 0)
    assert made.left() == []


def test_a_started_server_answers_and_a_stopped_one_is_gone(world):
    """It answers under its name; after stop nothing of it runs, and stopping it again is fine."""
    server = world.start(world.model(answer="hello there"))
    assert said(chat(server.url, model=NAME)) == "hello there"
    assert serving.is_alive(server)
    assert serving.find(world.folder / "server") == server
    wait_for(lambda: serving.condition(server).in_flight == 0)
    now = serving.condition(server)
    assert (now.state, now.healthy, now.restarts) == ("running", True, 0)
    assert now.uptime_s < 30
    serving.stop(server, 1)
    serving.stop(server, 1)
    assert not serving.is_alive(server)
    assert serving.condition(server).state == "dead"
    assert world.left() == []


def test_waiting_is_told_in_messages_and_seconds(world, monkeypatch):
    """While a slow server starts the caller hears of progress, and at the end how long it took."""
    monkeypatch.setattr(progress, "TELL_EVERY_S", 0.0)
    world.start(world.model(startup_delay=2.5))
    kinds = [event["event"] for event in world.events]
    assert kinds.count("progress") >= 1
    assert "answers after" in world.events[-1]["text"]


def test_a_server_that_dies_at_its_start_is_told_with_its_logs_line_and_a_remedy(world):
    """The error holds vLLM's own words, the log's name and what to change; nothing is left running."""
    fail = "ValueError: Available memory on node 0 is less than requested memory for kv (4.0 GiB)."
    began = time.monotonic()
    with pytest.raises(ServingError) as caught:
        world.start(world.model(fail=fail))
    assert time.monotonic() - began < 10
    problem = caught.value.problems[0]
    assert "requested memory for kv" in problem.what
    assert problem.file == str(world.folder / "server" / "vllm.log")
    assert "serve.kv_cache_memory" in problem.remedy
    assert world.left() == []


def test_a_server_that_is_never_ready_is_given_up_in_time(world):
    """After startup_timeout it is stopped, and the error names the setting."""
    serve = world.serve.model_copy(update={"startup_timeout": 2})
    with pytest.raises(ServingError, match="not ready within 2 s") as caught:
        world.start(world.model(hang=True), serve=serve)
    assert caught.value.problems[0].key == "serve.startup_timeout"
    assert world.left() == []


def test_health_alone_is_not_ready(world):
    """A server whose /health is 200 while every generation fails is refused."""
    with pytest.raises(ServingError, match="doesn't generate"):
        world.start(world.model(broken_generation=True))
    assert world.left() == []


def test_requests_in_flight_finish_when_it_is_stopped(world):
    """A stream under way at stop ends properly with every word of its answer."""
    server = world.start(world.model(answer=" ".join(["word"] * 20), token_delay=0.1))
    with ThreadPoolExecutor(1) as pool:
        stream = under_way(pool, lambda: stream_chat(server.url), lambda: serving.in_flight(server) == 1)
        serving.stop(server, 30)
        text, _, ended = stream.result()
    assert ended
    assert text.split() == ["word"] * 20
    assert world.left() == []


def test_a_server_that_ignores_sigterm_is_killed(world):
    """Stop doesn't wait longer than asked, and a bit."""
    server = world.start(world.model(ignore_sigterm=True))
    began = time.monotonic()
    serving.stop(server, 0.5)
    assert time.monotonic() - began < 14
    assert world.left() == []


def test_a_kept_server_is_started_again_at_its_port_when_it_dies(world):
    """Kill -9 of the server: it is back at the same URL, and the restart is counted."""
    server = world.start(world.model(answer="back"), keep=True)
    first = serving.condition(server).pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: serving.condition(server).healthy and serving.condition(server).pid != first)
    assert said(chat(server.url)) == "back"
    assert serving.condition(server).restarts == 1


def test_a_kept_server_is_not_started_again_on_other_weights(world):
    """A model folder that changed under a running server is not what was judged, so it isn't served."""
    model = world.model()
    server = world.start(model, keep=True)
    (model / "model.safetensors").write_bytes(OTHER_WEIGHTS)
    os.kill(serving.condition(server).pid, signal.SIGKILL)
    wait_for(lambda: not serving.is_alive(server))
    why = serving.condition(server).why
    assert f"{model} isn't what was judged (model.safetensors was changed); restore it" in why


def test_a_server_that_dies_again_is_started_again(world):
    """Each death in a row is followed by another start."""
    server = world.start(world.model(), keep=True)
    for deaths in (1, 2):
        running = serving.condition(server).pid
        os.kill(running, signal.SIGKILL)
        wait_for(lambda now=deaths, before=running: _is_back(server, now, before))
    assert serving.is_alive(server)


def _is_back(server, restarts, before):
    """Whether it answers again after that many restarts, as another process."""
    now = serving.condition(server)
    return now.healthy and now.restarts == restarts and now.pid != before


STARTER = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from support.released import ENVIRONMENT
from pipeline.serving import serve as serving
from pipeline.serving.server import ToServe
from pipeline.config.schema import ServeConfig
serve = ServeConfig.model_validate_json({serve!r})
model = Path({model!r})
unit = serving.served_unit(model, serve, "tickets", ENVIRONMENT)
to_serve = ToServe(unit, model, serve, "tickets", Path({folder!r}), ENVIRONMENT)
server = serving.start(to_serve, keep={keep}, on_event=lambda event: None)
print("ready", flush=True)
time.sleep({linger})
"""


def starter(world, model, *, keep, linger=60):
    """Another process that starts a server."""
    tests = Path(__file__).parents[2]
    code = STARTER.format(
        paths=[str(tests), str(tests.parent)], serve=world.serve.model_dump_json(), model=str(model),
        folder=str(world.folder / "server"), keep=keep, linger=linger,
    )  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_kept_server_outlives_the_command_and_is_found_again(world):
    """After the starting process is gone the server answers; start in the same folder takes it over."""
    model = world.model(answer="still here")
    child = starter(world, model, keep=True, linger=0)
    assert child.stdout.read() == "ready\n"
    assert child.wait() == 0
    server = serving.find(world.folder / "server")
    assert said(chat(server.url)) == "still here"
    pid = serving.condition(server).pid
    assert world.start(model, keep=True) == server
    assert serving.condition(server).pid == pid


@pytest.mark.parametrize("keep", [False, True])
def test_a_killed_command_leaves_no_server_that_nobody_knows(world, keep):
    """Kill -9 while it waits for readiness, kept or not: the half-started server ends by itself."""
    child = starter(world, world.model(startup_delay=60), keep=keep)
    wait_for((world.folder / "server" / "state.json").exists, 20)
    child.kill()
    child.wait()
    wait_for(lambda: not world.left(), 15)


def test_a_server_for_one_use_ends_with_its_command(world):
    """Kill -9 of an evaluation doesn't leave its server on the device."""
    child = starter(world, world.model(), keep=False)
    assert child.stdout.readline() == "ready\n"
    child.kill()
    child.wait()
    wait_for(lambda: not world.left(), 15)


def test_a_killed_supervisor_takes_nothing_down_and_stop_still_ends_all(world):
    """Without its supervisor the server goes on; stop finds it by its own pid and start time."""
    server = world.start(world.model(answer="on my own"), keep=True)
    os.kill(server.pid, signal.SIGKILL)
    time.sleep(0.3)
    assert serving.is_alive(server)
    assert said(chat(server.url)) == "on my own"
    serving.stop(server, 1)
    assert not serving.is_alive(server)
    assert world.left() == []


def test_a_reused_pid_is_never_signalled(world):
    """A record whose pid now belongs to another process is a dead server: stop leaves that process alone."""
    server = world.start(world.model())
    serving.stop(server, 1)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        stale = server.model_copy(update={"pid": other.pid})
        state = {"state": "running", "supervisor": other.pid, "pid": other.pid, "started": 5}
        (server.folder / "state.json").write_text(json.dumps(state))
        assert not serving.is_alive(stale)
        serving.stop(stale, 1)
        assert other.poll() is None
        other.kill()


def test_another_unit_in_the_folder_is_stopped_first(world):
    """A leftover server of other bytes doesn't stand in for the one that is asked for."""
    old = world.start(world.model(answer="old"), keep=True)
    new = world.start(world.model(answer="new"), keep=True)
    assert not serving.is_alive(old)
    assert said(chat(new.url)) == "new"


def test_running_stops_the_server_also_after_an_error(world):
    """The context manager ends it whatever happens inside."""
    model = world.model()
    to_serve = ToServe(world.unit(model), model, world.serve, NAME, world.folder / "server", ENVIRONMENT)
    with pytest.raises(RuntimeError), serving.running(to_serve, world.events.append) as server:
        raise RuntimeError
    assert not serving.is_alive(server)


def test_what_is_not_the_unit_is_refused_before_it_starts(world):
    """Changed weights, and a changed flag, each named with what was judged."""
    model = world.model()
    unit = world.unit(model)
    (model / "model.safetensors").write_bytes(OTHER_WEIGHTS)
    serve = world.serve.model_copy(update={"max_num_seqs": 3})
    with pytest.raises(ServingError) as caught:
        world.start(model, unit=unit, serve=serve)
    assert [problem.key for problem in caught.value.problems] == ["unit.weights", "unit.flags"]
    assert serving.find(world.folder / "server") is None


def when_it_was_started(monkeypatch, change):
    """Call `change` once a server was started, before it is known to listen."""
    really, asked = serving_server.is_healthy, []

    def is_healthy(url, **timeout):
        if not asked:
            change()
        asked.append(url)
        return really(url, **timeout)

    monkeypatch.setattr(serving_server, "is_healthy", is_healthy)


@pytest.mark.parametrize(
    ("name", "key", "what"),
    [
        ("model.safetensors", "unit.weights", "was changed"),
        ("chat_template.jinja", "unit.tokenizer", "is gone"),
        ("preprocessor_config.json", "unit.configuration", "is new"),
    ],
)
def test_what_changes_while_it_is_loaded_is_not_served(world, monkeypatch, name, key, what):
    """The folder is read after it was verified: the server is never ready, the file is named, nothing is left running."""
    model = world.model()
    file = model / name

    def change():
        file.unlink() if what == "is gone" else file.write_bytes(OTHER_WEIGHTS)

    when_it_was_started(monkeypatch, change)
    with pytest.raises(ServingError) as caught:
        world.start(model, keep=True)
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == (str(file), key)
    assert problem.what == f"{what} while vLLM loaded the model"
    assert "restore it" in problem.remedy
    assert not (world.folder / "server" / "ready").exists()
    assert world.left() == []


def test_other_packages_while_it_is_loaded_are_no_server_either(world, monkeypatch):
    """They are imported after their digest was taken."""
    before = serving_process.installed(ENVIRONMENT)
    found = [before, before, replace(before, digest="0" * 64)]
    monkeypatch.setattr(serving_process, "installed", lambda environment: found.pop(0))
    with pytest.raises(ServingError) as caught:
        world.start(world.model(), keep=True)
    assert [problem.key for problem in caught.value.problems] == ["unit.runtime_digest"]
    assert world.left() == []


def test_a_file_written_anew_with_its_own_bytes_is_served(world, monkeypatch):
    """Bytes count, not times."""
    model = world.model(answer="as judged")
    file = model / "model.safetensors"
    when_it_was_started(monkeypatch, lambda: file.write_bytes(file.read_bytes()))
    assert said(chat(world.start(model).url)) == "as judged"


def test_a_server_taken_over_is_compared_again_too(world, monkeypatch):
    """A killed command's server may have read what changed since; it doesn't go on."""
    model = world.model()
    server = world.start(model, keep=True)
    when_it_was_started(monkeypatch, lambda: (model / "model.safetensors").write_bytes(OTHER_WEIGHTS))
    with pytest.raises(ServingError, match=r"model\.safetensors: unit\.weights: was changed"):
        world.start(model, keep=True)
    assert not serving.is_alive(server)


def test_a_server_that_was_started_again_is_not_healthy_before_it_is_compared(world):
    """/health says 200, but what it read isn't known yet to be what was judged."""
    server = world.start(world.model(), keep=True)
    note = server.folder / "state.json"
    wait_for(lambda: json.loads(note.read_text())["state"] == "running")
    note.write_text(json.dumps({**json.loads(note.read_text()), "state": "restarting"}))
    now = serving.condition(server)
    assert (now.state, now.healthy) == ("restarting", False)
    assert not serving.is_running(server)


def test_an_unsafe_folder_is_refused_before_vllm_sees_it(world):
    """Pickle weights and code beside the model stop the start."""
    model = world.model()
    unit = world.unit(model)
    (model / "pytorch_model.bin").write_bytes(b"x")
    (model / "modeling.py").write_text("")
    with pytest.raises(ModelError) as caught:
        world.start(model, unit=unit)
    assert len(caught.value.problems) == 2


def test_a_variable_of_the_users_shell_does_not_reach_the_server(world, monkeypatch):
    """Only what the unit names and what is inherited by list is in the server's environment; no secret is."""
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TUNEGATE_API_KEY", "secret")
    serve = world.serve.model_copy(update={"env": {"VLLM_CPU_OMP_THREADS_BIND": "0"}})
    server = world.start(world.model(), serve=serve)
    raw = Path(f"/proc/{serving.condition(server).pid}/environ").read_bytes()
    found = dict(entry.split("=", 1) for entry in raw.decode().strip("\0").split("\0"))
    assert not {"VLLM_CPU_INT4_W4A8", "OMP_NUM_THREADS", "HF_TOKEN", "TUNEGATE_API_KEY"} & set(found)
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert "secret" not in (server.folder / "spec.json").read_text()


def test_wherever_a_model_lies_vllm_is_told_one_path(world):
    """Evaluation and promotion have the same bytes in two folders, and vLLM's key of what it compiled holds the path."""
    told = []
    for place in ("one", "two"):
        server = world.start(a_model(world.folder / place), place=f"server-{place}")
        process = psutil.Process(serving.condition(server).pid)
        told.append([word for word in process.cmdline() if word.startswith("--model=")])
        assert Path(process.cwd(), told[0][0].partition("=")[2]).resolve() == world.folder / place
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("method", "dtype"), [("awq", "float16"), ("compressed-tensors", "float32"), (None, "float32")]
)
def test_autoawqs_format_is_served_in_16_bits(tmp_path, method, dtype):
    """VLLM refuses it in float32, which is what an old CPU is quickest in."""
    quantization = {"quantization_config": {"quant_method": method}} if method else {}
    (tmp_path / "config.json").write_text(json.dumps(quantization))
    old = hardware.Device("cpu", "old", "cpu-x86_64-avx2", 2**30, 2, 0, bf16=False)
    assert serving._auto_dtype(tmp_path, old) == dtype
