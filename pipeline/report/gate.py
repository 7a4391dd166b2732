"""The gate in a report: the verdict in one sentence, its checks with blocking ones first, and their distances to thresholds."""

from __future__ import annotations

from pipeline.artifacts import Build, Check, Interval, Outcome, Verdict

ORDER: tuple[Outcome, ...] = ("fail", "inconclusive", "pass")
BEGINNING: dict[Outcome, str] = {"pass": "Passes", "fail": "Fails", "inconclusive": "Undecided"}


def why(build: Build) -> str:
    """The verdict and its reason in one sentence; a waived check (advisory, or allowed to regress) decides nothing."""
    if build.verdict is None:
        return "Not judged."
    outcome = build.verdict.outcome
    counting = [check for check in build.verdict.checks if not check.waived]
    waivers = len(build.verdict.checks) - len(counting)
    tail = f" ({waivers} more not counted)" if waivers else ""
    deciding = [check for check in counting if check.outcome == outcome]
    if outcome == "pass" or not deciding:
        return f"{BEGINNING[outcome]}: all {len(counting)} checks hold{tail}."
    first, more = deciding[0], len(deciding) - 1
    rest = f"; so with {more} more {'check' if more == 1 else 'checks'}" if more else ""
    return f"{BEGINNING[outcome]}: {first.rule}: {first.why}{rest}{tail}."


def checks(verdict: Verdict | None) -> list[Check]:
    """The gate's checks: blocking ones, then passing ones, then waived ones."""
    rows = verdict.checks if verdict else ()
    return sorted(rows, key=lambda check: (bool(check.waived), ORDER.index(check.outcome)))


def is_relative(check: Check) -> bool:
    """Whether the distance is a share of the threshold, as for times and rates; scores have a common unit."""
    return check.estimate is not None and max(abs(check.estimate.value), abs(check.threshold)) > 1


def distance(check: Check) -> Interval | None:
    """How far the estimate is on the allowed side of the threshold: above 0 holds, below doesn't.

    In the score's unit, or as a share of the threshold where `is_relative`; None without an estimate.
    """
    if check.estimate is None:
        return None
    sign = -1.0 if "<=" in check.rule else 1.0
    scale = sign / (abs(check.threshold) or 1.0) if is_relative(check) else sign
    ends = [(end - check.threshold) * scale for end in (check.estimate.low, check.estimate.high)]
    return Interval(value=(check.estimate.value - check.threshold) * scale, low=min(ends), high=max(ends))
