"""The proxy: which requests it passes, whom it sends them to, what it survives. Real Caddy, fake vLLM."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from support.killed import Deadly, killed_after
from support.wire import HTTP, chat, fake_vllm, free_port, running, said, stream_chat, under_way, wait_for

from pipeline.config.schema import PromoteConfig
from pipeline.deployment import caddy
from pipeline.deployment import proxy as routing
from pipeline.errors import ConfigError, RoutingError

KEY = "sk-0123456789abcdef.~+/=="


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    """A proxy's folder, whose path is longer than a socket address may be; what runs there is stopped."""
    folder = tmp_path / ("long-" * 25) / "proxy"
    yield folder
    if folder.exists() and (proxy := routing.find(folder)):
        routing.stop(proxy)


@pytest.fixture
def promote():
    return PromoteConfig(port=free_port())


@pytest.fixture
def proxy(promote, folder):
    return routing.ensure(promote, folder)


def states_of_threads(pid: int) -> set[str]:
    """The states that proc_pid_stat(5) lists, of every thread: a signal stops them one after the other."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {stat.rpartition(")")[2].split()[0] for stat in stats}


def openai_error(response: httpx.Response) -> dict[str, object]:
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_without_an_upstream_a_client_is_told_to_come_back(proxy):
    """503 in OpenAI's form with Retry-After, on every path that clients may use."""
    for method, path in caddy.ALLOWED:
        response = HTTP.request(method, proxy.url + path)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert openai_error(response)["code"] == "service_unavailable"


def test_only_the_paths_that_clients_need_reach_the_server(proxy):
    """Metrics, tokenizer and everything else are a 404 of the proxy's own, however the path is written."""
    with fake_vllm("model") as url:
        routing.switch(proxy, url)
        assert said(chat(proxy.url)) == "model"
        completion = HTTP.post(f"{proxy.url}/v1/completions", json={"prompt": "hello"}).json()
        assert completion["choices"][0]["text"] == "model"
        assert HTTP.get(f"{proxy.url}/v1/models").json()["data"][0]["id"] == "model"
        assert HTTP.get(f"{proxy.url}/health").status_code == 200
        assert HTTP.get(f"{url}/metrics").status_code == 200
        climbing = ("/v1/models/../../metrics", "/v1/models%2f..%2f..%2fmetrics", "/v1/models/")
        for path in ("/metrics", "/tokenize", "/version", "/docs", "/", *climbing):
            error = openai_error(raw_request(proxy.url, "GET", path))
            assert error["code"] == "not_found", path
        assert HTTP.get(f"{proxy.url}/v1/chat/completions").status_code == 404
        assert HTTP.post(f"{proxy.url}/tokenize", json={"prompt": "x"}).status_code == 404


def raw_request(url: str, method: str, path: str) -> httpx.Response:
    """A request whose path is sent as it is written; httpx would tidy it up."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    with socket.create_connection((host, port)) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = [line.split(": ", 1) for line in lines]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


def test_a_path_that_only_looks_allowed_is_sent_on_as_the_allowed_one(proxy):
    """/metrics/../v1/models reaches the server as /v1/models, so a mount at /metrics can't take it."""
    with fake_vllm("model") as url:
        routing.switch(proxy, url)
        assert raw_request(proxy.url, "GET", "/metrics/../v1/models").json()["data"][0]["id"] == "model"
        assert raw_request(url, "GET", "/metrics/../v1/models").status_code == 404


def test_a_stream_arrives_piece_by_piece(proxy):
    """The proxy holds nothing back: the pieces come as far apart as the server sends them."""
    words = " ".join(["word"] * 20)
    with fake_vllm(words, token_delay=0.1) as url:
        routing.switch(proxy, url)
        text, times, ended = stream_chat(proxy.url)
    assert (text, ended) == (words, True)
    assert times[-1] - times[0] > 0.4


