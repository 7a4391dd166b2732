"""One process of a training: how it ends, by its exit status and its events; that it trains is test_distributed's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.finetune import launch

ROOT = Path(__file__).parents[3]
# Torch's part is replaced: joining, leaving, and what its errors say of partners.
PROCESS = """
import sys
from pipeline.errors import ConfigError, ResourceError
from pipeline.finetune import distributed, rank
from pipeline.finetune.distributed import Group
distributed.join = lambda: Group(int(sys.argv[2]), 2)
distributed.leave = lambda: print("left", file=sys.stderr)
distributed.is_loss_of_a_partner = lambda error: "peer" in str(error)
def share(request, group):
    {body}
rank.main(share)
"""


def run(folder: Path, number: int, body: str, launcher: int | None = None) -> tuple[int, list[dict], str]:
    """Exit status, events and standard error of a process with this share of the work."""
    file = folder / "request.json"
    file.write_text(json.dumps({"config": {}, "inputs": {}, "folder": str(folder)}))
    process = subprocess.run(
        [sys.executable, "-c", PROCESS.replace("{body}", body), str(file), str(number)], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, launch.LAUNCHER: str(launcher or os.getpid())}, timeout=60,
    )  # fmt: skip
    return process.returncode, [json.loads(line) for line in process.stdout.splitlines()], process.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_the_first_process_alone_reports_the_result(tmp_path: Path, number: int) -> None:
    """Both leave the others in order and end well."""
    status, events, log = run(tmp_path, number, "return {'steps': 3, 'rank': group.rank}")
    assert status == 0
    assert "left" in log
    results = [event for event in events if event["event"] == "result"]
    assert [event["detail"] for event in results] == [{"steps": 3, "rank": 0}] * (number == 0)


def test_an_error_is_told_with_its_own_status(tmp_path: Path) -> None:
    """From any process, as a stage program tells it."""
    status, events, _ = run(tmp_path, 1, "raise ConfigError('wrong', key='k', remedy='mend it')")
    (error,) = [event for event in events if event["event"] == "error"]
    assert (error["type"], error["problems"][0]["remedy"]) == ("ConfigError", "mend it")
    assert status not in (0, launch.LOST)


def test_a_lost_partner_is_no_error_of_this_process(tmp_path: Path) -> None:
    """It ends with the status that says so, and leaves the telling to the partner."""
    status, events, log = run(tmp_path, 0, "raise RuntimeError('connection closed by peer')")
    assert (status, events) == (launch.LOST, [])
    assert "connection closed by peer" in log


def test_any_other_failure_is_this_processs_own(tmp_path: Path) -> None:
    """A defect ends with a traceback and another status."""
    status, _, log = run(tmp_path, 0, "raise RuntimeError('a defect')")
    assert status not in (0, launch.LOST)
    assert "RuntimeError: a defect" in log


def test_a_process_whose_launcher_is_gone_ends_at_once(tmp_path: Path) -> None:
    """It would wait for its partners for ever."""
    assert run(tmp_path, 0, "raise ValueError", launcher=1)[:2] == (launch.LOST, [])
