"""`tunegate check` and `run --dry-run`: the plan, what is wrong with a config, and what can't pass."""

from __future__ import annotations

import pytest

from flows import cli

DATA = '{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}\n'


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a config beside its data, in a house of its own."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "mlruns"))
    folder = tmp_path / "use"
    folder.mkdir()
    (folder / "train.jsonl").write_text(DATA)

    def write(text):
        (folder / "use.yaml").write_text("datasets:\n  - path: train.jsonl\n" + text)
        return str(folder / "use.yaml")

    return write


def ended(*arguments):
    """A command's exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code or 0


def test_a_policy_that_cannot_pass_is_warned_of_below_the_plan(config, capsys):
    """The first look and the second, which comes from memory, say the same."""
    file = config("")
    said = []
    for _ in range(2):
        assert ended("check", file) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert f"warning: {file}: gate.metrics: no quality is asked for" in said[0]
    assert "add one, such as {metric: exact_match, min: 0.5}" in said[0]


def test_a_policy_that_can_pass_is_not_warned_of(config, capsys):
    """The plan ends with the memory."""
    text = "gate: {metrics: [{metric: exact_match, min: 0.5}]}\n"
    assert ended("check", config(text)) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("command", [("check",), ("run",), ("run", "--dry-run")])
def test_a_policy_that_cannot_be_decided_stops_before_anything_starts(config, capsys, tmp_path, command):
    """With its line, and nothing is left behind."""
    file = config("gate:\n  metrics:\n    - metric: accuracy\n      min: 0.5\n")
    assert ended(command[0], file, *command[1:]) == 2
    assert f"{file}:5: gate.metrics[0].metric: accuracy is not measured" in capsys.readouterr().err
    assert not (tmp_path / "mlruns").exists()
