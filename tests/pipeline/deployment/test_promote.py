"""Promotion, rollback, status and stop with real processes: Caddy, and the fake vLLM under serving."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from support.killed import Deadly, killed_after
from support.released import (
    ENVIRONMENT,
    Aliases,
    a_config,
    a_model,
    a_release,
    proxies_under,
    servers_under,
    write_weights,
)
from support.wire import HTTP, chat, free_port, running, said, stream_chat, under_way, wait_for

from pipeline import store
from pipeline.deployment import promote as deployment
from pipeline.deployment import proxy, state, steps
from pipeline.deployment.steps import Promotion
from pipeline.errors import Busy, ReviewError, RoutingError, ServingError
from pipeline.serving import serve
from pipeline.serving import server as serving_server
from pipeline.serving.server import Server

NAME = "tickets"
STEPS = ["verify", "start", "canary", "switch", "drain", "alias"]


class World:
    """A home of its own, with releases that answer with their version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = a_config()
        self.aliases = Aliases(folder)
        self.events: list[dict[str, object]] = []
        self.releases = {}

    def promotion(self, version: str, **behaviour) -> Promotion:
        """A promotion of that version, whose model is made the first time."""
        if version not in self.releases:
            model = a_model(self.folder / "models" / version, **{"answer": f"version {version}", **behaviour})
            self.releases[version] = a_release(model, version, self.config)
        return Promotion(
            self.releases[version], self.config, ENVIRONMENT, self.aliases.set_champion, self.events.append
        )

    def promote(self, version: str, **behaviour) -> list[str]:
        """Promote and return the steps that were taken."""
        self.events.clear()
        deployment.promote(self.promotion(version, **behaviour))
        return [event["stage"] for event in self.events if event.get("state") == "done"]

    def rollback(self) -> str:
        """Put the release before this one back and return its version."""
        earlier = deployment.previous(NAME)
        promotion = replace(self.promotion(earlier.release.version), config=earlier.settings())
        deployment.promote(promotion)
        return earlier.release.version

    @property
    def url(self) -> str:
        """Where clients go."""
        return proxy.client_url(self.config.promote)

    def answer(self) -> str:
        """What a client is answered now."""
        return said(chat(self.url))

    def servers(self) -> list[int]:
        """Pids of the model servers that run."""
        return servers_under(self.folder)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(steps, "SETTLE_S", 0.1)
    world = World(tmp_path)
    yield world
    deployment.stop(NAME, timeout_s=0.2)
    assert world.servers() == []
    assert proxies_under(tmp_path) == []


def test_a_first_promotion_serves_and_moves_the_alias(world):
    """Every step is taken in order, clients are answered, and the record says what is live."""
    assert world.promote("1") == STEPS
    assert world.answer() == "version 1"
    assert world.aliases.moves == ["1"]
    assert len(world.servers()) == 1
    now = deployment.status(NAME)
    assert (now.state, now.version, now.url, now.proxy_ok) == ("live", "1", world.url, True)
    assert now.unit_digest == world.releases["1"].unit.digest
    assert deployment.log_file(NAME).is_file()