def test_a_client_that_leaves_frees_the_server(proxy):
    """When the client of a stream hangs up, the server's side is closed as well and stops generating."""
    with fake_vllm("model", answer=" ".join(["word"] * 2000), token_delay=0.05) as url:
        routing.switch(proxy, url)
        body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
        with HTTP.stream("POST", f"{proxy.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            wait_for(lambda: running(url) == 1)
        wait_for(lambda: running(url) == 0)


def test_requests_in_flight_finish_on_the_old_server(proxy):
    """Streams that began before a switch end whole on the old server while new requests go to the new one."""
    old, new = " ".join(["old"] * 60), "new"
    with fake_vllm(old, token_delay=0.1) as old_url, fake_vllm(new) as new_url, ThreadPoolExecutor(8) as pool:
        routing.switch(proxy, old_url)
        streams = [pool.submit(stream_chat, proxy.url) for _ in range(8)]
        wait_for(lambda: running(old_url) == 8)
        routing.switch(proxy, new_url)
        assert routing.current(proxy) == new_url
        assert said(chat(proxy.url)) == new
        assert running(old_url) == 8
        assert [stream.result()[::2] for stream in streams] == [(old, True)] * 8


def test_switching_loses_no_request_of_a_busy_keep_alive_client(proxy):
    """Clients on open connections that ask without a pause see no error over a hundred switches."""
    failures, count, done = [], [0], threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=30) as client:
            while not done.is_set():
                try:
                    response = chat(proxy.url, client)
                except httpx.HTTPError as error:
                    failures.append(repr(error))
                else:
                    count[0] += 1
                    if response.status_code != 200:
                        failures.append(response.text)

    with fake_vllm("a") as one, fake_vllm("b") as two, ThreadPoolExecutor(4) as pool:
        routing.switch(proxy, one)
        clients = [pool.submit(ask) for _ in range(4)]
        switches = 0
        while switches < 100 or (count[0] <= 100 and switches < 5000):
            routing.switch(proxy, (one, two)[switches % 2])
            switches += 1
            time.sleep(0.02)
        done.set()
        for client in clients:
            client.result()
    assert failures == []
    assert count[0] > 100


def test_a_server_that_starts_again_is_waited_for(promote, folder, monkeypatch):
    """A request that finds the server's port closed is answered when the server is back in time."""
    monkeypatch.setattr(caddy, "TRY_FOR_S", 25)
    proxy = routing.ensure(promote, folder)
    port = free_port()
    routing.switch(proxy, f"http://127.0.0.1:{port}")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, proxy.url)
        time.sleep(0.3)
        with fake_vllm("back", port=port):
            assert said(waiting.result()) == "back"


def test_a_dead_server_is_a_503(promote, folder, monkeypatch):
    """When the server stays away the client gets OpenAI's error form and Retry-After, not an empty 502."""
    monkeypatch.setattr(caddy, "TRY_FOR_S", 1)
    proxy = routing.ensure(promote, folder)
    routing.switch(proxy, f"http://127.0.0.1:{free_port()}")
    response = chat(proxy.url)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert openai_error(response)["code"] == "service_unavailable"


def test_ensuring_twice_is_one_proxy(promote, folder, proxy):
    """A running proxy with the same settings is left alone, and that takes no time."""
    took = []
    for _ in range(5):
        start = time.monotonic()
        assert routing.ensure(promote, folder) == proxy
        took.append(time.monotonic() - start)
    assert min(took) < 0.5
    assert routing.matches(promote, folder)


def test_a_killed_proxy_comes_back_with_its_upstream(promote, folder, proxy):
    """After kill -9 the next ensure starts it with the last config and the last upstream."""
    with fake_vllm("model") as url:
        routing.switch(proxy, url)
        os.kill(proxy.pid, signal.SIGKILL)
        wait_for(lambda: routing.find(folder) is None)
        again = routing.ensure(promote, folder)
        assert again.pid != proxy.pid
        assert again.url == proxy.url
        assert said(chat(again.url)) == "model"


