"""A build's pictures: the gate's checks, the loss ledger, scores, latency and throughput over concurrency, with intervals."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Build, Check, Interval
from pipeline.report import gate, load
from pipeline.report import ledger as report_ledger
from pipeline.report.content import evaluated, metric_names, system_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"base": "#98a2b3", "merged": "#6691d6", "candidate": "#0f766e", "incumbent": "#c2410c"}
FLOOR = "#b42318"
OUTCOMES = {"pass": "#067647", "fail": "#b42318", "inconclusive": "#dc6803"}
WAIVED = "#98a2b3"
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
    """Write gate.png, ledger.png, scores.png and load.png, each where the build has its figures; return their paths."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(STYLE):
        for name, figure in figures(build).items():
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=160, metadata={"Software": None})
            paths.append(path)
    return paths


def svgs(build: Build) -> dict[str, bytes]:
    """The same pictures as SVG, by name; the same build gives the same bytes."""
    import matplotlib as mpl

    pictures = {}
    with mpl.rc_context(STYLE):
        for name, figure in figures(build).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            pictures[name] = buffer.getvalue()
    return pictures


def figures(build: Build) -> dict[str, Figure]:
    """The pictures that this build has figures for."""
    pictures = {}
    if any(check.estimate for check in gate.checks(build.verdict)):
        pictures["gate"] = _gate(build)
    if ledger := report_ledger.ledger(build):
        pictures["ledger"] = _ledger(ledger)
    if metric_names(build):
        pictures["scores"] = _scores(build)
    if any(level.completed for test in build.loadtests.values() for level in test.levels):
        pictures["load"] = _load(build)
    return pictures


def _gate(build: Build) -> Figure:
    """A forest plot: how far each check's estimate and interval lie from its threshold, the allowed side to the right."""
    from matplotlib.figure import Figure

    rows = [check for check in gate.checks(build.verdict) if check.estimate]
    panels = {
        "distance to the threshold, in the score's unit": [check for check in rows if not gate.is_relative(check)],
        "distance to the objective, as a share of it": [check for check in rows if gate.is_relative(check)],
    }
    panels = {title: checks for title, checks in panels.items() if checks}
    heights = [len(checks) + 1.6 for checks in panels.values()]
    figure = Figure(figsize=(WIDTH, 0.27 * sum(heights) + 0.1), layout="constrained")
    grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axes, (title, checks) in zip(grid[:, 0], panels.items(), strict=True):
        _forest(axes, checks)
        axes.set_xlabel(title, fontsize=8)
    return figure


def _forest(axes: Axes, checks: list[Check]) -> None:
    """One row a check; an arrow marks an estimate beyond the axis."""
    import matplotlib as mpl

    gaps = [gate.distance(check) or Interval(value=0, low=0, high=0) for check in checks]
    reach = min(1.05, 1.15 * max(max(abs(gap.low), abs(gap.high)) for gap in gaps) or 1.0)
    axes.axvspan(0, reach, color="#f6fef9", zorder=0)
    axes.axvline(0, color="#344054", linewidth=1)
    for row, (check, gap) in enumerate(zip(checks, gaps, strict=True)):
        colour = WAIVED if check.waived else OUTCOMES[check.outcome]
        if abs(gap.value) <= reach:
            _whisker(axes, row, gap, colour, is_filled=not check.waived)
        else:
            axes.plot(
                0.98 * math.copysign(reach, gap.value), row, ">" if gap.value > 0 else "<", color=colour, markersize=6
            )
    axes.set_yticks(range(len(checks)), [_plain(check.rule) for check in checks])
    axes.set_ylim(len(checks) - 0.4, -0.6)
    axes.set_xlim(-reach, reach)
    axes.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:+g}"))
    _tidy(axes, "x")
    axes.tick_params(axis="y", length=0)


def _ledger(ledger: report_ledger.Ledger) -> Figure:
    """One row a step: the score, and beside it the change to the step before; training's far larger change is cut."""
    from matplotlib.figure import Figure

    steps = ledger.steps
    figure = Figure(figsize=(WIDTH, 0.8 + 0.3 * len(steps)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.09})
    later = [step.change for step in steps if step.change and step.step != "adapter"]
    reach = 1.25 * max((max(abs(change.low), abs(change.high)) for change in later), default=0.1) or 0.1
    right.axvline(0, color="#344054", linewidth=1)
    for row, step in enumerate(steps):
        is_loss = step.change is not None and step.change.high < 0
        colour = WAIVED if not step.taken else OUTCOMES["fail"] if is_loss else COLOURS["candidate"]
        _whisker(left, row, step.score, colour, is_filled=step.taken)
        if step.change and abs(step.change.value) <= reach:
            _whisker(right, row, step.change, colour, is_filled=step.taken)
        elif step.change:
            place, sign = (reach, ">") if step.change.value > 0 else (-reach, "<")
            right.plot(0.93 * place, row, sign, color=colour, markersize=6)
            right.annotate(
                f"{step.change.value:+.3f} ", (0.9 * place, row), ha="right" if place > 0 else "left", va="center"
            )
    left.set_yticks(range(len(steps)), [step.title + ("" if step.taken else " (not taken)") for step in steps])
    left.set_ylim(len(steps) - 0.4, -0.6)
    right.set_xlim(-reach, reach)
    for axes, title in ((left, _plain(ledger.metric)), (right, "change to the step before")):
        axes.set_title(title, fontsize=9, loc="left", color="#475467")
        _tidy(axes, "x")
        axes.tick_params(axis="y", length=0)
    return figure


