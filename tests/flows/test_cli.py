"""The command line: what holds for every command."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support.wire import fake_vllm

from flows import cli, deployments
from pipeline.errors import ServingError

ROOT = Path(__file__).parents[2]
DEAD_PROXY = "http://127.0.0.1:9"


@pytest.fixture
def proxies(monkeypatch):
    """An environment with a proxy that answers nobody."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, DEAD_PROXY)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variable", "given", "then"),
    [
        ("NO_PROXY", "", "127.0.0.1,localhost"),
        ("NO_PROXY", "intern.example, localhost", "intern.example,localhost,127.0.0.1"),
        ("no_proxy", "intern.example", "intern.example,127.0.0.1,localhost"),
        ("NO_PROXY", "*", "*"),
    ],
)
def test_what_is_ours_passes_no_proxy_and_the_users_list_stays(proxies, variable, given, then):
    """Both spellings, as some programs read one and some the other."""
    proxies.setenv(variable, given)
    with pytest.raises(SystemExit) as ended:
        cli.main(["schema"])
    assert not ended.value.code
    assert (os.environ["NO_PROXY"], os.environ["no_proxy"]) == (then, then)


def test_a_plain_client_reaches_our_servers_past_a_proxy(proxies):
    """Prefect's and MLflow's clients go by the environment, and without our entries they would ask the proxy."""
    with fake_vllm("m") as url:
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        cli.pass_proxies_by()
        assert httpx.get(f"{url}/health").is_success
        with pytest.raises(httpx.ConnectError):
            httpx.get("http://elsewhere.example")


@pytest.mark.parametrize("command", [("run", "use.yaml"), ("demo",), ("status",), ("up",), ("down",), ("gc",)])
def test_a_home_that_cannot_be_written_stops_what_writes(monkeypatch, capsys, tmp_path, command):
    """Before anything else, and with no traceback."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "file" / "below"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 3
    assert capsys.readouterr().err.splitlines()[1] == (
        f"{tmp_path}/file/below: TUNEGATE_HOME: can't be written: Not a directory"
    )


@pytest.mark.parametrize("days", ["-3", "nan", "week", "-0.5"])
def test_gc_keeps_no_negative_number_of_days(capsys, days):
    """It would delete what is being made now."""
    with pytest.raises(SystemExit) as ended:
        cli.parser().parse_args(["gc", "--keep-days", days])
    assert ended.value.code == 2
    assert f"argument --keep-days: {days!r} must be a number of days" in capsys.readouterr().err
    assert cli.parser().parse_args(["gc", "--keep-days", "0.5"]).keep_days == 0.5


WATCHED = """
import builtins, os, sys
real, SETTINGS = builtins.__import__, ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_HOME", "MLFLOW_DISABLE_TELEMETRY")
def watched(name, *rest, **named):
    if name.partition(".")[0] in ("prefect", "mlflow"):
        unset = [setting for setting in SETTINGS if setting not in os.environ]
        assert not unset, (name, unset)
    return real(name, *rest, **named)
builtins.__import__ = watched
from flows import cli
try:
    cli.main(sys.argv[1:])
finally:
    print("prefect is imported" if "prefect" in sys.modules else "prefect is not imported")
"""


@pytest.mark.parametrize(
    "arguments",
    ["status", "logs tickets", "chat tickets -m hello", "gc --dry-run", "cancel",
     "rollback tickets", "promote tickets --dry-run", "review tickets"],
)  # fmt: skip
def test_no_command_imports_prefect_or_mlflow_before_they_are_told_to_keep_quiet(tmp_path, arguments):
    """Those that need no flow don't import Prefect at all. The first one to ask MLflow says nothing of the database that it makes."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environ.pop("DO_NOT_TRACK", None)
    environ |= {"TUNEGATE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments.split()], env=environ, capture_output=True, text=True, check=False
    )
    assert ended.stdout.endswith("prefect is not imported\n"), ended.stderr
    assert "Traceback" not in ended.stderr
    assert "INFO" not in ended.stderr
    assert not (tmp_path / ".prefect").exists()


def commands():
    """Each command with its parser."""
    (subparsers,) = (action for action in cli.parser()._actions if isinstance(action, cli.Commands))
    return subparsers.choices


def test_every_command_is_answered_by_a_function_that_exists():
    """The dotted names are strings, so that nothing heavy is imported early; a wrong one would show in use alone."""
    for name, command in commands().items():
        module, function = command.get_default("answer").split(":")
        assert callable(getattr(importlib.import_module(module), function)), name
    answers = {command.get_default("answer") for command in commands().values()}
    assert set(cli.READERS) <= answers


def test_deploy_needs_a_prefect_server(monkeypatch, capsys):
    """With the two ways to one; the module that compose.yaml of version 0.1 starts is the same command."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for start in (lambda: cli.main(["deploy", "configs/demo.yaml"]), deployments.main):
        monkeypatch.setattr(sys, "argv", ["flows.deployments", "configs/demo.yaml", "--pool", "kubernetes"])
        with pytest.raises(SystemExit) as ended:
            start()
        assert ended.value.code == ServingError.exit_code
        said = capsys.readouterr().err
        assert "PREFECT_API_URL is not set" in said
        assert "tunegate up" in said


def test_deploy_tells_the_server_the_configs_deployments(monkeypatch, capsys, tmp_path):
    """To the pool of this machine's worker, with the data where its runs find it; the names are printed."""
    told = []
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr(deployments, "deploy", lambda planned, pool: told.append((planned, pool)) or ["build/demo"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["deploy", str(ROOT / "configs" / "demo.yaml"), str(tmp_path)])
    assert not ended.value.code
    ((planned, pool),) = told
    assert pool == deployments.POOL
    assert {str(tmp_path)} == {
        entry["parameters"]["data_dir"] for entry in planned["deployments"] if "data_dir" in entry["parameters"]
    }
    assert capsys.readouterr().out == "build/demo\n"
