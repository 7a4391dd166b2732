"""The store: complete artefacts or none, found again by key, one maker at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import file_digests, store
from pipeline.errors import Busy


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
    assert list(store.all_artifacts()) == []
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
