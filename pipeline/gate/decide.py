"""Questions with an interval into checks: how pass, fail and inconclusive are told apart, many questions at once.

A question passes when its whole interval reaches what it must, fails when the whole interval lies below what it must not
be, and is open otherwise. All questions must pass, so asking many makes no wrong pass more likely (an intersection-union
test: R. L. Berger and J. C. Hsu, Statistical Science 11:283-319, 1996). One failure is enough for a fail, so there many would
make a wrong one more likely: failures in a family of questions are found by Holm's step-down procedure (S. Holm,
Scandinavian Journal of Statistics 6:65-70, 1979), with intervals instead of p-values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from pipeline.artifacts import Check, Interval, Outcome
from pipeline.intervals.sample_size import items_to_decide

NOTHING_BETTER = "the estimate lies too near the threshold for any number of items to decide"


@dataclass(frozen=True)
class Question:
    """Something that must be high enough.

    `estimate` gives its interval at a confidence. `reach`: the whole interval must reach it; None where it is enough not
    to be `broken`, which is what the whole interval must not lie below. `items` is what the estimate rests on;
    `waived` says why it doesn't decide.
    """

    name: str
    rule: str
    estimate: Callable[[float], Interval]
    reach: float | None
    broken: float
    items: int
    waived: str = ""


def decide(questions: Sequence[Question], confidence: float, min_items: int = 1) -> list[Check]:
    """A check for each question, in order; those of one call are one family. Nothing passes on fewer than `min_items`."""
    asked = [replace(question, estimate=cache(question.estimate)) for question in questions]
    family = [question for question in asked if not question.waived]
    failed = {id(question) for question in _broken(family, confidence)}
    return [
        _check(question, confidence, min_items, len(family), fails=id(question) in failed)
        if not question.waived
        else _check(question, confidence, min_items, 1, fails=bool(_broken([question], confidence)))
        for question in asked
    ]


def _at_once(confidence: float, asked: int) -> float:
    """The confidence at which one of so many questions is answered, for all to be answered at `confidence`."""
    return 1 - (1 - confidence) / asked


def _passes(question: Question, confidence: float) -> bool:
    return question.reach is not None and question.estimate(confidence).low >= question.reach


def _broken(family: Sequence[Question], confidence: float) -> list[Question]:
    """Holm's procedure: those still open are held against a share of the error that grows with each failure found."""
    below = [
        question
        for question in family
        if not _passes(question, confidence) and question.estimate(confidence).high < question.broken
    ]
    found: list[Question] = []
    while below:
        level = _at_once(confidence, len(family) - len(found))
        new = [question for question in below if question.estimate(level).high < question.broken]
        if not new:
            break
        found += new
        below = [question for question in below if question not in new]
    return found


def _check(question: Question, confidence: float, min_items: int, asked: int, *, fails: bool) -> Check:
    interval = question.estimate(confidence)
    passes = _passes(question, confidence) or (question.reach is None and not fails)
    few = question.items < min_items
    outcome: Outcome = "fail" if fails else "pass" if passes and not few else "inconclusive"
    if passes and few:
        why = f"rests on {question.items} items, {min_items - question.items} more are needed"
    else:
        why = _why(question, interval, question.estimate(_at_once(confidence, asked)), outcome, asked)
    threshold = question.broken if question.reach is None else question.reach
    return Check(
        name=question.name, outcome=outcome, estimate=interval, threshold=threshold, rule=question.rule, why=why,
        waived=question.waived,
    )  # fmt: skip


def _why(question: Question, interval: Interval, surely: Interval, outcome: Outcome, asked: int) -> str:
    """The outcome in words; `surely` is the interval at the confidence that a failure takes."""
    reach, broken = question.reach, question.broken
    span = f"{interval.low:.4g} to {interval.high:.4g}"
    if outcome == "fail":
        proven = f"the whole interval up to {interval.high:.4g} lies below {broken:.4g}"
        return proven if reach is None or reach == broken else f"{proven}, and it isn't above {reach:.4g}"
    if reach is None and interval.high < broken:
        return f"{span} lies below {broken:.4g}, but of {asked} parts looked at some do by chance"
    if reach is None:
        return f"not shown to be worse; {question.items} items would miss a loss of up to {max(0.0, -surely.low):.2g}"
    if outcome == "pass":
        return f"the whole interval from {interval.low:.4g} reaches it"
    where = f"{span} straddles {reach:.4g}" + ("" if reach == broken else f" and isn't all below {broken:.4g}")
    if interval.high < broken:
        where = f"{span} lies below {broken:.4g}, but not surely enough where {asked} questions are asked at once"
    needed = items_to_decide(interval, surely, question.items, reach, broken)
    more = (
        NOTHING_BETTER
        if needed is None
        else f"about {needed - question.items} more items would decide if the estimate stays"
    )
    return f"{where}; {more}"