def test_the_proxies_of_the_environment_are_passed_by(world, monkeypatch):
    """HTTP_PROXY of a company's network doesn't take our own requests to 127.0.0.1 away."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert world.promote("1") == STEPS
    assert deployment.status(NAME).state == "live"


def test_promoting_what_is_live_does_nothing(world):
    """No step is taken, no process changes, and it takes well under a second."""
    world.promote("1")
    before = world.servers(), proxies_under(world.folder), (state.folder(NAME) / "state.json").read_bytes()
    took = []
    for _ in range(5):
        started = time.monotonic()
        assert deployment.is_settled(world.promotion("1"))
        assert world.promote("1") == []
        took.append(time.monotonic() - started)
    assert min(took) < 0.5
    assert before == (
        world.servers(),
        proxies_under(world.folder),
        (state.folder(NAME) / "state.json").read_bytes(),
    )
    assert world.aliases.moves == ["1"]


def test_streams_through_a_promotion_end_whole(world, monkeypatch):
    """Clients that stream all the while see every answer to its end, from the old or the new."""
    monkeypatch.setattr(steps, "SETTLE_S", 1.0)
    slow = {"token_delay": 0.03}
    world.promote("1", hello=" ".join(["old"] * 6), **slow)
    answers, done = [], threading.Event()

    def client() -> None:
        while not done.is_set():
            text, _, ended = stream_chat(world.url)
            answers.append((text, ended))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        wait_for(lambda: len(answers) > 3)
        try:
            world.promote("2", hello=" ".join(["new"] * 6), **slow)
            count = len(answers)
            wait_for(lambda: len(answers) > count + 3)
        finally:
            done.set()
        for future in clients:
            future.result()
    assert {ended for _, ended in answers} == {True}
    assert {text for text, _ in answers} == {" ".join(["old"] * 6), " ".join(["new"] * 6)}
    assert len(world.servers()) == 1


def change_a_weight(world, version):
    write_weights(world.folder / "models" / version, "other")


def change_the_template(world, version):
    (world.folder / "models" / version / "chat_template.jinja").write_text("{{ 1 }}", encoding="utf-8")


def change_a_flag(world, version):
    world.config = a_config(serve={"max_model_len": 128}, promote={"port": world.config.promote.port})


def change_the_approval(world, version):
    change_approval(world, version, unit_digest="0" * 64)


def reject_it(world, version):
    change_approval(world, version, decision="rejected")


def change_approval(world, version, **changes):
    release = world.releases[version]
    approval = release.approval.model_copy(update=changes)
    world.releases[version] = release.model_copy(update={"approval": approval})


def test_what_was_not_approved_is_not_started(world):
    """One changed byte or flag voids the approval: it is named, nothing starts, the old one serves."""
    world.promote("1")
    before = world.servers()
    changes = {
        "unit.weights": change_a_weight,
        "unit.tokenizer": change_the_template,
        "approval.unit_digest": change_the_approval,
        "rejected": reject_it,
        "unit.flags": change_a_flag,
    }
    for named, change in changes.items():
        world.promotion(named)
        change(world, named)
        with pytest.raises(ReviewError) as refused:
            world.promote(named)
        assert named in str(refused.value)
        assert world.servers() == before
    assert world.answer() == "version 1"
    assert world.aliases.moves == ["1"]


def test_all_that_changed_is_named_at_once(world):
    """A release with two changed parts gets one error with both and the way out."""
    world.promotion("2")
    change_a_weight(world, "2")
    change_the_template(world, "2")
    with pytest.raises(ReviewError) as refused:
        world.promote("2")
    assert [problem.key for problem in refused.value.problems] == ["unit.weights", "unit.tokenizer"]
    assert "tunegate run" in refused.value.problems[-1].remedy


@pytest.mark.parametrize("behaviour", [{"fail": "ValueError: no such architecture"}, {"error_every": 3}])
def test_a_new_server_that_fails_leaves_the_old_one_serving(world, behaviour):
    """It doesn't start, or fails the canary: it is gone, the old one serves, the alias hasn't moved."""
    world.promote("1")
    before = world.servers()
    with pytest.raises(ServingError):
        world.promote("2", **behaviour)
    assert world.servers() == before
    assert world.answer() == "version 1"
    assert world.aliases.moves == ["1"]
    assert state.read(NAME).wanted is None
    assert world.promote("1") == []


def test_a_first_promotion_that_fails_leaves_nothing(world):
    """Without an old server there is nothing to serve, and no process stays behind."""
    with pytest.raises(ServingError):
        world.promote("1", fail="RuntimeError: out of memory")
    assert world.servers() == []
    assert deployment.status(NAME).state == "none"


def test_an_interrupted_start_stops_the_new_server(world):
    """Ctrl-C while the new server starts ends it; the old one serves."""
    world.promote("1")
    before = world.servers()
    promotion = world.promotion("2", startup_delay=5.0)

    def interrupt_when_it_started() -> None:
        wait_for(lambda: len(world.servers()) > len(before))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupt_when_it_started)
        with pytest.raises(KeyboardInterrupt):
            deployment.promote(promotion)
    assert world.servers() == before
    assert world.answer() == "version 1"
    assert state.read(NAME).wanted is None


def test_a_taken_port_is_found_before_anything_starts(world):
    """The proxy's trouble shows before minutes are spent on a server."""
    with (
        socket.create_server(("127.0.0.1", world.config.promote.port)),
        pytest.raises(RoutingError, match="listens"),
    ):
        world.promote("1")
    assert world.events[-1]["stage"] == "verify"
    assert world.servers() == []


