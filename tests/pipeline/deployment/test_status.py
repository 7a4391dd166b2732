"""The lines of a status: the condition, and the command that comes next."""

from __future__ import annotations

import pytest

from pipeline.deployment.status import Status

LIVE = Status(
    name="tickets", state="live", version="2", unit_digest="0123456789abcdef", reviewer="ann", url="http://127.0.0.1:8080",
    server_url="http://127.0.0.1:9000", pid=7, uptime_s=42.4, restarts=1, in_flight=3, proxy_ok=True,
)  # fmt: skip


def changed(**fields) -> str:
    """The lines of a live status with other fields."""
    return "\n".join(LIVE.model_copy(update=fields).lines())


def test_a_live_release_has_its_unit_clients_and_server():
    """And no next command, as none is needed."""
    assert LIVE.lines() == [
        "tickets v2 is live; unit 0123456789ab, approved by ann",
        "  clients   http://127.0.0.1:8080",
        "  server    http://127.0.0.1:9000  pid 7, up 42 s, restarts 1, in flight 3",
    ]


def test_what_was_never_promoted_has_one_line():
    """With the command that promotes it."""
    assert Status(name="tickets", state="none").lines() == [
        "tickets: nothing was promoted yet; next: tunegate promote tickets"
    ]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"wanted": "3"}, "wanted    v3, not switched to yet; next: tunegate promote tickets --version 3"),
        ({"unfinished": ("drain", "alias")}, "missing   drain, alias; next: tunegate promote tickets --version 2"),
        ({"state": "stopped", "server_url": None}, "next      tunegate promote tickets --version 2"),
        ({"state": "down", "why": "killed by signal 9"}, "ended     killed by signal 9"),
        ({"kept": "1"}, "kept      v1 still runs, for a quick rollback"),
        ({"previous": ("1", "3")}, "before    v3, v1; back to the first: tunegate rollback tickets"),
        ({"proxy_ok": False}, "clients   http://127.0.0.1:8080  (the model does not answer through it)"),
        ({"url": None, "proxy_ok": False}, "clients   the proxy does not run"),
        ({"container": "0123456789abcdef"}, "container 0123456789ab, up 42 s"),
        ({"pid": None, "uptime_s": None, "in_flight": None}, "pid -, not up, restarts 1, in flight ?"),
    ],
)
def test_whatever_is_amiss_has_a_line(fields, line):
    """With the command that mends it, where there is one."""
    assert line in changed(**fields)


@pytest.mark.parametrize(
    ("seconds", "text"), [(59, "59 s"), (60, "1 min"), (3600, "1 h 0 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")]
)
def test_an_uptime_is_said_in_two_units(seconds, text):
    """The largest two that it has."""
    assert f"up {text}," in changed(uptime_s=seconds)
