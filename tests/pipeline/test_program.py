"""The wire between flow and stage, over real child processes."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.wire import wait_for

from pipeline import program
from pipeline.errors import DataError, ResourceError, StageFailed
from pipeline.program import Event, Request

ROOT = Path(__file__).parents[2]


def run(folder: Path, body: str, events: list[Event] | None = None) -> dict[str, object]:
    """Run a stage program with this body."""
    file = folder / "stage.py"
    head = "import os, sys, time\nfrom pipeline import program, errors\ndef run(request):\n"
    file.write_text(head + textwrap.indent(textwrap.dedent(body), "    ") + "\nprogram.main(run)\n")
    request = Request({"a": 1}, {"base": {"digest": "d"}}, folder / "work")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return program.run([sys.executable, str(file)], environ, request, (events if events is not None else []).append)


def test_a_stage_gets_its_request_and_returns_its_detail(tmp_path: Path) -> None:
    """Config and inputs go in, the returned dict comes out, the payload lies in the folder."""
    body = "(request.payload / 'x').write_text('y')\nreturn {'config': request.config, 'base': request.inputs['base']['digest']}"
    assert run(tmp_path, body) == {"config": {"a": 1}, "base": "d"}
    assert (tmp_path / "work" / "payload" / "x").read_text() == "y"


def test_events_arrive_and_what_libraries_print_goes_to_the_log(tmp_path: Path) -> None:
    """Progress, metrics and messages are events; print, os.write and standard error are the log's."""
    events: list[Event] = []
    body = """
        print("from a library")
        os.write(1, b"from C code\\n")
        program.progress(1, 2, "step", loss=0.5)
        program.metric("loss", 0.5, 1)
        program.message("hello")
        return {}
    """
    run(tmp_path, body, events)
    assert [event["event"] for event in events] == ["progress", "metric", "message"]
    log = (tmp_path / "work" / "log.txt").read_text()
    assert "from a library" in log
    assert "from C code" in log


def test_a_stages_error_comes_back_as_itself_with_all_its_problems(tmp_path: Path) -> None:
    """A DataError raised in the child is a DataError here, problem by problem."""
    body = "raise errors.DataError([errors.Problem('a', file='f', line=1), errors.Problem('b')])"
    with pytest.raises(DataError) as caught:
        run(tmp_path, body)
    assert [problem.what for problem in caught.value.problems] == ["a", "b"]
    assert caught.value.problems[0].line == 1


def test_a_crash_names_the_log_and_its_last_words(tmp_path: Path) -> None:
    """A traceback stays in the log; the error says where and quotes its end."""
    with pytest.raises(StageFailed, match="ValueError: boom") as caught:
        run(tmp_path, "raise ValueError('boom')")
    assert caught.value.problems[0].file == str(tmp_path / "work" / "log.txt")


def test_a_killed_stage_is_told_as_killed(tmp_path: Path) -> None:
    """Signal 9 most often means memory, and the error says what to lower."""
    with pytest.raises(StageFailed, match="signal 9") as caught:
        run(tmp_path, f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert "micro_batch_size" in str(caught.value)


FULL = "sys.stderr.write('58%Error out of memory at line 74 in file /src/csrc/ops.cu\\n'); sys.stderr.flush()\n"


@pytest.mark.parametrize("end", ["os._exit(1)", "raise errors.StageFailed('process 2 of 2 ended with status 1')"])
def test_a_gpu_too_full_for_bitsandbytes_is_told_as_memory(tmp_path: Path, end: str) -> None:
    """It prints a line and ends its process; an earlier run's line says nothing of this one, nor does it of a known mistake."""
    with pytest.raises(ResourceError, match="Error out of memory at line 74") as caught:
        run(tmp_path, FULL + end)
    assert caught.value.problems[0].file == str(tmp_path / "work" / "log.txt")
    assert "nvidia-smi" in str(caught.value)
    with pytest.raises(StageFailed, match="status 1"):
        run(tmp_path, end)
    with pytest.raises(DataError, match="a bad row"):
        run(tmp_path, f"{FULL}raise errors.DataError('a bad row')")


def test_a_stale_result_is_never_taken_for_a_new_one(tmp_path: Path) -> None:
    """A program that dies after an earlier success fails."""
    run(tmp_path, "return {}")
    with pytest.raises(StageFailed):
        run(tmp_path, "os._exit(0)")


def test_what_a_killed_run_was_writing_does_not_stay_in_the_payload(tmp_path: Path) -> None:
    """Killed between writing beside and renaming; what it had finished stays."""
    payload = tmp_path / "work" / "payload"
    payload.mkdir(parents=True)
    for name in (".report.json.4711", "report.json", ".gitignore"):
        (payload / name).write_text("{}")
    run(tmp_path, "return {}")
    assert sorted(path.name for path in payload.iterdir()) == [".gitignore", "report.json"]


def test_an_interrupted_flow_leaves_no_child(tmp_path: Path) -> None:
    """Ctrl-C in the flow ends the stage and what it started."""
    body = "open(request.folder / 'pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    file = tmp_path / "work" / "pid"

    def interrupt_when_it_started() -> None:
        wait_for(lambda: file.is_file() and file.read_text())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupt_when_it_started)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, body)
    pid = int(file.read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