EFFECTS = [(state, "write"), (proxy, "ensure"), (proxy, "switch"), (serve, "start"), (serve, "stop")]


def promote_and_die(promotion: Promotion, effect: int) -> bool:
    """Promote in a forked process, killed after the nth thing it changes; False if it got to its end."""

    def promote(deadly: Deadly) -> None:
        for module, name in EFFECTS:
            setattr(module, name, deadly(getattr(module, name)))
        deployment.promote(replace(promotion, set_champion=deadly(promotion.set_champion)))

    return killed_after(effect, promote)


@pytest.mark.timeout(120)
def test_a_killed_promotion_ends_the_same_when_it_is_repeated(world):
    """Killed after each thing it changes, the same command again comes to the same end.

    One champion, one server, one proxy, nothing under way, and clients answered by the new version.
    """
    world.promote("1")
    effect, died, versions = 0, True, ("1", "2")
    while died:
        effect += 1
        version = versions[effect % 2]
        died = promote_and_die(world.promotion(version), effect)
        assert world.answer() in ("version 1", "version 2")
        world.promote(version)
        assert world.answer() == f"version {version}"
        assert world.aliases.moves[-1] == version
        assert len(world.servers()) == 1, effect
        assert len(proxies_under(world.folder)) == 1
        record = state.read(NAME)
        assert (record.live.release.version, record.champion) == (version, version)
        assert (record.wanted, record.leaving, record.kept) == (None, (), None)
        assert serve.is_alive(record.live.server)
        assert world.promote(version) == []
    assert effect > 8


def test_killed_while_the_server_starts_nothing_leaks(world):
    """A command killed during a slow start is taken up by the next, whichever version that asks for."""
    world.promote("1")
    slow = world.promotion("2", startup_delay=4)
    for asked in ("2", "1", "3"):
        child = os.fork()
        if child == 0:
            try:
                deployment.promote(slow)
            finally:
                os._exit(0)
        wait_for(lambda: len(world.servers()) == 2)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        world.promote(asked)
        wait_for(lambda: len(world.servers()) == 1)  # one whose starter died before it was noted ends by itself
        assert world.answer() == f"version {asked}"
        world.promote("1")


def test_a_rollback_brings_the_release_before_back(world):
    """Each rollback goes one release further back, until there is none before."""
    for version in ("1", "2", "3"):
        world.promote(version)
    assert [world.rollback(), world.answer()] == ["2", "version 2"]
    assert [world.rollback(), world.answer()] == ["1", "version 1"]
    assert deployment.previous(NAME) is None
    assert world.aliases.moves == ["1", "2", "3", "2", "1"]
    assert len(world.servers()) == 1


def test_a_rollback_leaves_the_proxy_where_clients_find_it(world):
    """The earlier release was served at another port; going back to it keeps today's."""
    world.promote("1")
    world.config = a_config()
    world.promote("2")
    url = deployment.status(NAME).url
    world.rollback()
    assert deployment.status(NAME).url == url
    assert world.answer() == "version 1"


@pytest.mark.timeout(120)
def test_a_killed_rollback_is_finished_by_the_next(world):
    """A rollback killed after a step and typed again ends at the same release, not one further back."""
    for version in ("1", "2", "3"):
        world.promote(version)
    for last_step in STEPS[1:-1]:
        target = world.promotion(deployment.previous(NAME).release.version)
        child = os.fork()
        if child == 0:

            def die_after(step, promotion, last_step=last_step):
                step.take(promotion)
                if step.name == last_step:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                deployment.promote(target, die_after)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert world.rollback() == "2"
        assert world.answer() == "version 2"
        assert deployment.previous(NAME).release.version == "1"
        assert len(world.servers()) == 1
        world.promote("3")


def test_a_kept_server_makes_a_rollback_quick(world):
    """With keep_old the old server stays, is used again by a rollback, and never is there a third one."""
    world.config = a_config(promote={"keep_old": True})
    world.promote("1")
    first = world.servers()
    world.promote("2")
    assert len(world.servers()) == 2
    assert deployment.status(NAME).kept == "1"
    world.rollback()
    assert world.answer() == "version 1"
    assert [deployment.status(NAME).pid] == first
    assert len(world.servers()) == 2
    world.promote("3")
    assert len(world.servers()) == 2
    assert state.read(NAME).kept.release.version == "1"


