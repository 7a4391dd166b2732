"""Messages to a person who waits for a starting server, from its log."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.serving import diagnosis
from pipeline.serving import progress as serving_progress

HEAD = f"{diagnosis.START} 0.32.0\n"
ENGINE, WEIGHTS = "INFO Initializing a V1 LLM engine (v0.32.0)\n", "INFO Starting to load model /m...\n"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A start of some server whose log the test writes, looked at whenever the test says."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(serving_progress, "TELL_EVERY_S", 0.0)
    said = []
    server = SimpleNamespace(log=tmp_path / "vllm.log", runtime="process", url="http://127.0.0.1:1")
    unit = SimpleNamespace(runtime_digest="0", flags=(), env={}, device="cpu", vllm_version="0.32.0")
    server.log.write_text(HEAD)
    progress = serving_progress.Progress(server, unit, lambda event: said.append(event.get("text", "")))
    return SimpleNamespace(progress=progress, log=server.log, said=said)


def test_each_phase_is_told_once_and_none_is_left_out(start):
    """Also a phase that began and ended between two looks."""
    start.log.write_text(HEAD + ENGINE)
    start.progress.tell()
    start.log.write_text(HEAD + ENGINE + WEIGHTS + "INFO Loading weights took 0.10 seconds\n")
    start.progress.tell()
    start.progress.tell()
    assert [text for text in start.said if text][1:] == [
        "vLLM starts its engine", "vLLM loads the weights", "vLLM compiles and warms up",
    ]  # fmt: skip


def test_what_the_last_look_missed_is_told_when_it_answers(start):
    """A server that was ready before the first look still tells its phases."""
    start.log.write_text(HEAD + ENGINE + WEIGHTS)
    start.progress.done()
    assert start.said[1:3] == ["vLLM starts its engine", "vLLM loads the weights"]
    assert start.said[-1].startswith("vLLM answers after")


def test_phases_of_an_earlier_start_are_not_told_again(start):
    """The log goes on over restarts."""
    start.log.write_text(HEAD + ENGINE + WEIGHTS + HEAD)
    start.progress.tell()
    assert [text for text in start.said if text][1:] == []
