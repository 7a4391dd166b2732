"""A build's pictures: scores with their intervals, latency and throughput over concurrency."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Build, LoadLevel
from pipeline.report_content import evaluated, metric_names, system_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"base": "#98a2b3", "merged": "#6691d6", "candidate": "#0f766e", "incumbent": "#c2410c"}
FLOOR = "#b42318"
WIDTH = 9.6
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#d0d5dd",
    "axes.labelcolor": "#475467",
    "text.color": "#344054",
    "xtick.color": "#667085",
    "ytick.color": "#344054",
    "svg.fonttype": "none",
    "svg.hashsalt": "tunegate",
}


def save_plots(build: Build, folder: Path) -> list[Path]:
    """Write scores.png and load.png, each where there is something to show; returns what was written."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for name, figure in figures(build).items():
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=160, metadata={"Software": None})
            written.append(path)
    return written


def svgs(build: Build) -> dict[str, bytes]:
    """The same pictures as SVG, by name; the same build gives the same bytes."""
    import matplotlib as mpl

    drawn = {}
    with mpl.rc_context(STYLE):
        for name, figure in figures(build).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            drawn[name] = buffer.getvalue()
    return drawn


def figures(build: Build) -> dict[str, Figure]:
    """The pictures that this build has something to show on."""
    made = {}
    if metric_names(build):
        made["scores"] = _scores(build)
    if any(level.completed for test in build.loadtests.values() for level in test.levels):
        made["load"] = _load(build)
    return made


def _scores(build: Build) -> Figure:
    """One row a metric, one point with its interval a system, a tick where the policy wants a floor."""
    from matplotlib.figure import Figure

    systems, names = evaluated(build), metric_names(build)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.15 * len(names) * (len(systems) + 0.8)), layout="constrained")
    axes = figure.subplots()
    spread = 0.56 / max(1, len(systems) - 1) if len(systems) > 1 else 0.0
    for place, (role, found) in enumerate(systems.items()):
        shown = [(row, found.metrics[name]) for row, name in enumerate(names) if name in found.metrics]
        middles = [row + (place - (len(systems) - 1) / 2) * spread for row, _ in shown]
        values = [interval.value for _, interval in shown]
        reach = [
            [max(0.0, interval.value - interval.low) for _, interval in shown],
            [max(0.0, interval.high - interval.value) for _, interval in shown],
        ]
        axes.errorbar(
            values, middles, xerr=reach, fmt="o", color=COLOURS[role], markersize=5, elinewidth=2, capsize=0,
            label=system_label(build, role),
        )  # fmt: skip
    checks = build.verdict.checks if build.verdict else ()
    floors = {check.name: check.threshold for check in checks if check.name in names}
    for name, floor in floors.items():
        row = names.index(name)
        axes.plot([floor, floor], [row - 0.45, row + 0.45], color=FLOOR, linewidth=1.4, linestyle=(0, (3, 2)))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(-0.02, 1.02)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="#eaecf0", linewidth=0.8, zorder=0)
    _tidy(axes, "x")
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    if floors:
        handles.append(axes.plot([], [], color=FLOOR, linewidth=1.4, linestyle=(0, (3, 2)))[0])
        labels.append("floor of the policy")
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    return figure


def _load(build: Build) -> Figure:
    """Latency to the end of an answer, time to its first token, and throughput, over concurrent users."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    end, first, throughput = figure.subplots(1, 3)
    for role, test in build.loadtests.items():
        levels = [level for level in test.levels if level.completed]
        users = [level.max_concurrency for level in levels]
        for axes, latency in ((end, "e2el"), (first, "ttft")):
            low, high = (_means(levels, f"p{percentile}_{latency}_ms") for percentile in (50, 95))
            axes.plot(users, low, "o-", color=COLOURS[role], markersize=4, linewidth=1.6, label=f"{role} p50")
            axes.plot(
                users,
                high,
                "o--",
                color=COLOURS[role],
                markersize=4,
                linewidth=1.2,
                label=f"{role} p95",
                alpha=0.75,
            )
        rates = _means(levels, "output_throughput")
        throughput.plot(users, rates, "o-", color=COLOURS[role], markersize=4, linewidth=1.6, label=role)
    titles = {
        end: "whole answer (E2EL), ms",
        first: "first token (TTFT), ms",
        throughput: "output tokens a second",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=9, loc="left", color="#475467")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("concurrent users")
        axes.set_xticks(sorted({level.max_concurrency for test in build.loadtests.values() for level in test.levels}))
        axes.margins(x=0.12)
        _tidy(axes, "y")
    end.legend(frameon=False, fontsize=8)
    throughput.legend(frameon=False, fontsize=8)
    return figure


def _means(levels: list[LoadLevel], metric: str) -> list[float]:
    """The mean over repeats of each level."""
    return [sum(level.metrics[metric]) / len(level.metrics[metric]) for level in levels]


def _tidy(axes: Axes, grid: str) -> None:
    """A light grid, and no frame that carries no information."""
    axes.grid(axis="x" if grid == "x" else "y", color="#eaecf0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="both", color="#d0d5dd")
