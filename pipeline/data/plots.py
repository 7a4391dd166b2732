"""Pictures of the data: how long rows are, and how often each answer occurs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_BARS = 40


def save(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """Write token_lengths.png and, where answers are labels, answers.png; return the names written."""
    import matplotlib as mpl

    mpl.use("Agg")
    names = ["token_lengths.png"]
    _lengths(summary["lengths"], folder / names[0])
    if summary["labels"]:
        names.append("answers.png")
        _answers(summary["labels"], folder / names[1])
    return names


def _lengths(lengths: Mapping[str, list[list[int]]], file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    longest = max((pairs[-1][0] for pairs in lengths.values() if pairs), default=1)
    bins = min(60, longest)
    for split, pairs in lengths.items():
        if pairs:
            tokens, rows = zip(*pairs, strict=True)
            share = [count / sum(rows) for count in rows]
            axes.hist(
                tokens,
                bins=bins,
                range=(0, longest + 1),
                weights=share,
                histtype="step",
                label=split,
                linewidth=1.5,
            )
    axes.set(xlabel="tokens of a row, with the chat template", ylabel="share of the set's rows")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _answers(labels: Mapping[str, Mapping[str, Mapping[str, int]]], file: Path) -> None:
    """A panel a key, its most frequent values first; each bar is the share of the set's rows."""
    from matplotlib import pyplot as plt

    bars = {key: _most_frequent(values) for key, values in labels.items()}
    heights = [max(2.0, 0.22 * len(values)) for values in bars.values()]
    figure, panels = plt.subplots(
        len(bars),
        1,
        figsize=(8, sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, (key, values) in zip(panels[:, 0], bars.items(), strict=True):
        for offset, split in ((-0.2, "train"), (0.2, "holdout")):
            total = sum(splits.get(split, 0) for splits in labels[key].values()) or 1
            widths = [labels[key][value].get(split, 0) / total for value in values]
            axes.barh([place + offset for place in range(len(values))], widths, height=0.4, label=split)
        axes.set_yticks(range(len(values)), [value[:40] for value in values], fontsize=7)
        axes.invert_yaxis()
        axes.set(title=key, xlabel="share of the set's rows")
    panels[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _most_frequent(values: Mapping[str, Mapping[str, int]]) -> list[str]:
    return sorted(values, key=lambda value: (-sum(values[value].values()), value))[:MOST_BARS]
