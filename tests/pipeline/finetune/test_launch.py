"""Starting and watching the processes of a training; test_distributed.py tests that they train."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ConfigError, ResourceError, StageFailed
from pipeline.finetune import launch as launcher
from pipeline.hardware import Device
from pipeline.plan import resolve
from pipeline.program import Request

TWO_GPUS = Device("cuda", "a GPU", "a GPU", 80 * 2**30, 16, 2, bf16=True)
CPU = Device("cpu", "a CPU", "a CPU", 8 * 2**30, 2, 0, bf16=True)
PROGRAM = """
import json, os, sys, time
from pathlib import Path
request, rank = json.loads(Path(sys.argv[1]).read_text()), int(os.environ["RANK"])
def say(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)
"""


def launch(folder: Path, code: str, processes: int = 2) -> dict:
    """Run this code in so many processes."""
    file = folder / "rank.py"
    file.write_text(PROGRAM + code, encoding="utf-8")
    return launcher.launch(Request({}, {}, folder), processes, (str(file),))


def test_more_processes_than_gpus_are_refused() -> None:
    """The error names the key, what is allowed, and that fewer processes train the same rows; a CPU has no such bound."""
    launcher.check(2, TWO_GPUS)
    launcher.check(4, CPU)
    with pytest.raises(ConfigError) as raised:
        launcher.check(3, TWO_GPUS)
    (problem,) = raised.value.problems
    assert (problem.key, problem.allowed) == ("finetune.num_processes", "1 to 2")
    assert "num_processes: 2" in str(problem.remedy)


def test_a_check_warns_of_gpus_that_are_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`tunegate check` says it before anything runs."""
    monkeypatch.setattr(resolve.hardware, "device", lambda: TWO_GPUS)
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    file = tmp_path / "use.yaml"
    file.write_text(
        "datasets: [{path: t.jsonl}]\ngate: {metrics: [{metric: exact_match, min: 0.5}]}\nnum_processes: 8\n"
    )
    (warning,) = resolve.warnings(resolve.resolve(file), file)
    assert "8 processes need 8 GPUs, and 2 can be seen here" in str(warning)
    assert warning.file == str(file)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"fsdp_version": 2}, "num_processes is 1"),
        ({"fsdp_version": 1, "num_processes": 2}, "Input should be 2"),
        ({"num_processes": 0}, "greater than 0"),
        ({"num_processes": 9, "micro_batch_size": 4, "gradient_accumulation_steps": 2, "sample_packing": False},
         "is 8 for all processes together"),
    ],
)  # fmt: skip
def test_settings_that_cannot_go_together_are_refused(settings: dict, what: str) -> None:
    """A base split over one process, a version that isn't one, processes that would never have a row."""
    with pytest.raises(ValidationError, match=what):
        FinetuneConfig(**settings)


def test_processes_get_torchruns_variables_and_this_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each knows its number and theirs; NCCL's settings pass through, and loopback is the default."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    found = launch(tmp_path, "say('result', detail=dict(os.environ))\n")
    wanted = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NCCL_NVLS_ENABLE": "0",
              "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    assert launch(tmp_path, "say('result', detail=dict(os.environ))\n")["NCCL_SOCKET_IFNAME"] == "eth0"


def test_an_error_that_was_reported_is_the_one_told(tmp_path: Path) -> None:
    """Not that of the process which lost its partner by it; and the one that would wait for ever is ended."""
    began = time.monotonic()
    code = """
error = {"type": "ResourceError", "problems": [{"what": "no memory", "key": "finetune.micro_batch_size"}]}
if rank == 0: time.sleep(600)
told = Path(request["folder"], "told")
while rank == 1 and not told.exists(): time.sleep(0.02)
if rank == 1: sys.exit(75)
say("error", **error); told.touch(); sys.exit(3)
"""
    with pytest.raises(ResourceError, match="no memory"):
        launch(tmp_path, code, 3)
    assert time.monotonic() - began < 15


LOSES_ITS_PARTNER = """
failed = Path(request["folder"], "failed")
if rank: failed.touch(); sys.exit(1)
while not failed.exists(): time.sleep(0.02)
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import signal\nif rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)", r"process 2 of 2 was killed \(signal 9\)"),
        (LOSES_ITS_PARTNER, "process 2 of 2 ended with status 1"),
        ("", "process 1 of 2 ended with status 0 and no result"),
    ],
)  # fmt: skip
def test_the_process_that_failed_first_is_named(tmp_path: Path, code: str, what: str) -> None:
    """A death by signal before an exit, an exit before the loss of a partner; and none may end without a result."""
    with pytest.raises(StageFailed, match=what):
        launch(tmp_path, code)


def test_a_partner_that_ignores_the_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that doesn't end politely is killed after END_S seconds."""
    monkeypatch.setattr(launcher, "END_S", 1.0)
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nPath(request['folder'], str(rank)).write_text(str(os.getpid()))\n"
    code += "while not Path(request['folder'], '0').exists(): time.sleep(0.05)\nif rank: sys.exit(1)\ntime.sleep(600)"
    with pytest.raises(StageFailed, match="process 2 of 2"):
        launch(tmp_path, code)
    assert not Path("/proc", (tmp_path / "0").read_text()).exists()


def test_a_result_is_heard_however_slow_the_flow_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that ended well have said it; and what one prints beside its events is no event."""
    monkeypatch.setattr(launcher, "END_S", 0.1)
    monkeypatch.setattr(launcher.program, "emit", lambda *_, **__: time.sleep(0.05))
    code = """
print(1, flush=True)
for step in range(30):
    say("metric", name="loss", value=1.0, step=step)
if rank == 0:
    say("result", detail={"steps": 30})
"""
    assert launch(tmp_path, code) == {"steps": 30}
