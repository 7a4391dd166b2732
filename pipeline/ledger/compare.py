"""The loss ledger: which step of a model's making lost quality, by paired differences on the same items.

No torch, no server: `ledger/answers.py` asks each step, `ledger/scores.py` scores its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.artifacts import Evaluation, Interval, LedgerEntry, LedgerStep
from pipeline.evaluation import scoring

MERGES: tuple[LedgerStep, ...] = ("merged_original", "merged_dequantized")


@dataclass(frozen=True)
class Change:
    """A step against its predecessor: change = score - score of `before`, on the same items."""

    step: LedgerStep
    before: LedgerStep
    change: Interval


def served(candidate: Evaluation, before: LedgerEntry) -> LedgerEntry:
    """The last step: the candidate's answers in its evaluation to the items of the step `before` it."""
    items = {item.id: item for item in candidate.items}
    return LedgerEntry(step="served", engine="vllm", items=tuple(items[item.id] for item in before.items))


def changes(entries: Sequence[LedgerEntry], metric: str, confidence: float) -> list[Change]:
    """Each step against its predecessor, in the ledger's order; intervals as in `scoring.difference`.

    Both ways to merge come from the adapter; their successor comes from the last one listed, which is the way of this model. A step
    that wasn't measured is passed over: its successor is compared with the step before it.

    Raises ValueError when two steps don't have the same items in the same order.
    """
    steps = []
    for at, entry in enumerate(entries):
        before = _predecessor(entry, entries[:at])
        if before is None:
            continue
        if [item.id for item in entry.items] != [item.id for item in before.items]:
            raise ValueError(f"{entry.step} and {before.step} were not scored on the same items")
        change = scoring.difference(entry.items, before.items, metric, confidence)
        steps.append(Change(entry.step, before.step, change))
    return steps


def culprit(entries: Sequence[LedgerEntry], metric: str, confidence: float) -> Change | None:
    """The step on the candidate's way with the largest loss, among steps whose whole interval lies below 0; None without one.

    The claim: this step lost, at `confidence` for the one comparison. It says nothing of the other steps. Where no step lost, a step
    is named in up to a tenth of ledgers at 0.95: four steps after the base, each wrong on this side in a fortieth. The other way to
    merge isn't on the candidate's way.
    """
    way = next((entry.step for entry in reversed(entries) if entry.step in MERGES), None)
    losses = [
        change
        for change in changes(entries, metric, confidence)
        if change.change.high < 0 and (change.step not in MERGES or change.step == way)
    ]
    return min(losses, key=lambda change: change.change.value, default=None)


def _predecessor(entry: LedgerEntry, earlier: Sequence[LedgerEntry]) -> LedgerEntry | None:
    if entry.step in MERGES:
        earlier = [candidate for candidate in earlier if candidate.step not in MERGES]
    return earlier[-1] if earlier else None
