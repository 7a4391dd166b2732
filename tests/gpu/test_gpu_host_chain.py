"""What counts as done on the way from a config to answers, and that a failed verdict stays one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from gpu import gpu_host_chain, gpu_host_sites
from gpu.gpu_host_memory import Memory
from gpu.gpu_host_steps import StepFailed, Steps, outcomes

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


def chain(steps: Steps, folder: Path, **states: dict[str, object]) -> gpu_host_chain.Chain:
    """A chain whose commands are answered by a fake that says and returns what `states` has for each verb."""
    python = folder / "python"
    python.write_text(FAKE.format(python=sys.executable, folder=str(folder)))
    python.chmod(0o755)
    usual = {
        "review": {"said": "use v1 waits for review"},
        "promote": {"said": "use v1 is live"},
        "status": {"said": LIVE},
        "rollback": {"code": gpu_host_chain.NO_RELEASE_BEFORE},
    }
    (folder / "states.json").write_text(json.dumps({**usual, **states}))
    host = gpu_host_sites.Host({"control": str(python)}, {"control": []}, {})
    use = gpu_host_chain.Use(
        "chain", "use", "use.yaml", folder, [], lambda _: ([{"role": "user", "content": "?"}], "!"), 2
    )
    return gpu_host_chain.Chain(steps, host, use, None)


def asked(folder: Path) -> list[str]:
    """The verbs that were asked for, in order."""
    return [line.split()[0] for line in (folder / "asked").read_text().splitlines()]


def test_a_verdict_that_is_no_pass_ends_the_chain(steps, tmp_path):
    """Nothing is approved or promoted after it."""
    with pytest.raises(StepFailed):
        chain(steps, tmp_path, run={"code": gpu_host_chain.GATE_FAILED}).through(None)
    assert asked(tmp_path) == ["check", "run"]
    assert steps.finish() == 1


def test_a_floor_asked_for_goes_on_and_hides_no_failed_verdict(steps, tmp_path, monkeypatch):
    """The second run has its own row, the first one's stays failed."""
    monkeypatch.setattr(gpu_host_chain, "ask", lambda *_: "!")
    part = chain(steps, tmp_path, run={"code": gpu_host_chain.GATE_FAILED})
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
    part = chain(
        steps, tmp_path, review={"said": "use v1 approved by you\nnothing waits for review; next: tunegate status use"}
    )
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