def test_two_commands_at_once_are_one_too_many(world):
    """While one command changes a deployment another one is told so at once."""
    world.promotion("1")
    with store.lock(f"deployment/{NAME}"), pytest.raises(Busy):
        world.promote("1")


def test_draining_waits_for_what_is_in_flight(world):
    """The old server isn't stopped before its last request ends."""
    world.promote("1", hello=" ".join(["old"] * 100), token_delay=0.05)
    with ThreadPoolExecutor(1) as pool:
        old = state.read(NAME).live.server.url
        stream = under_way(pool, lambda: stream_chat(world.url), lambda: running(old) == 1)
        world.promote("2")
        wait_for(stream.done, 1)
        text, _, ended = stream.result()
    assert (text, ended) == (" ".join(["old"] * 100), True)


def asked_of_the_old(monkeypatch, before, after_silence=lambda: None):
    """What the old server tells while it drains, None where it doesn't; `before` is called ahead of the first question."""
    old, told, really = state.read(NAME).live.server, [], serve.in_flight

    def ask(server):
        if server != old:
            return really(server)
        if not told:
            before()
        try:
            told.append(really(server))
        except ServingError:
            told.append(None)
            after_silence()
            raise
        return told[-1]

    monkeypatch.setattr(serve, "in_flight", ask)
    return told


def said_of_the_old(world):
    """What a person reads of the old server's end."""
    texts = [str(event.get("text", "")) for event in world.events]
    return [text for text in texts if "old server" in text]


def test_a_server_that_is_silent_for_a_while_is_not_drained(world, monkeypatch):
    """Frozen over one question, by swap or by load: its stream goes on to its end, and nobody is told of a timeout."""
    world.config = a_config(promote={"drain_timeout": 120}, serve={"shutdown_timeout": 1})
    words = " ".join(["old"] * 150)
    world.promote("1", hello=words, token_delay=0.05)
    old, pid = state.read(NAME).live.server, deployment.status(NAME).pid
    monkeypatch.setattr(serving_server, "METRICS_TIMEOUT_S", 1.0)
    told = asked_of_the_old(
        monkeypatch, lambda: os.kill(pid, signal.SIGSTOP), after_silence=lambda: os.kill(pid, signal.SIGCONT)
    )
    with ThreadPoolExecutor(1) as pool:
        stream = under_way(pool, lambda: stream_chat(world.url), lambda: running(old.url) == 1)
        world.promote("2")
        text, _, ended = stream.result()
    assert (text, ended) == (words, True)
    assert (told[0], told[-1]) == (None, 0)
    assert said_of_the_old(world) == []


def test_a_server_that_dies_while_it_drains_is_drained(world, monkeypatch):
    """It has nothing left that could finish, so nobody waits for it, nor for its restart."""
    world.config = a_config(promote={"drain_timeout": 3600})
    world.promote("1", hello=" ".join(["old"] * 2000), token_delay=0.05)
    old, pid = state.read(NAME).live.server, deployment.status(NAME).pid

    def kill():
        for process in (old.pid, pid):
            os.kill(process, signal.SIGKILL)

    told = asked_of_the_old(monkeypatch, kill)
    with ThreadPoolExecutor(1) as pool:
        stream = under_way(pool, lambda: stream_chat(world.url), lambda: running(old.url) == 1)
        assert world.promote("2") == STEPS
        stream.exception()
    assert set(told) == {None}
    assert said_of_the_old(world) == []


def test_draining_ends_at_its_timeout(world):
    """A request that takes for ever doesn't hold the promotion: it is told of, and the old server ends."""
    world.config = a_config(promote={"drain_timeout": 1}, serve={"shutdown_timeout": 1})
    world.promote("1", hello=" ".join(["old"] * 2000), token_delay=0.05)
    old = state.read(NAME).live.server
    with ThreadPoolExecutor(1) as pool:
        stream = under_way(pool, lambda: stream_chat(world.url), lambda: running(old.url) == 1)
        world.promote("2")
        assert not serve.is_alive(old)
        (said,) = said_of_the_old(world)
        assert "1 requests still in flight after" in said
        stream.exception()