def _whisker(axes: Axes, row: float, interval: Interval, colour: str, *, is_filled: bool) -> None:
    """A point with its interval in a row."""
    axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot(interval.value, row, "o", color=colour, markersize=6, markerfacecolor=colour if is_filled else "white")


def _plain(text: str) -> str:
    """Text with dollar signs escaped: matplotlib reads them as mathematics."""
    return text.replace("$", r"\$")


def _scores(build: Build) -> Figure:
    """One row a metric, one point with its interval a system, a tick where the policy wants a floor."""
    from matplotlib.figure import Figure

    systems, names = evaluated(build), metric_names(build)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.15 * len(names) * (len(systems) + 0.8)), layout="constrained")
    axes = figure.subplots()
    spread = 0.56 / max(1, len(systems) - 1) if len(systems) > 1 else 0.0
    for place, (role, system) in enumerate(systems.items()):
        rows = [row for row, name in enumerate(names) if name in system.metrics]
        intervals = [system.metrics[names[row]] for row in rows]
        middles = [row + (place - (len(systems) - 1) / 2) * spread for row in rows]
        axes.errorbar(
            [interval.value for interval in intervals], middles, xerr=_reach(intervals),
            fmt="o", color=COLOURS[role], markersize=5, elinewidth=2, capsize=0,
            label=system_label(build, role),
        )  # fmt: skip
    checks = build.verdict.checks if build.verdict else ()
    floors = {check.name: check.threshold for check in checks if check.name in names}
    for name, floor in floors.items():
        row = names.index(name)
        axes.plot([floor, floor], [row - 0.45, row + 0.45], color=FLOOR, linewidth=1.4, linestyle=(0, (3, 2)))
    axes.set_yticks(range(len(names)), map(_plain, names))
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
    columns = len(labels) if len(labels) < 5 else 3
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)
    return figure


def _load(build: Build) -> Figure:
    """Latency to the end of an answer, time to its first token, and throughput, over concurrent users."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    end, first, throughput = figure.subplots(1, 3)
    sweep = [level for level in load.levels(build) if level.metrics]
    for role in dict.fromkeys(level.system for level in sweep):
        levels = [level for level in sweep if level.system == role]
        for axes, latency in ((end, "e2el"), (first, "ttft")):
            _curve(axes, levels, f"p50_{latency}_ms", f"{role} p50", COLOURS[role], "-")
            _curve(axes, levels, f"p95_{latency}_ms", f"{role} p95", COLOURS[role], "--")
        _curve(throughput, levels, "output_throughput", role, COLOURS[role], "-")
    titles = {
        end: "whole answer (E2EL), ms",
        first: "first token (TTFT), ms",
        throughput: "output tokens a second",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=9, loc="left", color="#475467")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("concurrent users")
        axes.set_xticks(sorted({level.users for level in sweep}))
        axes.margins(x=0.12)
        _tidy(axes, "y")
    end.legend(frameon=False, fontsize=8)
    throughput.legend(frameon=False, fontsize=8)
    return figure


def _curve(axes: Axes, levels: list[load.Level], metric: str, label: str, colour: str, style: str) -> None:
    """One metric over the levels with its intervals as whiskers."""
    users = [level.users for level in levels if metric in level.metrics]
    intervals = [level.metrics[metric].interval for level in levels if metric in level.metrics]
    axes.errorbar(
        users, [interval.value for interval in intervals], yerr=_reach(intervals),
        fmt="o" + style, color=colour, markersize=4, linewidth=1.5, elinewidth=1.2, capsize=2.5,
        alpha=0.7 if style == "--" else 1.0, label=label,
    )  # fmt: skip


def _reach(intervals: list[Interval]) -> list[list[float]]:
    """Whiskers' lengths below and above, as matplotlib takes them."""
    return [
        [max(0.0, interval.value - interval.low) for interval in intervals],
        [max(0.0, interval.high - interval.value) for interval in intervals],
    ]


def _tidy(axes: Axes, grid: str) -> None:
    """A light grid, and no frame that carries no information."""
    axes.grid(axis="x" if grid == "x" else "y", color="#eaecf0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="both", color="#d0d5dd")