def test_a_proxy_that_hangs_is_replaced(promote, folder, proxy, monkeypatch):
    """One that takes connections and never answers is killed and started again."""
    monkeypatch.setattr(routing, "HANG_TIMEOUT_S", 0.5)
    os.kill(proxy.pid, signal.SIGSTOP)
    wait_for(lambda: states_of_threads(proxy.pid) == {"T"})
    again = routing.ensure(promote, folder)
    assert again.pid != proxy.pid
    assert HTTP.get(f"{again.url}/health").status_code == 503


def test_a_proxy_started_by_a_killed_command_is_found(promote, folder, proxy):
    """Which process is the proxy is asked of the kernel, so no lost pid file can leave one behind."""
    assert sorted(path.name for path in folder.iterdir() if "pid" in path.name) == []
    assert routing.find(folder).pid == proxy.pid
    routing.stop(proxy)
    assert routing.find(folder) is None
    routing.stop(proxy)


def test_another_port_is_taken_without_a_restart(promote, folder, proxy):
    """Changed settings are loaded into the running Caddy, and a stream through the old port ends whole."""
    with fake_vllm("a b c d e f g h", token_delay=0.1) as url, ThreadPoolExecutor(1) as pool:
        routing.switch(proxy, url)
        stream = under_way(pool, lambda: stream_chat(proxy.url), lambda: running(url) == 1)
        moved = routing.ensure(PromoteConfig(port=free_port()), folder)
        assert moved.pid == proxy.pid
        assert moved.url != proxy.url
        assert said(chat(moved.url)) == "a b c d e f g h"
        assert stream.result()[::2] == ("a b c d e f g h", True)


def test_a_taken_port_is_refused_with_a_remedy(promote, folder, proxy, tmp_path):
    """Two proxies never share a port by SO_REUSEPORT, neither at the start nor by new settings."""
    with pytest.raises(RoutingError, match=f"{promote.port}") as refused:
        routing.ensure(promote, tmp_path / "other")
    assert "promote.port" in str(refused.value)
    with fake_vllm("model") as url, pytest.raises(RoutingError):
        routing.ensure(PromoteConfig(port=httpx.URL(url).port), folder)
    assert routing.matches(promote, folder)


def move_and_die(moved: PromoteConfig, folder: Path, effect: int) -> bool:
    """Move the proxy in a forked process, killed after the nth thing it changes; False if it got to its end."""

    def move(deadly: Deadly) -> None:
        routing.write_json = deadly(routing.write_json)
        httpx.Client.post = deadly(httpx.Client.post)
        routing.ensure(moved, folder)

    return killed_after(effect, move)


def test_a_killed_move_to_another_port_is_finished_or_taken_back(promote, folder, proxy):
    """Killed after each thing that it changes, the same command goes on, and one that wants the old port goes back."""
    with fake_vllm("model") as url:
        routing.switch(proxy, url)
        effect, died = 0, True
        while died:
            effect += 1
            for same in (True, False):
                moved = PromoteConfig(port=free_port())
                died = move_and_die(moved, folder, effect)
                found = routing.find(folder)
                assert said(chat(found.url)) == "model", "status names a port that answers"
                assert routing.matches(moved, folder) is (found.url == caddy.client_url(moved))
                wanted = moved if same else promote
                routing.preflight(wanted, folder)
                assert routing.ensure(wanted, folder).pid == proxy.pid
                assert said(chat(caddy.client_url(wanted))) == "model"
                assert routing.matches(wanted, folder)
                promote = wanted
    assert effect > 2


def test_a_full_disk_leaves_the_proxy_where_clients_find_it(promote, folder, proxy, monkeypatch):
    """What can't be kept isn't loaded either."""

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with fake_vllm("model") as url, monkeypatch.context() as patch:
        routing.switch(proxy, url)
        patch.setattr(routing, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            routing.ensure(PromoteConfig(port=free_port()), folder)
        assert routing.find(folder) == proxy
        assert said(chat(proxy.url)) == "model"


def test_of_two_that_want_one_port_at_once_one_is_refused(promote, tmp_path, monkeypatch):
    """Both may look before either listens, and Caddys share a port: then clients would meet either model."""
    both, look = threading.Barrier(2), routing._refuse_taken_port

    def look_together(promote):
        look(promote)
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=3)

    monkeypatch.setattr(routing, "_refuse_taken_port", look_together)
    folders = [tmp_path / name / "proxy" for name in ("a", "b")]
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(routing.ensure, promote, folder) for folder in folders]
        refused = [one.exception() for one in asked if one.exception()]
    running = [proxy for folder in folders if (proxy := routing.find(folder))]
    for proxy in running:
        routing.stop(proxy)
    assert [proxy.url for proxy in running] == [caddy.client_url(promote)]
    assert [type(error) for error in refused] == [RoutingError]
    assert f"something else listens on 127.0.0.1:{promote.port}" in str(refused[0])


