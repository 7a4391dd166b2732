"""Which stage took how much memory: the lines that a build prints, and samples of nvidia-smi."""

from __future__ import annotations

import time

import pytest
from gpu.gpu_host_memory import EVERY_S, Memory, Stages

from flows.progress import stage_line


def lines(*events: tuple[str, str, str, float]) -> Stages:
    """What is known after these events (stage, state, log or role, seconds since the start)."""
    stages = Stages()
    for stage, state, log, at in events:
        event = {
            "event": "stage",
            "stage": stage,
            "state": state,
            "log": log,
            "seconds": 1.0 if state == "done" else 0.0,
        }
        assert stages(stage_line(event) + "\n", at)
    return stages


def test_stages_are_read_from_the_lines_that_a_build_prints():
    """One after the other, a server's start apart from its measurements, each with its role."""
    stages = lines(
        ("base", "cached", "", 1), ("finetune", "running", "/work/log.txt", 2), ("finetune", "done", "", 7),
        ("serve", "running", "candidate", 8), ("evaluate", "running", "candidate", 20), ("evaluate", "candidate", "", 30),
        ("loadtest", "running", "candidate", 30), ("loadtest", "candidate", "", 40), ("gate", "inconclusive", "", 41),
        ("ledger", "running", "/work/log.txt", 50),
    )  # fmt: skip
    stages.close(60, failed=True)
    assert [(stage.name, stage.began, stage.ended, stage.state) for stage in stages.found] == [
        ("base", 1, 1, "cached"), ("finetune", 2, 7, "done"), ("serve candidate", 8, 20, "done"),
        ("evaluate candidate", 20, 30, "done"), ("loadtest candidate", 30, 40, "done"), ("ledger", 50, 60, "failed"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line", ["  finetune   3/40 steps  loss 1.2", "  quantize   calibrates", "  base       about 1 GiB", "", "gate"]
)
def test_other_lines_are_no_stages(line):
    """Messages and progress stand under a stage's name too."""
    assert not Stages()(line, 0.0)


def test_what_a_stage_found_taken_is_the_least_between_its_predecessor_and_its_start():
    """The predecessor's memory still counts at its end; a measurement on a running server finds the server's."""
    stages = lines(
        ("base", "running", "/l", 0),
        ("base", "done", "", 10),
        ("serve", "running", "merged", 11),
        ("evaluate", "running", "merged", 20),
    )
    memory = Memory()
    memory.samples = [(9.0, 700), (10.2, 650), (11.5, 4), (13.0, 300), (15.0, 5000)]
    assert [stages.left_before(stage, memory) for stage in stages.found] == [None, 4, None]
    assert memory.peak(11, 20) == 5000
    assert memory.peak(30, 40) is None


def test_samples_come_from_nvidia_smi_twice_a_second(tmp_path, monkeypatch):
    """Here a tool of that name that says 1234 for the GPU it was asked for, and an error in between."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ntest "$2" = 3 && echo 1234 && exit\necho "no such device"; exit 6\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    began = time.monotonic()
    with Memory() as memory:
        while len(memory.samples) < 2 and time.monotonic() < began + 20:
            time.sleep(0.05)
    assert memory.peak(began, time.monotonic()) == memory.least(began, time.monotonic()) == 1234
    assert len(memory.samples) <= 1 + (time.monotonic() - began) / EVERY_S
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with Memory() as silent:
        time.sleep(0.3)
    assert silent.samples == []
