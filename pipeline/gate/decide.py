"""Questions with an interval into checks: how pass, fail and inconclusive are told apart, many questions at once.

A question passes when its whole interval reaches its threshold, fails when the whole interval lies below the value that it must not
fall under, and is open otherwise.

- All questions must pass, so asking many makes no wrong pass more likely: an intersection-union test (R. L. Berger and J. C. Hsu,
  Statistical Science 11:283-319, 1996).
- One failure is enough for a fail, so asking many would make a wrong fail more likely. Failures in a family of questions are
  therefore found by Holm's step-down procedure (S. Holm, Scandinavian Journal of Statistics 6:65-70, 1979), with intervals
  instead of p-values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from pipeline.artifacts import Check, Interval, Outcome
from pipeline.intervals.sample_size import items_to_decide

NOTHING_BETTER = "the estimate lies too near the threshold for any number of items to decide"

Kind = Literal["reach", "no_loss"]


@dataclass(frozen=True)
class Question:
    """Something that must be high enough. `estimate` gives its interval at a confidence.

    - `kind` reach: the whole interval must reach `threshold`; it fails when the whole interval lies below `fails_below`.
    - `kind` no_loss: it passes unless the whole interval lies below `fails_below`, which is then the threshold as well.

    `items`: how many the estimate rests on. `waived`: why the question doesn't decide the verdict.
    """

    name: str
    kind: Kind
    rule: str
    estimate: Callable[[float], Interval]
    threshold: float
    fails_below: float
    items: int
    waived: str = ""


def decide(questions: Sequence[Question], confidence: float, min_items: int = 1) -> list[Check]:
    """A check for each question, in order; those of one call are one family. Nothing passes on fewer than `min_items`."""
    questions = [replace(question, estimate=cache(question.estimate)) for question in questions]
    family = [question for question in questions if not question.waived]
    failures = {id(question) for question in _failures(family, confidence)}
    return [
        _check(question, confidence, min_items, len(family), fails=id(question) in failures)
        if not question.waived
        else _check(question, confidence, min_items, 1, fails=bool(_failures([question], confidence)))
        for question in questions
    ]


def _at_once(confidence: float, questions: int) -> float:
    """The confidence at which each of so many questions is answered, for all to be answered at `confidence`."""
    return 1 - (1 - confidence) / questions


def _reaches(question: Question, confidence: float) -> bool:
    return question.kind == "reach" and question.estimate(confidence).low >= question.threshold


def _failures(family: Sequence[Question], confidence: float) -> list[Question]:
    """Holm's procedure: questions still open are tested at a share of the error that grows with each failure."""
    below = [
        question
        for question in family
        if not _reaches(question, confidence) and question.estimate(confidence).high < question.fails_below
    ]
    failures: list[Question] = []
    while below:
        level = _at_once(confidence, len(family) - len(failures))
        new = [question for question in below if question.estimate(level).high < question.fails_below]
        if not new:
            break
        failures += new
        below = [question for question in below if question not in new]
    return failures


def _check(question: Question, confidence: float, min_items: int, at_once: int, *, fails: bool) -> Check:
    interval = question.estimate(confidence)
    passes = _reaches(question, confidence) or (question.kind == "no_loss" and not fails)
    few = question.items < min_items
    outcome: Outcome = "fail" if fails else "pass" if passes and not few else "inconclusive"
    if passes and few:
        why = f"rests on {question.items} items, {min_items - question.items} more are needed"
    elif question.kind == "no_loss":
        why = _why_no_loss(question, interval, question.estimate(_at_once(confidence, at_once)), outcome, at_once)
    else:
        why = _why_reach(question, interval, question.estimate(_at_once(confidence, at_once)), outcome, at_once)
    return Check(
        name=question.name, outcome=outcome, estimate=interval, threshold=question.threshold, rule=question.rule, why=why,
        waived=question.waived,
    )  # fmt: skip


def _why_no_loss(question: Question, interval: Interval, surely: Interval, outcome: Outcome, at_once: int) -> str:
    """The outcome in words; `surely` is the interval at the confidence that a failure takes."""
    limit = question.fails_below
    if outcome == "fail":
        return _proven(interval, limit)
    if interval.high < limit:
        return f"{_span(interval)} lies below {limit:.4g}, but of {at_once} parts looked at some do by chance"
    return f"not shown to be worse; {question.items} items would miss a loss of up to {max(0.0, -surely.low):.2g}"


def _why_reach(question: Question, interval: Interval, surely: Interval, outcome: Outcome, at_once: int) -> str:
    """The outcome in words; `surely` is the interval at the confidence that a failure takes."""
    threshold, limit = question.threshold, question.fails_below
    if outcome == "fail":
        tail = "" if threshold == limit else f", and it isn't above {threshold:.4g}"
        return _proven(interval, limit) + tail
    if outcome == "pass":
        return f"the whole interval from {interval.low:.4g} reaches it"
    tail = "" if threshold == limit else f" and isn't all below {limit:.4g}"
    where = f"{_span(interval)} straddles {threshold:.4g}{tail}"
    if interval.high < limit:
        tail = f"but not surely enough where {at_once} questions are asked at once"
        where = f"{_span(interval)} lies below {limit:.4g}, {tail}"
    items = items_to_decide(interval, surely, question.items, threshold, limit)
    if items is None:
        return f"{where}; {NOTHING_BETTER}"
    return f"{where}; about {items - question.items} more items would decide if the estimate stays"


def _proven(interval: Interval, limit: float) -> str:
    return f"the whole interval up to {interval.high:.4g} lies below {limit:.4g}"


def _span(interval: Interval) -> str:
    return f"{interval.low:.4g} to {interval.high:.4g}"