def test_what_the_proxy_is_not_told_leaves_its_connections_open(promote, folder, proxy):
    """Another drain_timeout or keep_old loads no config, which would close connections that clients may be writing to."""
    others = [promote.model_copy(update=change) for change in ({"drain_timeout": 7}, {"keep_old": True})]
    with closing(HTTPConnection("127.0.0.1", promote.port, timeout=30)) as connection:
        connection.connect()
        connection.auto_open = 0  # a closed connection fails instead of being opened again
        for other in [promote, *others]:
            assert routing.loss(other, folder) is None
            assert routing.ensure(other, folder) == proxy
            assert routing.matches(other, folder)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 503


def test_what_loses_requests_is_told_before(monkeypatch, promote, folder):
    """Another port, host, key variable or key; the first start and what is right already lose none."""
    assert routing.loss(promote, folder) is None
    monkeypatch.setenv("TUNEGATE_API_KEY", KEY)
    proxy = routing.ensure(promote, folder)
    assert routing.loss(promote, folder) is None
    other = PromoteConfig(port=free_port())
    assert routing.loss(other, folder) == f"the proxy moves from {proxy.url} to http://127.0.0.1:{other.port}"
    everywhere = PromoteConfig(host="0.0.0.0", port=promote.port)
    assert "promote.host" in routing.loss(everywhere, folder)
    routing.ensure(everywhere, folder)
    assert routing.loss(everywhere, folder) is None
    monkeypatch.setenv("TUNEGATE_API_KEY", "another-key")
    assert "started again" in routing.loss(everywhere, folder)


def test_off_loopback_a_key_is_needed(monkeypatch, folder):
    """Without a key nothing is started; the error names the variable, the choice and the command."""
    monkeypatch.delenv("TUNEGATE_API_KEY", raising=False)
    for key in ("", "no spaces", "pre*", "{env.HOME}"):
        monkeypatch.setenv("TUNEGATE_API_KEY", key)
        with pytest.raises(ConfigError) as refused:
            routing.ensure(PromoteConfig(host="0.0.0.0", port=free_port()), folder)
        (problem,) = refused.value.problems
        assert problem.key == "promote.host"
        assert "TUNEGATE_API_KEY" in problem.what
        assert "export TUNEGATE_API_KEY=" in problem.remedy
    assert not folder.exists()


def test_the_key_guards_every_path_and_never_lies_on_disk(monkeypatch, folder):
    """Off loopback each path answers 401 without the key, and the key is in no file."""
    monkeypatch.setenv("TUNEGATE_API_KEY", KEY)
    promote = PromoteConfig(host="0.0.0.0", port=free_port())
    proxy = routing.ensure(promote, folder)
    headers = routing.client_headers(promote)
    with fake_vllm("model") as url:
        routing.switch(proxy, url)
        for method, path in caddy.ALLOWED:
            for wrong in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer *", KEY):
                response = HTTP.request(method, proxy.url + path, headers={"Authorization": wrong})
                assert response.status_code == 401
                assert openai_error(response)["code"] == "invalid_api_key"
        assert HTTP.get(f"{proxy.url}/v1/models", headers=headers).status_code == 200
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY not in path.read_text(encoding="utf-8", errors="replace"), path


