"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.finetune import plots
from pipeline.finetune.objectives import OBJECTIVES, SFT, Objective

HISTORY = [
    {"step": 1, "train_loss": 4.0}, {"step": 2, "train_loss": 2.0}, {"step": 2, "eval_loss": 3.0},
    {"step": 3, "train_loss": 1.0}, {"step": 3, "eval_loss": 2.5},
]  # fmt: skip


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch, best: int | None, objective: Objective, history: list) -> Any:
    """The axes of a picture, which was written too."""
    from matplotlib import pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    plots.draw(folder / "new" / "loss.png", history, best, objective)
    assert (folder / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.undo()
    plt.close(figures[0])
    return figures[0].axes[0]


def test_both_losses_and_the_best_step_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each at its own steps, in the objective's unit."""
    axes = drawn(tmp_path, monkeypatch, 3, OBJECTIVES[SFT], HISTORY)
    lines = {line.get_label(): [list(data) for data in line.get_data()] for line in axes.get_lines()}
    assert lines["training"] == [[1, 2, 3], [4.0, 2.0, 1.0]]
    assert lines["validation"] == [[2, 3], [3.0, 2.5]]
    assert lines["kept: step 3"][0] == [3, 3]
    assert axes.get_ylabel() == "loss a token (nats)"


def test_an_objectives_own_metrics_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its names and in its unit; without validation there is no such line."""
    other = Objective(rows="", loss="", unit="loss a pair", train_metric="margin", eval_metric="eval_margin")
    axes = drawn(tmp_path, monkeypatch, None, other, [{"step": 1, "margin": 0.5, "train_loss": 9.0}])
    assert [line.get_label() for line in axes.get_lines()] == ["training", "training, running mean"]
    assert list(axes.get_lines()[0].get_ydata()) == [0.5]
    assert axes.get_ylabel() == "loss a pair"


def test_the_running_mean_is_right_from_the_first_step() -> None:
    """Corrected for its start: the mean of one loss is that loss, and equal losses stay what they are."""
    assert plots._smooth([5.0]) == pytest.approx([5.0])
    assert plots._smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert plots._smooth([0.0, 1.0])[1] == pytest.approx(0.3 / (1 - 0.49))
