"""`tunegate check` and `run --dry-run`: the plan, what is wrong with a config, and what can't pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ended import ended

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


def test_broken_must_pass_prompts_stop_before_anything_starts(config, capsys, tmp_path):
    """The file lies beside the data; each of its mistakes is told with its line, also at the second look."""
    (tmp_path / "use" / "prompts.yaml").write_text("- prompt: hello\n  assert:\n    - type: contain\n      value: x\n")
    file = config("evaluate: {prompts: prompts.yaml}\ngate: {metrics: [{metric: exact_match, min: 0.5}]}\n")
    for _ in range(2):
        assert ended("check", file) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path}/use/prompts.yaml:3: [0].assert[0].type: 'contain' is not a type of assertion" in said
        assert "did you mean contains?" in said


def test_must_pass_prompts_are_part_of_the_build(config, capsys, tmp_path):
    """Another prompt is another build."""
    file = config("evaluate: {prompts: prompts.yaml}\ngate: {metrics: [{metric: exact_match, min: 0.5}]}\n")
    builds = []
    for word in ("hello", "goodbye"):
        (tmp_path / "use" / "prompts.yaml").write_text(f"- prompt: {word}\n  assert: [{{type: is-refusal}}]\n")
        assert ended("check", file) == 0
        builds.append(capsys.readouterr().out.split()[2])
    assert builds[0] != builds[1]


@pytest.mark.parametrize("command", [("check",), ("run",), ("run", "--dry-run")])
def test_a_policy_that_cannot_be_decided_stops_before_anything_starts(config, capsys, tmp_path, command):
    """With its line, and nothing is left behind."""
    file = config("gate:\n  metrics:\n    - metric: accuracy\n      min: 0.5\n")
    assert ended(command[0], file, *command[1:]) == 2
    assert f"{file}:5: gate.metrics[0].metric: accuracy is not measured" in capsys.readouterr().err
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("command", [("check",), ("run", "--dry-run")])
def test_the_plan_needs_no_home_that_can_be_written(config, capsys, tmp_path, monkeypatch, command):
    """What it would remember is worked out again."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "file" / "below"))
    file = config("gate: {metrics: [{metric: exact_match, min: 0.5}]}\n")
    assert ended(command[0], file, *command[1:]) == 0
    assert "to do" in capsys.readouterr().out


def test_what_cannot_fit_here_is_a_warning(config, capsys):
    """It may be meant for a larger machine; a cluster's pod that asks for GPUs is one."""
    text = "gate: {metrics: [{metric: exact_match, min: 0.5}]}\nserve: {kv_cache_memory: 90000GiB}\n"
    file = config(text)
    assert ended("check", file) == 0
    assert f"warning: {file}: serve.kv_cache_memory: serve would take about 90000.0 GiB" in capsys.readouterr().out
    pod = "{resources: {limits: {nvidia.com/gpu: 1}}}"
    assert ended("check", config(f"{text}kubernetes: {{image: 'x@sha256:{'0' * 64}', flow: {pod}}}\n")) == 0
    assert "warning" not in capsys.readouterr().out


def test_the_plan_needs_no_home_that_may_be_entered(config, capsys, tmp_path, monkeypatch):
    """Another user's folder, in which even to look is refused."""
    looks = Path.is_file

    def refused(path):
        if path.is_relative_to(tmp_path / "mlruns"):
            raise PermissionError(13, "Permission denied", str(path))
        return looks(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert ended("check", config("gate: {metrics: [{metric: exact_match, min: 0.5}]}\n")) == 0
    assert "to do" in capsys.readouterr().out
