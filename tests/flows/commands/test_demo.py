"""`tunegate demo`: its data alone, and the commands that it types in turn."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
from support.wire import fake_vllm

from flows import cli
from flows.commands import demo
from pipeline.data import demo_tickets


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(demo, "ROWS", {"train": 40, "holdout": 12})
    return tmp_path / "home"


@pytest.fixture
def typed(monkeypatch):
    """The commands that were typed; none of them does anything."""
    lines = []
    monkeypatch.setattr(cli, "main", lines.append)
    return lines


def test_the_data_alone_is_what_the_demo_trains_on(home, tmp_path, capsys):
    """The same rows for the same seed; nothing is built, and the next command is named."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--data-only"])
    assert not ended.value.code
    demo_tickets.write(tmp_path / "again", train=40, holdout=12, seed=demo.SEED)
    for name in ("tickets-train.jsonl", "tickets-holdout.jsonl"):
        assert (home / "demo" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert f"next: tunegate run {demo.CONFIG} --data-dir {home}/demo" in capsys.readouterr().out
    assert {path.name for path in home.iterdir()} == {"demo"}


def test_data_that_is_there_stays(home):
    """A second demo builds on the same rows, so that it has nothing to build."""
    first = demo._write_data()
    (first / "tickets-train.jsonl").write_text("mine\n", encoding="utf-8")
    assert demo._write_data() == first
    assert (first / "tickets-train.jsonl").read_text(encoding="utf-8") == "mine\n"


@pytest.mark.parametrize("version", ["3", None])
def test_the_demo_types_what_a_user_would(home, typed, monkeypatch, capsys, version):
    """An approval where a version waits, and none where nothing is new; then one question through the proxy."""
    monkeypatch.setattr(demo, "waiting", lambda name: SimpleNamespace(version=version) if version else None)
    with fake_vllm(demo.NAME, answer="{}") as url:
        monkeypatch.setattr(demo.promote, "status", lambda name: SimpleNamespace(url=url))
        assert demo.demo(argparse.Namespace(reviewer="ann", data_only=False)) == 0
    approval = [("approve", "tickets", "--version", "3", "--reviewer", "ann", "--reason", "demo")]
    run = ("run", str(demo.CONFIG), "--data-dir", str(home / "demo"))
    assert typed == [run, *(approval if version else []), ("promote", "tickets")]
    printed = capsys.readouterr().out
    assert "$ tunegate promote tickets" in printed
    assert "  answer    {}  (" in printed
    assert '  expected  {"' in printed


def test_a_command_that_fails_ends_the_demo(monkeypatch, capsys):
    """With its exit code; one that ends well goes on."""
    codes = iter([0, None, 4])

    def end(_arguments):
        raise SystemExit(next(codes))

    monkeypatch.setattr(cli, "main", end)
    demo._typed("status")
    demo._typed("status")
    with pytest.raises(SystemExit) as ended:
        demo._typed("run", "a config.yaml")
    assert ended.value.code == 4
    assert "$ tunegate run 'a config.yaml'" in capsys.readouterr().out
