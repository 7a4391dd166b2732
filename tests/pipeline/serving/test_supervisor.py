"""The supervisor as a program of its own: when it gives up, and what it notes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from support.wire import FAKE, free_port, wait_for

from pipeline import processes
from pipeline.serving.digests import model_files
from pipeline.serving.supervisor import Spec, read_spec, read_state

ROOT = Path(__file__).parents[3]


DEAF_SOON = "s.HEALTH_EVERY_S = 0.1; s.HEALTH_FAILURES = 3; s.HEALTH_TIMEOUT_S = 0.2"


def supervise(
    folder,
    code,
    *,
    ready=True,
    keep=True,
    pauses="(0.05, 0.05)",
    patch="",
    url="http://127.0.0.1:9",
    startup_timeout=0.5,
):
    """Run the supervisor over `python -c code` to its end, and return what it noted last."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    me = processes.find(processes.os.getpid())
    spec = Spec(
        command=(sys.executable, "-c", code), environ={}, log=str(folder / "vllm.log"), url=url,
        model="m", files=model_files(model), startup_timeout=startup_timeout, shutdown_timeout=1, keep=keep,
        owner=(me.pid, me.started),
    )  # fmt: skip
    spec.write(folder)
    assert read_spec(folder) == spec
    if ready:
        (folder / "ready").touch()
    program = f"import pipeline.serving.supervisor as s; s.PAUSES_S = {pauses}; {patch}\n"
    program += f"s.Supervisor(s.Path({str(folder)!r})).run()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=30, check=True)
    return read_state(folder)


def starts(folder):
    """How often the server was started."""
    return (folder / "vllm.log").read_text().count("started")


def test_it_gives_up_after_a_number_of_deaths_in_a_row(tmp_path):
    """One start and a restart for each pause; the note says why it ended."""
    state = supervise(tmp_path, "print('started', flush=True); raise SystemExit(3)")
    assert (state.state, state.restarts, starts(tmp_path)) == ("failed", 2, 3)
    assert "status 3" in state.why
    assert "given up" in state.why


def test_a_server_that_was_never_ready_is_not_started_again(tmp_path):
    """Its first death is the caller's to tell."""
    state = supervise(tmp_path, "print('started', flush=True); raise SystemExit(1)", ready=False)
    assert (state.state, state.restarts, starts(tmp_path)) == ("failed", 0, 1)


def test_a_deaf_server_is_ended_and_started_again(tmp_path):
    """One that runs but whose /health is silent for long enough counts as dead."""
    code = "import time; print('started', flush=True); time.sleep(60)"
    began = time.monotonic()
    state = supervise(tmp_path, code, pauses="(0.05,)", patch=DEAF_SOON)
    assert time.monotonic() - began < 20
    assert (state.state, state.restarts) == ("failed", 1)
    assert "/health was silent" in state.why


def test_long_steady_running_forgives_earlier_deaths(tmp_path):
    """Deaths count in a row only: a server that counts as steady at once is started again and again."""
    code = (
        f"import pathlib; p = pathlib.Path({str(tmp_path)!r}) / 'count'; print('started', flush=True)\n"
        "p.write_text((p.read_text() if p.exists() else '') + 'x')\n"
        "(p.parent / 'ready').unlink() if len(p.read_text()) == 6 else None"
    )
    state = supervise(tmp_path, code, patch="s.STEADY_S = 0")
    assert starts(tmp_path) == 6
    assert state.restarts == 5


def test_what_the_server_leaves_behind_is_ended_with_it(tmp_path):
    """A worker that outlives its server holds memory; it goes with its process group."""
    code = (
        "import subprocess, sys; print('started', flush=True)\n"
        "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(c.pid))"
    )
    supervise(tmp_path, code, ready=False)
    wait_for(lambda: processes.find(int((tmp_path / "pid").read_text())) is None)


def test_the_note_is_json_that_others_read(tmp_path):
    """state.json holds the whole state, and a folder without one reads as starting."""
    state = supervise(tmp_path, "pass", ready=False)
    assert json.loads((tmp_path / "state.json").read_text()) == asdict(state)
    assert read_state(tmp_path / "elsewhere").state == "starting"


