"""What the script for a GPU host refuses before it runs anything."""

from __future__ import annotations

import pytest
from gpu import gpu_host
from gpu.gpu_host_memory import Memory
from gpu.gpu_host_steps import StepFailed, Steps, outcomes


@pytest.fixture
def steps(tmp_path) -> Steps:
    """No GPU, a minute."""
    return Steps(tmp_path / "out", Memory(), 60)


def test_a_part_that_lacks_its_files_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    """The option is named."""
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path))
    with pytest.raises(SystemExit):
        gpu_host.parsed(["--only", "chain", "--data", str(tmp_path)])
    assert "part chain needs --gguf: not given" in capsys.readouterr().err


def test_parts_that_nobody_named_are_left_out_without_their_files(tmp_path, capsys, monkeypatch):
    """`make test-gpu` runs what it can and says what it can't."""
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path))
    (tmp_path / "model.gguf").touch()
    assert gpu_host.parsed(["--gguf", str(tmp_path / "model.gguf")]).only == ["tests", "llama"]
    assert "left out: part chain needs --data: not given" in capsys.readouterr().out


def test_a_model_that_has_no_room_is_not_begun(steps, tmp_path):
    """A Llama 3 8B's shape with SmolLM2's vocabulary has 7.4 B weights; on a small disk the part ends with the way out."""
    assert gpu_host.parameters(32, 4096) == pytest.approx(7.4e9, rel=0.01)
    options = gpu_host.parsed(["--only", "tests", "--layers", "1000000"])
    with pytest.raises(StepFailed, match="--models or --home elsewhere"):
        gpu_host.need_disk(steps, options, tmp_path)
    gpu_host.need_disk(steps, gpu_host.parsed(["--only", "tests", "--layers", "1", "--hidden", "128"]), tmp_path)
    assert outcomes(steps) == {"room on disk": "failed"}
