"""The gate's part that is about requests: how many failed, and load objectives over repeated runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.artifacts import Check, LoadLevel, LoadTest, Outcome
from pipeline.config.gate import GateConfig, LoadCheck
from pipeline.intervals.load import Measured, measured
from pipeline.intervals.proportions import wilson


def errors_check(where: str, failed: int, sent: int, policy: GateConfig) -> Check:
    """Failed requests as counted: an interval would never lie wholly at 0, however many requests go well."""
    rate = wilson(failed, sent, policy.confidence) if sent else None
    return Check(
        name=f"errors in {where}",
        outcome="inconclusive" if rate is None else "pass" if rate.value <= policy.max_error_rate else "fail",
        estimate=rate,
        threshold=policy.max_error_rate,
        rule=f"failed requests in {where} <= {policy.max_error_rate:g}, as counted",
        why=f"{failed} of {sent} requests failed",
    )


def errors(loadtests: Mapping[str, LoadTest], policy: GateConfig) -> Iterator[Check]:
    """That the candidate answered the load test's requests."""
    if "candidate" in loadtests:
        levels = loadtests["candidate"].levels
        failed = sum(level.failed for level in levels)
        yield errors_check("load test", failed, failed + sum(level.completed for level in levels), policy)


def objectives(loadtests: Mapping[str, LoadTest], policy: GateConfig) -> Iterator[Check]:
    """A check for each load objective, at its level."""
    if "candidate" in loadtests:
        by_size = {level.max_concurrency: level for level in loadtests["candidate"].levels}
        for check in policy.load:
            yield _objective(check, by_size[check.max_concurrency], policy.confidence)


def _objective(check: LoadCheck, level: LoadLevel, confidence: float) -> Check:
    """A load objective at one level."""
    name = f"{check.metric} at {check.max_concurrency}"
    limit = check.max if check.max is not None else check.min
    sign = "<=" if check.max is not None else ">="
    rule = f"{check.metric} {sign} {limit:g} at concurrency {check.max_concurrency}"
    found = measured(level, check.metric, confidence)
    threshold = float(limit or 0.0)
    if found is None:
        return Check(
            name=name,
            outcome="fail",
            estimate=None,
            threshold=threshold,
            rule=rule,
            why="it was not measured" if level.completed else "no request finished",
        )
    outcome = _outcome(found, check)
    why = f"{found.interval.low:.4g} to {found.interval.high:.4g} by {found.how}"
    if outcome == "inconclusive" and found.unknown:
        why = f"{found.how}: nothing to make an interval from"
    elif outcome == "inconclusive" and found.open_above and check.max is not None:
        why = "too few requests for an upper bound"
        why += (
            f": {found.least_requests} are needed, loadtest.num_prompts times repeats" if found.least_requests else ""
        )
    elif outcome == "inconclusive" and not found.over_runs:
        why += ": one run says little of the next; set loadtest.repeats to 3 or more"
    elif outcome == "inconclusive":
        why += "; more requests or repeats would narrow it"
    return Check(name=name, outcome=outcome, estimate=found.interval, threshold=threshold, rule=rule, why=why)


def _outcome(found: Measured, check: LoadCheck) -> Outcome:
    """Fewer repeats than show how runs differ can fail an objective, and never pass one."""
    interval = found.interval
    if found.unknown:
        return "inconclusive"
    if check.max is not None:
        holds, broken = interval.high <= check.max and not found.open_above, interval.low > check.max
    else:
        holds, broken = (
            interval.low >= (check.min or 0.0),
            interval.high < (check.min or 0.0) and not found.open_above,
        )
    return "pass" if holds and found.over_runs else "fail" if broken else "inconclusive"