def test_a_state_that_cannot_be_noted_is_tried_again(tmp_path, capfd):
    """The server is started again meanwhile; it is said once that nothing is noted, and once that it is again."""
    code = f"""
import os, pathlib
here = pathlib.Path({str(tmp_path)!r})
print("started", flush=True)
start = (here / "vllm.log").read_text().count("started")
in_the_way = here / f".state.json.{{os.getppid()}}"
while start == 1 and not in_the_way.is_dir():
    try: in_the_way.mkdir()
    except FileExistsError: pass
if start == 3:
    in_the_way.rmdir()
    while '"restarts": 2' not in (here / "state.json").read_text(): pass
"""
    state = supervise(tmp_path, code)
    assert (state.state, state.restarts, starts(tmp_path)) == ("failed", 2, 3)
    told = [line for line in capfd.readouterr().err.splitlines() if "state.json" in line]
    assert [("can't be written" in line, "written again" in line) for line in told] == [(True, False), (False, True)]
    assert "Is a directory" in told[0]


# Dies at its first start; does something before it listens at its second.
DIES_ONCE = """
import json, os, pathlib, runpy, sys, threading, time
here = pathlib.Path({folder!r})
print("started", flush=True)
if (here / "vllm.log").read_text().count("started") == 1:
    raise SystemExit(3)
def state(): return json.loads((here / "state.json").read_text())["state"]
{then}
sys.argv[1:] = ["--model", "model", "--served-model-name", "m", "--port", {port!r}]
runpy.run_path({fake!r}, run_name="__main__")
"""


def supervise_a_restart(folder, then, pauses="(0.05,)", **options):
    """Run the supervisor over a server that is started twice."""
    port = free_port()
    code = DIES_ONCE.format(folder=str(folder), then=then, port=str(port), fake=str(FAKE))
    return supervise(folder, code, pauses=pauses, url=f"http://127.0.0.1:{port}", **options)


def test_what_changed_while_it_was_started_again_is_not_served(tmp_path):
    """The folder was as judged before the restart, but not any more when the server answered: it is killed, and it is said why."""
    then = "(here / 'model' / 'config.json').write_text('{}')"
    for pauses in ("(0.05,)", "(0.05, 0.05)"):  # the last restart, and one that another could follow
        folder = tmp_path / str(len(pauses))
        folder.mkdir()
        state = supervise_a_restart(folder, then, pauses)
        assert (state.state, state.restarts, starts(folder)) == ("failed", 1, 2)
        told = f"killed: {folder / 'model'} isn't what was judged (config.json is new); restore it, or build and approve anew"
        assert state.why.removesuffix("; started again 1 times in a row, now given up") == told


def test_a_server_that_was_started_again_runs_once_it_answers(tmp_path):
    """Until then it counts as restarting; then its folder is still what was judged."""
    then = """
(here / "seen").write_text(state())
def end():
    while state() != "running": time.sleep(0.01)
    (here / "seen").write_text((here / "seen").read_text() + " running")
    (here / "ready").unlink()
    os._exit(4)
threading.Thread(target=end, daemon=True).start()
"""
    state = supervise_a_restart(tmp_path, then)
    assert (tmp_path / "seen").read_text() == "restarting running"
    assert (state.state, state.restarts, state.why) == ("failed", 1, "ended with status 4")
    log = (tmp_path / "vllm.log").read_text()
    assert log.count("POST /v1/chat/completions") == 1


def test_a_server_that_is_started_again_may_take_as_long_as_a_start(tmp_path):
    """Loading a large model takes longer than a running server may be silent."""
    then = """
time.sleep(2)
def end():
    while state() != "running": time.sleep(0.01)
    (here / "ready").unlink()
    os._exit(4)
threading.Thread(target=end, daemon=True).start()
"""
    state = supervise_a_restart(tmp_path, then, patch=DEAF_SOON.replace("0.2", "20"), startup_timeout=25)
    assert (state.state, state.restarts, state.why) == ("failed", 1, "ended with status 4")
