"""What `tunegate review` shows of a version, and the commands that it names."""

from __future__ import annotations

import shlex

import pytest
from support.registered import a_build, keep, new_home, opened

from flows import cli
from flows.commands.review import review
from pipeline.errors import RegistryError
from pipeline.registry import runs, versions

NAME = "tickets"


def built(build):
    """Judged, recorded and registered as a build does it, in the run of its unit."""
    run_id = runs.run_of_unit(opened(build), build.name, build.key, build.config, build.unit.digest)
    runs.record_build(run_id, build)
    version = versions.register(run_id, build)
    keep(build, {"outcome": "pass", "run_id": run_id, "version": version})
    return version


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two versions of one build's key, whose units and prompts differ: the store holds the second alone."""
    new_home(tmp_path, monkeypatch)
    first, second = (a_build(tmp_path, number) for number in (1, 2))
    first, second = (
        build.model_copy(update={"key": "a" * 32, "verdict": build.verdict.model_copy(update={"checks": checks})})
        for build, checks in ((first, first.verdict.checks), (second, second.verdict.checks[:1]))
    )
    assert [built(build) for build in (first, second)] == ["1", "2"]
    return first, second


def said(capsys, *words):
    """What the command prints."""
    review(cli.parser().parse_args(["review", NAME, *words]))
    return capsys.readouterr().out


def test_each_version_of_a_build_shows_its_own(two, capsys):
    """Scores, gate table and page are those of the unit that was registered, whatever was built last under its key."""
    first, second = two
    last = first.verdict.checks[-1].name
    shown = {number: said(capsys, "--version", number) for number in ("1", "2")}
    assert last in shown["1"].split("gate: pass")[1]
    assert last not in shown["2"].split("gate: pass")[1]
    for number, build in (("1", first), ("2", second)):
        run_id = versions.version(NAME, number).run_id
        assert versions.page(NAME, number, run_id) in shown[number]
        assert runs.read_text(run_id, "unit.json") == build.unit.model_dump_json(indent=1)


def test_a_record_of_another_unit_is_not_shown(two, capsys):
    """A run that was written over says so instead of showing another version's numbers."""
    first, second = two
    runs.record_build(versions.version(NAME, "1").run_id, second)
    with pytest.raises(RegistryError, match="is about unit") as refused:
        said(capsys, "--version", "1")
    assert refused.value.problems[0].allowed == f"unit {first.unit.digest[:12]}, which was registered"


def test_the_commands_that_come_next_can_be_given(two, capsys):
    """Each is one that the command line takes; a chat is offered with the version that it would start alone."""
    for number in ("1", "2"):
        lines = said(capsys, "--version", number).split("next: any of")[1].splitlines()
        commands = [shlex.split(line)[1:] for line in lines if line.strip()]
        for command in commands:
            cli.parser().parse_args(command)
        assert (["chat", NAME, "--candidate"] in commands) == (number == "2")
