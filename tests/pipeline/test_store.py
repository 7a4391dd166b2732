"""The store: complete artefacts or none, found again by key, one maker at a time."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.stored import all_artifacts

from flows.commands import housekeeping
from pipeline import file_digests, store
from pipeline.errors import Busy, ResourceError, ReviewError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "mlruns"))


def make(key: str, text: str = "weights") -> None:
    """Put a small artefact into the store."""
    with store.making("merge", key) as partial:
        (partial / "payload").mkdir(exist_ok=True)
        (partial / "payload" / "model.safetensors").write_text(text)
        (partial / "checkpoints").mkdir(exist_ok=True)
        (partial / "extra").mkdir(exist_ok=True)
        store.finish("merge", key, partial, parents={"base": "a"}, made_by={"torch": "2"}, detail={"n": 1})


def test_a_finished_artefact_is_found_without_its_scratch() -> None:
    """Payload and extra stay, checkpoints go, the record says what it was made from."""
    make("k")
    found = store.find("merge", "k")
    assert found is not None
    assert (found.parents, found.made_by, found.detail) == ({"base": "a"}, {"torch": "2"}, {"n": 1})
    assert sorted(path.name for path in found.path.iterdir()) == ["artifact.json", "extra", "payload"]
    assert store.peek("merge", "k") == found.model_dump(mode="json")


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place or above it, or a disk that takes nothing; one that can be made is left unmade."""
    store.raise_for_unwritable_home()
    assert not store.home().exists()
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        monkeypatch.setenv("TUNEGATE_HOME", str(wrong))
        with pytest.raises(ResourceError, match="can't be written") as caught:
            store.raise_for_unwritable_home()
        (problem,) = caught.value.problems
        assert (problem.file, problem.key) == (str(wrong), "TUNEGATE_HOME")
        assert "export TUNEGATE_HOME=" in str(problem.remedy)


def test_the_digest_is_of_names_and_bytes() -> None:
    """The same bytes give the same digest under another key; a changed byte is noticed."""
    make("k")
    make("l")
    make("m", "other")
    one, same, other = (store.find("merge", key) for key in "klm")
    assert one
    assert same
    assert other
    assert one.digest == same.digest != other.digest
    assert file_digests.is_intact(one)
    (one.payload / "model.safetensors").write_text("tampered")
    assert not file_digests.is_intact(one)


def test_what_a_killed_run_left_is_found_again_and_never_seen_as_finished() -> None:
    """A partial folder keeps its checkpoints for the next run of the same key."""
    with store.making("finetune", "k") as partial:
        (partial / "checkpoints").mkdir()
    assert store.find("finetune", "k") is None
    assert list(all_artifacts()) == []
    with store.making("finetune", "k") as partial:
        assert (partial / "checkpoints").is_dir()


def test_a_lock_is_held_across_processes_and_freed_by_death() -> None:
    """Another process can't take a held lock; when its holder is killed it can."""
    code = "from pipeline import file_digests, store\nwith store.lock('gpu'):\n print('held', flush=True)\n input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Busy, match="gpu"), store.lock("gpu", wait=False):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with store.lock("gpu", wait=False):
        pass


def test_a_running_build_keeps_a_note_only_while_it_runs() -> None:
    """The note names this process and goes when the build ends, also by an error."""
    notes = store.home() / "running"

    def fail() -> None:
        with store.running("demo"):
            assert len(list(notes.glob("*.json"))) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(notes.glob("*.json")) == []


BUILD = """
import os, sys, time, types
os.uname = lambda: types.SimpleNamespace(nodename=sys.argv[1])
from pipeline import store
with store.running("demo"):
    print("runs", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def build_on(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Builds that run on a machine of this name, in a process of their own."""
    with ExitStack() as started:

        def start(host: str) -> subprocess.Popen[str]:
            child = started.enter_context(
                subprocess.Popen([sys.executable, "-c", BUILD, host], stdout=subprocess.PIPE, text=True)
            )
            started.callback(child.kill)
            assert child.stdout
            assert child.stdout.readline() == "runs\n"
            return child

        yield start


def test_a_build_on_another_machine_of_the_same_store_is_seen(build_on: Callable[[str], subprocess.Popen[str]]) -> None:
    """Until it ends or is killed, by whatever process ids its machine and this one have; a note that was left says nothing."""
    host = socket.gethostname()
    there, here = build_on("another-pod"), build_on(host)
    assert {(build.host, build.pid, build.is_here) for build in store.running_builds()} == {
        ("another-pod", there.pid, False),
        (host, here.pid, True),
    }
    there.kill()
    there.wait()
    assert [build.host for build in store.running_builds()] == [host]
    assert len(list((store.home() / "running").glob("*.json"))) == 2


def test_nothing_is_collected_or_stopped_under_a_build_elsewhere(
    build_on: Callable[[str], subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process id is another process here, or none."""
    there = build_on("another-pod")
    with pytest.raises(ReviewError, match=f"a build of demo runs as process {there.pid} on another-pod"):
        housekeeping.gc(argparse.Namespace(keep_days=0.0, dry_run=True))
    housekeeping.cancel(argparse.Namespace(name=None))
    assert "cancel it there" in capsys.readouterr().out
    assert there.poll() is None


def test_a_build_that_does_not_run_is_answered_with_those_that_do(
    build_on: Callable[[str], subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is stopped; without a running one that is all there is to say."""
    housekeeping.cancel(argparse.Namespace(name="nosuch"))
    assert capsys.readouterr().out == "no build runs\n"
    here = build_on(socket.gethostname())
    housekeeping.cancel(argparse.Namespace(name="nosuch"))
    assert capsys.readouterr().out == (
        f"no build of nosuch runs\na build of demo runs as process {here.pid}: tunegate cancel demo\n"
    )
    assert here.poll() is None
