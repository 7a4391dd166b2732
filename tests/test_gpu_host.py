"""The script for a GPU host: where packages come from, what counts as done, and that a failed verdict stays one."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import gpu_host
import pytest
from gpu_host_memory import Memory
from gpu_host_steps import StepFailed, Steps

from pipeline import environments

# Answers like the tunegate command, by verb; what it was asked is kept in FOLDER/asked.
FAKE = """#!{python}
import json, pathlib, sys
verb, *rest = sys.argv[3:]
folder = pathlib.Path({folder!r})
with (folder / "asked").open("a") as asked:
    print(verb, *rest, file=asked)
states = json.loads((folder / "states.json").read_text())
print(states.get(verb, {{}}).get("said", ""))
code = states.get(verb, {{}}).get("code", 0)
sys.exit(0 if any("gate.metrics.0.min" in word for word in rest) else code)
"""
LIVE = json.dumps([{"state": "live", "proxy_ok": True, "url": "http://127.0.0.1:9"}])


@pytest.fixture
def steps(tmp_path) -> Steps:
    """No GPU, a minute."""
    return Steps(tmp_path / "out", Memory(), 60)


def chain(steps: Steps, folder: Path, **states: dict[str, object]) -> gpu_host.Chain:
    """A chain whose commands are answered by a fake that says and returns what `states` has for each verb."""
    python = folder / "python"
    python.write_text(FAKE.format(python=sys.executable, folder=str(folder)))
    python.chmod(0o755)
    usual = {
        "review": {"said": "use v1 waits for review"},
        "promote": {"said": "use v1 is live"},
        "status": {"said": LIVE},
        "rollback": {"code": gpu_host.NO_RELEASE_BEFORE},
    }
    (folder / "states.json").write_text(json.dumps({**usual, **states}))
    host = gpu_host.Host({"control": str(python)}, {"control": []}, {})
    use = gpu_host.Use("chain", "use", "use.yaml", folder, [], lambda _: ([{"role": "user", "content": "?"}], "!"))
    return gpu_host.Chain(steps, host, use, None)


def asked(folder: Path) -> list[str]:
    """The verbs that were asked for, in order."""
    return [line.split()[0] for line in (folder / "asked").read_text().splitlines()]


def outcomes(steps: Steps) -> dict[str, str]:
    return {row.step: row.outcome for row in steps.rows}


def test_each_environment_is_completed_by_its_sites_in_order(tmp_path):
    """The train environment's compressed-tensors is the quantizer's; what is found there is what tunegate finds."""
    for site in ("control", "serve", "quantize"):
        (tmp_path / "sites" / site).mkdir(parents=True)
    (tmp_path / "sites" / "control" / ".data" / "scripts").mkdir(parents=True)
    caddy = tmp_path / "sites" / "control" / ".data" / "scripts" / "caddy"
    caddy.touch(0o644)
    options = gpu_host.parsed(["--sites", str(tmp_path / "sites"), "--python", sys.executable, "--only", "tests"])
    host = gpu_host.host_of(options, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(environments.OF_HOST, host.further[environments.OF_HOST])
        patch.setenv("TUNEGATE_VENVS", host.further["TUNEGATE_VENVS"])
        found = {name: environments.find(name) for name in gpu_host.SITES}
    assert {environment.interpreter for environment in found.values()} == {Path(sys.executable)}
    names = {name: [site.name for site in environment.pythonpath] for name, environment in found.items()}
    assert names == {
        "train": ["quantize", "serve", "control"],
        "serve": ["serve"],
        "autoawq": ["serve"],
        "judges": ["control"],
    }
    assert host.environ("tests")["PYTHONPATH"].split(os.pathsep)[:2] == [
        str(gpu_host.ROOT),
        str(tmp_path / "sites" / "control"),
    ]
    assert os.access(caddy, os.X_OK)


def test_a_step_that_takes_too_long_is_stopped_and_its_log_is_shown(steps, capsys):
    """It gets Ctrl-C, its last words are printed and kept in the report, and the exit code says so."""
    code = "import time\nprint('last words', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('bye')"
    with pytest.raises(StepFailed):
        steps.run("chain", "run", [sys.executable, "-c", code], os.environ, 6)
    assert "last words\nbye" in capsys.readouterr().out
    assert steps.finish() == 1
    report = json.loads((steps.out / "table.json").read_text())
    assert report["rows"][0]["note"] == "stopped after 6 s"
    assert report["ends_of_logs"] == {"run": "last words\nbye"}


def test_nothing_is_started_without_time_but_what_stops_servers_is(tmp_path):
    """With its seconds used up a step is not run; stopping everything still is."""
    steps = Steps(tmp_path, Memory(), 0)
    with pytest.raises(StepFailed):
        steps.run("chain", "run", [sys.executable, "-c", ""], os.environ, 60)
    steps.always("chain", "stop all", [sys.executable, "-c", ""], os.environ, 60)
    assert outcomes(steps) == {"run": "not run", "stop all": "ok"}


def test_an_exit_code_that_was_not_expected_fails_a_step(steps):
    """And one that was expected does not."""
    command = [sys.executable, "-c", "raise SystemExit(4)"]
    assert steps.run("chain", "run", command, os.environ, 60, (0, 4))[0] == 4
    with pytest.raises(StepFailed):
        steps.run("chain", "again", command, os.environ, 60)
    assert outcomes(steps) == {"run": "ok", "again": "failed"}


def test_a_verdict_that_is_no_pass_ends_the_chain(steps, tmp_path):
    """Nothing is approved or promoted after it."""
    with pytest.raises(StepFailed):
        chain(steps, tmp_path, run={"code": gpu_host.GATE_FAILED}).through(None)
    assert asked(tmp_path) == ["check", "run"]
    assert steps.finish() == 1


def test_a_floor_asked_for_goes_on_and_hides_no_failed_verdict(steps, tmp_path, monkeypatch):
    """The second run has its own row, the first one's stays failed."""
    monkeypatch.setattr(gpu_host, "ask", lambda *_: "!")
    part = chain(steps, tmp_path, run={"code": gpu_host.GATE_FAILED})
    with pytest.raises(StepFailed, match="still serves"):  # the fake's status is live for ever
        part.through(0.5)
    assert asked(tmp_path)[:3] == ["check", "run", "run"]
    found = outcomes(steps)
    assert (found["run"], found["run with floor 0.5"], found["promote"], found["questions"]) == (
        "failed",
        "ok",
        "ok",
        "ok",
    )