def test_a_server_that_stays_silent_is_stopped_at_the_timeout(world, monkeypatch):
    """What is in flight on it isn't known, and that is what is said, after as long as was really waited."""
    world.config = a_config(promote={"drain_timeout": 2})
    world.promote("1")
    old = state.read(NAME).live.server

    def silent(server):
        if server == old:
            raise ServingError("the server's metrics can't be read")
        return 0

    monkeypatch.setattr(serve, "in_flight", silent)
    began = time.monotonic()
    world.promote("2")
    waited = time.monotonic() - began
    assert not serve.is_alive(old)
    (said,) = said_of_the_old(world)
    found = re.search(r"doesn't tell what is in flight after (\d+) s", said)
    assert 2 <= int(found[1]) <= waited


def test_an_alias_that_cannot_move_is_moved_by_the_next_command(world):
    """When MLflow is away after the switch the new one serves, and the next promote moves the alias alone."""
    world.promote("1")
    world.aliases.fails = True
    with pytest.raises(OSError, match="away"):
        world.promote("2")
    assert world.answer() == "version 2"
    assert deployment.status(NAME).unfinished == ("alias",)
    world.aliases.fails = False
    assert world.promote("2") == ["alias"]
    assert world.aliases.moves == ["1", "2"]


def test_a_killed_proxy_is_brought_back_by_promoting_the_same(world):
    """With the server alive only the proxy is started again, in front of the same server."""
    world.promote("1")
    before = world.servers()
    os.kill(deployment.status(NAME).proxy_pid, signal.SIGKILL)
    wait_for(lambda: deployment.status(NAME).proxy_pid is None)
    assert deployment.status(NAME).state == "down"
    assert world.promote("1") == ["switch"]
    assert world.servers() == before
    assert world.answer() == "version 1"


def test_another_proxy_port_needs_no_new_server(world):
    """A changed promote section moves the proxy; the server stays."""
    world.promote("1")
    before = world.servers()
    world.config = a_config(promote={"port": free_port()})
    assert world.promote("1") == ["switch"]
    assert world.servers() == before
    assert world.answer() == "version 1"
    assert deployment.status(NAME).state == "live"
    assert state.read(NAME).live.settings().promote == world.config.promote


@pytest.mark.parametrize(("asked", "missing"), [("2", STEPS), ("1", ["switch"])])
def test_killed_while_the_proxy_moves_either_version_can_be_promoted(world, asked, missing):
    """Caddy has heard of v2's port, and nothing else has: v2 goes on there, and v1 gets the old port back."""
    world.promote("1")
    before = world.config
    world.config = a_config()
    promotion = world.promotion("2")
    child = os.fork()
    if child == 0:
        post = httpx.Client.post

        def die_after_the_load(self, url, **fields):
            answer = post(self, url, **fields)
            if url == "/load":
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        try:
            httpx.Client.post = die_after_the_load
            deployment.promote(promotion)
        finally:
            os._exit(0)
    _, ended = os.waitpid(child, 0)
    assert os.WIFSIGNALED(ended)
    now = deployment.status(NAME)
    assert (now.url, now.state, now.version) == (world.url, "live", "1")
    assert world.answer() == "version 1"
    if asked == "1":
        world.config = before
    assert world.promote(asked) == missing
    assert world.answer() == f"version {asked}"
    assert deployment.status(NAME).url == world.url
    assert len(world.servers()) == 1


def test_a_promotion_that_loses_requests_says_so(world):
    """Where the proxy moves, before it does; any other promotion loses none and says nothing."""
    world.promote("1")
    world.config = a_config(promote={"port": world.config.promote.port, "drain_timeout": 9})
    assert deployment.loss(NAME, world.config) is None
    world.promote("2")
    assert "lost" not in " ".join(str(event.get("text", "")) for event in world.events)
    world.config = a_config()
    assert "moves" in deployment.loss(NAME, world.config)
    world.promote("3")
    assert "requests will be lost at the switch" in " ".join(str(event.get("text", "")) for event in world.events)


