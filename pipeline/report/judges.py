"""lm-eval's tasks by system, and the LLM judge's counts, in a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.artifacts import Build, Interval, JudgeReport, TaskResult
from pipeline.intervals.scores import difference_interval, mean_interval
from pipeline.report.content import ROLES, confidence


@dataclass(frozen=True)
class Task:
    """One metric of an lm-eval task: every system's mean, and the candidate's paired difference to one of them."""

    task: str
    metric: str
    higher_is_better: bool
    documents: int
    scores: dict[str, Interval]
    against: str | None
    change: Interval | None


@dataclass(frozen=True)
class Judged:
    """An LLM judge's comparison; `won` and `lost` count the items with the same winner in both orders."""

    against: str
    model: str
    items: int
    failed: int
    win_rate: Interval
    agreement: Interval
    won: int
    lost: int


def tasks(build: Build) -> list[Task]:
    """lm-eval's results, in the candidate's order; against the champion, else the base, on the same documents."""
    level = confidence(build)
    by_system = {
        role: {(task.task, task.metric): task for task in build.tasks[role] if task.values}
        for role in ROLES
        if role in build.tasks
    }
    return [_task(ours, by_system, level) for ours in by_system.get("candidate", {}).values()]


def _task(ours: TaskResult, by_system: dict[str, dict[tuple[str, str], TaskResult]], level: float) -> Task:
    key = (ours.task, ours.metric)
    systems = {role: reports[key] for role, reports in by_system.items() if key in reports}
    against = next((role for role in ("incumbent", "base") if role in systems and systems[role].ids == ours.ids), None)
    change = difference_interval(ours.values, systems[against].values, level) if against else None
    scores = {role: mean(report.values, level) for role, report in systems.items()}
    return Task(ours.task, ours.metric, ours.higher_is_better, len(ours.values), scores, against, change)


def mean(values: Sequence[float], level: float) -> Interval:
    """The mean with its interval; a metric beyond 0 to 1 that is the same for every document is itself."""
    if min(values) == max(values) and not 0 <= values[0] <= 1:
        return Interval(value=values[0], low=values[0], high=values[0])
    return mean_interval(values, level)


def judged(build: Build) -> list[Judged]:
    """The LLM judge's comparisons."""
    return [_judged(report) for report in build.judged]


def _judged(report: JudgeReport) -> Judged:
    scores = [judgement.score for judgement in report.items]
    return Judged(
        report.against, report.model, len(report.items), report.failed, report.win_rate, report.agreement,
        won=scores.count(1.0), lost=scores.count(0.0),
    )  # fmt: skip