def test_what_was_approved_before_is_not_approved_again(steps, tmp_path):
    """A command that goes on after a stop promotes what is there; a server that doesn't answer fails the part."""
    part = chain(steps, tmp_path, review={"said": "nothing waits"})
    with pytest.raises(StepFailed, match="did not answer question 1"):
        part.through(None)
    assert "approve" not in asked(tmp_path)
    assert outcomes(steps)["questions"] == "failed"


def test_a_promotion_that_does_not_say_so_is_none(steps, tmp_path):
    """An exit code alone is not believed."""
    with pytest.raises(StepFailed):
        chain(steps, tmp_path, promote={"said": "nothing was done"}).through(None)
    assert outcomes(steps)["promoted"] == "failed"


def test_memory_that_a_stage_found_taken_fails_the_part(steps, tmp_path):
    """The stages become rows with their peaks in front of the build's."""
    lines = "  base       running            /w/log.txt\n  base       done        1.0 s\n  serve      running            candidate\n"
    part = chain(steps, tmp_path, run={"said": lines})
    part._idle = 4
    now = time.monotonic()
    steps.memory.samples += [(now + thousandth / 1000, 9000) for thousandth in range(60_000)]
    part.build(None)
    assert list(outcomes(steps)) == ["  base", "  serve candidate", "memory is given back between stages", "run"]
    assert outcomes(steps)["memory is given back between stages"] == "failed"
    assert steps.rows[-1].peak == 9000


def test_a_part_that_lacks_its_files_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    """The option is named."""
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path))
    with pytest.raises(SystemExit):
        gpu_host.parsed(["--only", "chain", "--data", str(tmp_path)])
    assert "part chain needs --gguf: not given" in capsys.readouterr().err
