"""The loss ledger in a report: what each step of a model's making did to the headline metric, on the same items."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.artifacts import Build, Interval, LedgerStep
from pipeline.evaluation import scoring
from pipeline.ledger.compare import MERGES, Change, changes, culprit
from pipeline.report.content import confidence, headline, with_interval

TITLES: dict[LedgerStep, str] = {
    "base": "base, before training",
    "adapter": "adapter on the NF4 base",
    "merged_original": "merged into the original base",
    "merged_dequantized": "merged into the dequantized base",
    "quantized": "AWQ",
    "served": "as served",
}
CHANGES: dict[LedgerStep, str] = {
    "base": "The base",
    "adapter": "Training",
    "merged_original": "Merging into the original base",
    "merged_dequantized": "Merging into the dequantized base",
    "quantized": "AWQ",
    "served": "Serving",
}


@dataclass(frozen=True)
class Step:
    """A line of the ledger: the score, and the paired change to the step before (none for the first).

    `taken` is false for the way to merge that the build didn't go.
    """

    step: LedgerStep
    title: str
    engine: str
    score: Interval
    before: LedgerStep | None
    change: Interval | None
    taken: bool


@dataclass(frozen=True)
class Ledger:
    """The steps in order, scored by `metric` on `items` items, and in words which lost most."""

    metric: str
    items: int
    steps: tuple[Step, ...]
    said: str


def ledger(build: Build) -> Ledger | None:
    """The build's ledger, or None where there is none or its items have no score."""
    entries = [entry for entry in build.ledger if entry.items]
    names = scoring.metric_names(entries[0].items) if entries else []
    if not names:
        return None
    wanted, level = headline(build), confidence(build)
    metric = wanted if wanted in names else names[0]
    try:
        changed = {change.step: change for change in changes(entries, metric, level)}
        lost = culprit(entries, metric, level)
        said = _said(metric, lost)
    except ValueError as error:
        changed, said = {}, f"The steps can't be compared: {error}."
    merged = next((entry.step for entry in reversed(entries) if entry.step in MERGES), None)
    steps = [
        Step(
            step=entry.step,
            title=TITLES[entry.step],
            engine=entry.engine,
            score=scoring.metric(entry.items, metric, level),
            before=changed[entry.step].before if entry.step in changed else None,
            change=changed[entry.step].change if entry.step in changed else None,
            taken=entry.step not in MERGES or entry.step == merged,
        )
        for entry in entries
    ]
    return Ledger(metric, len(entries[0].items), tuple(steps), said)


def _said(metric: str, lost: Change | None) -> str:
    """Which step lost most, if its interval leaves out 0."""
    if lost is None:
        return "No step lost measurably."
    return f"{CHANGES[lost.step]} lost most: {metric} {with_interval(lost.change, sign=True)}."