def test_a_server_that_dies_is_started_again_at_its_port(world):
    """Its supervisor brings it back, clients meanwhile wait or get a 503, status counts the restart."""
    world.promote("1")
    (server,) = world.servers()
    url = state.read(NAME).live.server.url
    os.kill(server, signal.SIGKILL)
    meanwhile = chat(world.url)
    assert meanwhile.status_code in (200, 503)
    wait_for(lambda: (now := deployment.status(NAME)).state == "live" and now.pid != server)
    now = deployment.status(NAME)
    assert now.server_url == url
    assert now.restarts == 1
    assert world.answer() == "version 1"
    assert world.promote("1") == []


def test_stopping_ends_every_process_and_promoting_brings_it_back(world):
    """After stop nothing runs and status says so; promoting again brings it back, history unharmed."""
    world.promote("1")
    world.promote("2")
    assert deployment.stop(NAME) is True
    assert world.servers() == []
    assert proxies_under(world.folder) == []
    now = deployment.status(NAME)
    assert (now.state, now.version, now.url) == ("stopped", "2", None)
    assert deployment.stop("unknown") is False
    assert world.promote("2") == STEPS
    assert world.answer() == "version 2"
    assert deployment.previous(NAME).release.version == "1"


def test_status_says_what_to_do_next(world):
    """In every state the lines a person reads name the command that helps."""
    assert "tunegate promote tickets" in "\n".join(deployment.status(NAME).lines())
    world.promote("1")
    world.promote("2")
    live = "\n".join(deployment.status(NAME).lines())
    assert "v2 is live" in live
    assert world.url in live
    assert "tunegate rollback tickets" in live
    deployment.stop(NAME)
    assert "tunegate promote tickets --version 2" in "\n".join(deployment.status(NAME).lines())


def test_status_says_what_a_server_that_is_down_ended_of(world):
    """A folder that changed under a server keeps it from being started again, and the file is named."""
    world.promote("1")
    change_a_weight(world, "1")
    os.kill(deployment.status(NAME).pid, signal.SIGKILL)
    wait_for(lambda: deployment.status(NAME).state == "down")
    said = "\n".join(deployment.status(NAME).lines())
    assert "killed by signal 9; not started again" in said
    assert "model.safetensors was changed" in said
    assert "tunegate promote tickets --version 1" in said


def test_status_counts_what_is_in_flight(world):
    """In-flight requests, uptime and the pid are asked of the live server."""
    world.promote("1", hello=" ".join(["word"] * 20), token_delay=0.05)
    with ThreadPoolExecutor(1) as pool:
        stream = under_way(pool, lambda: stream_chat(world.url), lambda: deployment.status(NAME).in_flight == 1)
        stream.result()
    wait_for(lambda: deployment.status(NAME).in_flight == 0)
    now = deployment.status(NAME)
    assert [now.pid] == world.servers()
    assert 0 < now.uptime_s < 60
    assert json.loads(now.model_dump_json())["restarts"] == 0
    assert HTTP.get(f"{now.url}/v1/models").status_code == 200


class Speechless(BaseHTTPRequestHandler):
    """A server whose model only makes tokens that are no text, without end."""

    def log_message(self, *args):
        """Say nothing."""

    def do_POST(self):
        """Answer with sixteen tokens and no text."""
        choice = {"message": {"content": ""}, "finish_reason": "length"}
        body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 16}}).encode()
        if json.loads(self.rfile.read(int(self.headers["Content-Length"]))).get("stream"):
            body = b"data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_model_that_says_nothing_without_end_fails_the_canary(world):
    """Tokens without text that don't end are what broken weights make; no client meets such a server."""
    promotion = world.promotion("1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Speechless) as http, ThreadPoolExecutor(1) as pool:
        pool.submit(http.serve_forever)
        server = Server(
            runtime="process", unit_digest="0", url=f"http://127.0.0.1:{http.server_port}", model=NAME,
            folder=world.folder, log=world.folder / "vllm.log",
        )  # fmt: skip
        wanted = state.Placement(release=promotion.release, config={}, folder=world.folder, server=server)
        state.write(state.Deployment(name=NAME, wanted=wanted))
        try:
            with pytest.raises(ServingError, match="empty"):
                steps.STEPS["canary"].take(promotion)
        finally:
            http.shutdown()
            state.write(state.Deployment(name=NAME))
