"""The loss curve of a training run as a picture.

Runs in the train environment (matplotlib).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.finetune.objectives import Objective


def draw(file: Path, history: Sequence[dict[str, float]], best_step: int | None, objective: Objective) -> None:
    """Training loss by step, its running mean, and validation loss with the best step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    train, validation = (
        [(entry["step"], entry[metric]) for entry in history if metric in entry] for metric in objective.metrics
    )
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9bb8d3", linewidth=1, label="training")
        axes.plot(steps, _smooth(losses), color="#1f4e79", linewidth=1.6, label="training, running mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#c55a11", marker="o", markersize=4, label="validation")
    if best_step is not None:
        axes.axvline(best_step, color="#c55a11", linestyle=":", linewidth=1, label=f"kept: step {best_step}")
    axes.set(xlabel="optimizer step", ylabel=objective.unit, ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _smooth(losses: Sequence[float], weight: float = 0.7) -> list[float]:
    """Exponential running mean, corrected for its start."""
    smooth, mean = [], 0.0
    for count, loss in enumerate(losses, start=1):
        mean = weight * mean + (1 - weight) * loss
        smooth.append(mean / (1 - weight**count))
    return smooth
