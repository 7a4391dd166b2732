"""`tunegate gate`: stored reports under another policy."""

from __future__ import annotations

import json

import pytest
from support.sample_build import sample_build

from flows import cli
from pipeline import store
from pipeline.files import write_json

STRICT = "metrics:\n  - {metric: exact_match, min: 0.999}\n"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A finished build in a store of its own."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    made = sample_build(tmp_path, count=120)
    folder = store.build_folder(made.key)
    folder.mkdir(parents=True)
    write_json(folder / "build.json", json.loads(made.model_dump_json()))
    finished = {"name": made.name, "build_key": made.key, "outcome": made.verdict.outcome, "at": "2026-01-02T03:04:05"}
    write_json(folder / "finished.json", finished)
    return made


def typed(*arguments: str) -> int:
    """Run a command; its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code or 0


def test_its_own_policy_comes_to_its_own_verdict(build, capsys):
    """Everything the gate was told is in the record."""
    assert typed("gate", build.name, "--json") == (0 if build.verdict.outcome == "pass" else 4)
    assert json.loads(capsys.readouterr().out) == json.loads(build.verdict.model_dump_json())


@pytest.mark.parametrize(
    "text",
    [
        STRICT,
        f"name: other\nnonsense: here\ngate:\n{STRICT}".replace("\n  -", "\n    -").replace("gate:\nm", "gate:\n  m"),
    ],
)
def test_another_policy_comes_to_another_and_nothing_changes(build, tmp_path, capsys, text):
    """A file of gate keys or a whole config, of which only the gate is read; the exit code is the gate's."""
    policy = tmp_path / "strict.yaml"
    policy.write_text(text)
    before = {path: path.read_bytes() for path in store.home().rglob("*.json")}
    assert typed("gate", "--policy", str(policy)) == 4
    assert "exact_match >= 0.999" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in store.home().rglob("*.json")} == before


def test_a_policys_mistakes_are_told_with_their_lines(build, tmp_path, capsys):
    """All at once, as a config's are."""
    policy = tmp_path / "wrong.yaml"
    policy.write_text("confidense: 0.9\nmetrics:\n  - {metric: exact_match}\n")
    assert typed("gate", "--policy", str(policy)) == 2
    said = capsys.readouterr().err
    assert "wrong.yaml:1" in said
    assert "confidence" in said
    assert "wrong.yaml:3" in said


def test_what_the_policy_asks_for_and_nobody_measured_is_told(build, tmp_path, capsys):
    """Stored reports can't answer every question."""
    policy = tmp_path / "more.yaml"
    policy.write_text("metrics:\n  - {metric: rougeL, min: 0.5}\n")
    assert typed("gate", "--policy", str(policy)) == 4
    assert "rougeL is not measured" in capsys.readouterr().err


def test_an_unknown_build_is_told_with_those_there_are(build, capsys):
    """By name and by key."""
    for arguments in (("nobody",), ("--build", "zzz")):
        assert typed("gate", *arguments) == 5
        assert build.key[:12] in capsys.readouterr().err
