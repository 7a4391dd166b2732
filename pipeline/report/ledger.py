"""The loss ledger in a report: each step's change of the headline metric on the same items."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.artifacts import Build, Interval, LedgerStep
from pipeline.evaluation import scoring
from pipeline.ledger.compare import MERGES, Change, changes, culprit
from pipeline.report.content import confidence, headline, method_title, with_interval

TITLES: dict[LedgerStep, str] = {
    "base": "base, before training",
    "adapter": "adapter on the NF4 base",
    "merged_original": "merged into the original base",
    "merged_dequantized": "merged into the dequantized base",
    "served": "as served",
}
"""Of scores; the quantized step's is its method."""
CHANGES: dict[LedgerStep, str] = {
    "base": "The base",
    "adapter": "Training",
    "merged_original": "Merging into the original base",
    "merged_dequantized": "Merging into the dequantized base",
    "served": "Serving",
}
"""Of changes; the quantized step's is its method."""


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
    """The steps in order, scored by `metric` on `items` items; `said` names in words the step that lost most."""

    metric: str
    items: int
    steps: tuple[Step, ...]
    said: str


def ledger(build: Build) -> Ledger | None:
    """The build's ledger; None without entries or scores."""
    entries = [entry for entry in build.ledger if entry.items]
    names = scoring.metric_names(entries[0].items) if entries else []
    if not names:
        return None
    name, level, title = headline(build), confidence(build), method_title(build)
    metric = name if name in names else names[0]
    try:
        by_step = {change.step: change for change in changes(entries, metric, level)}
        sentence = _sentence(metric, culprit(entries, metric, level), title)
    except ValueError as error:
        by_step, sentence = {}, f"The steps can't be compared: {error}."
    merge = next((entry.step for entry in reversed(entries) if entry.step in MERGES), None)
    steps = [
        Step(
            step=entry.step,
            title=TITLES.get(entry.step, title),
            engine=entry.engine,
            score=scoring.metric(entry.items, metric, level),
            before=by_step[entry.step].before if entry.step in by_step else None,
            change=by_step[entry.step].change if entry.step in by_step else None,
            taken=entry.step not in MERGES or entry.step == merge,
        )
        for entry in entries
    ]
    return Ledger(metric, len(entries[0].items), tuple(steps), sentence)


def _sentence(metric: str, loss: Change | None, title: str) -> str:
    """The step that lost most, if its interval leaves out 0; `title` names the quantized step."""
    if loss is None:
        return "No step lost measurably."
    return f"{CHANGES.get(loss.step, title)} lost most: {metric} {with_interval(loss.change, sign=True)}."