def test_a_changed_key_is_taken_over(monkeypatch, folder):
    """After the key's variable changed, the next ensure serves the new key and refuses the old one."""
    promote = PromoteConfig(host="0.0.0.0", port=free_port())
    monkeypatch.setenv("TUNEGATE_API_KEY", KEY)
    routing.ensure(promote, folder)
    monkeypatch.setenv("TUNEGATE_API_KEY", "another-key")
    proxy = routing.ensure(promote, folder)
    assert HTTP.get(f"{proxy.url}/health", headers=routing.client_headers(promote)).status_code == 503
    assert HTTP.get(f"{proxy.url}/health", headers={"Authorization": f"Bearer {KEY}"}).status_code == 401


def test_a_proxy_that_leaves_loopback_asks_for_the_key(monkeypatch, folder, proxy):
    """A proxy started without a key gets it when its host changes, and refuses whoever lacks it."""
    monkeypatch.setenv("TUNEGATE_API_KEY", KEY)
    promote = PromoteConfig(host="0.0.0.0", port=free_port())
    moved = routing.ensure(promote, folder)
    assert HTTP.get(f"{moved.url}/health").status_code == 401
    assert HTTP.get(f"{moved.url}/health", headers={"Authorization": "Bearer"}).status_code == 401
    assert HTTP.get(f"{moved.url}/health", headers=routing.client_headers(promote)).status_code == 503


def test_the_key_is_not_sent_on(monkeypatch, folder):
    """The server behind the proxy gets the request without its Authorization header."""
    monkeypatch.setenv("TUNEGATE_API_KEY", KEY)
    promote = PromoteConfig(host="0.0.0.0", port=free_port())
    proxy = routing.ensure(promote, folder)
    with socket.create_server(("127.0.0.1", 0)) as upstream, ThreadPoolExecutor(1) as pool:
        routing.switch(proxy, f"http://127.0.0.1:{upstream.getsockname()[1]}")
        asked = pool.submit(HTTP.get, f"{proxy.url}/v1/models", headers=routing.client_headers(promote))
        connection, _ = upstream.accept()
        with connection:
            request = connection.recv(65536).decode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert asked.result().status_code == 200
    assert "authorization" not in request.lower()


def test_a_body_without_bounds_is_refused(proxy):
    """More than the limit is a 413 in OpenAI's form."""
    with fake_vllm("model") as url:
        routing.switch(proxy, url)
        response = raw_body(proxy.url, caddy.MAX_BODY_BYTES + 1)
    assert "413" in response


def raw_body(url: str, size: int) -> str:
    host, port = httpx.URL(url).host, httpx.URL(url).port
    with socket.create_connection((host, port), timeout=10) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(size // 2**20 + 1):
            try:
                connection.sendall(b" " * min(2**20, size))
            except OSError:
                break
        return connection.recv(65536).decode()


def test_an_upstream_is_a_loopback_style_url(proxy):
    """A wrong address is refused before it is written, and the one in use stays."""
    routing.switch(proxy, "http://127.0.0.1:9")
    for wrong in ("127.0.0.1:9", "https://127.0.0.1:9", "http://127.0.0.1"):
        with pytest.raises(RoutingError):
            routing.switch(proxy, wrong)
    assert routing.current(proxy) == "http://127.0.0.1:9"
    routing.switch(proxy, None)
    assert routing.current(proxy) is None


def test_a_proxy_that_cannot_start_says_why(promote, folder, monkeypatch):
    """The error carries Caddy's last line and its log, and nothing is left running."""
    broken = {**caddy.caddy_config(promote), "apps": {"nonsense": {}}}
    monkeypatch.setattr(routing, "caddy_config", lambda promote: broken)
    with pytest.raises(RoutingError, match="nonsense") as failed:
        routing.ensure(promote, folder)
    assert Path(failed.value.problems[0].file).is_file()
    assert routing.find(folder) is None


def test_the_config_is_kept_by_us_alone(promote, folder, proxy):
    """caddy.json holds the resolved config; Caddy saves none itself."""
    assert json.loads((folder / "caddy.json").read_text(encoding="utf-8")) == caddy.caddy_config(promote)
    assert list(folder.rglob("autosave.json")) == []
