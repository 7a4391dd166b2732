"""The gate's checks of requests: how many failed, and load objectives over repeated runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.artifacts import Check, LoadLevel, LoadTest, Outcome
from pipeline.config.gate import GateConfig, LoadCheck
from pipeline.intervals.load import Measured, measured
from pipeline.intervals.proportions import wilson


def errors_check(where: str, failures: int, requests: int, policy: GateConfig) -> Check:
    """Failed requests as counted: an interval would never lie wholly at 0, however many requests go well."""
    rate = wilson(failures, requests, policy.confidence) if requests else None
    return Check(
        name=f"errors in {where}",
        outcome="inconclusive" if rate is None else "pass" if rate.value <= policy.max_error_rate else "fail",
        estimate=rate,
        threshold=policy.max_error_rate,
        rule=f"failed requests in {where} <= {policy.max_error_rate:g}, as counted",
        why=f"{failures} of {requests} requests failed",
    )


def errors(loadtests: Mapping[str, LoadTest], policy: GateConfig) -> Iterator[Check]:
    """The check that the candidate answered the load test's requests."""
    if "candidate" in loadtests:
        levels = loadtests["candidate"].levels
        failures = sum(level.failed for level in levels)
        yield errors_check("load test", failures, failures + sum(level.completed for level in levels), policy)


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
    figure = measured(level, check.metric, confidence)
    threshold = float(limit or 0.0)
    if figure is None:
        return Check(
            name=name,
            outcome="fail",
            estimate=None,
            threshold=threshold,
            rule=rule,
            why="it was not measured" if level.completed else "no request finished",
        )
    outcome = _outcome(figure, check)
    why = f"{figure.interval.low:.4g} to {figure.interval.high:.4g} by {figure.how}"
    if outcome == "inconclusive" and figure.unknown:
        why = f"{figure.how}: there are no samples to make an interval from"
    elif outcome == "inconclusive" and figure.open_above and check.max is not None:
        why = "too few requests for an upper bound"
        why += (
            f": {figure.least_requests} are needed, loadtest.num_prompts times repeats" if figure.least_requests else ""
        )
    elif outcome == "inconclusive" and not figure.over_runs:
        why += ": one run says little of the next; set loadtest.repeats to 3 or more"
    elif outcome == "inconclusive":
        why += "; more requests or repeats would narrow it"
    return Check(name=name, outcome=outcome, estimate=figure.interval, threshold=threshold, rule=rule, why=why)


def _outcome(figure: Measured, check: LoadCheck) -> Outcome:
    """An objective passes only on enough repeats to show how runs differ; fewer can fail it."""
    interval = figure.interval
    if figure.unknown:
        return "inconclusive"
    if check.max is not None:
        holds, fails = interval.high <= check.max and not figure.open_above, interval.low > check.max
    else:
        holds, fails = (
            interval.low >= (check.min or 0.0),
            interval.high < (check.min or 0.0) and not figure.open_above,
        )
    return "pass" if holds and figure.over_runs else "fail" if fails else "inconclusive"
