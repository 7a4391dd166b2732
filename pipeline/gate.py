"""The gate: a pure function from reports and policy to pass, fail or inconclusive, with intervals.

How it decides:
- A floor passes when the whole interval reaches it and fails when the whole interval lies below; else it is
  inconclusive, and `why` says about how many items would decide. Load objectives likewise.
- A comparison judges the paired difference on the same items against -margin by the same rule. Without an
  incumbent it doesn't apply and passes, saying so.
- Failed requests are judged as counted: over the limit fails. Each has also scored 0.
- The verdict fails if any check fails, is inconclusive if any is, and passes only if all pass. As all
  must pass, many checks don't make a wrong pass more likely, and no correction for their number is made.
- A policy of which no quality check applies is never passed.

The intervals are computed here from the items, at the policy's confidence, never taken from a report. Greedy
answers differ a little with batching; two evaluations of one model are not always equal, and that isn't in
the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from pipeline import scoring
from pipeline.artifacts import Check, Evaluation, Interval, Item, LoadLevel, LoadTest, Outcome, Verdict
from pipeline.config import EvaluateConfig, GateConfig, LoadCheck, LoadtestConfig, MetricCheck
from pipeline.digests import digest_of
from pipeline.errors import GateFailed, Problem
from pipeline.load_statistics import Measured, measured, requests_needed
from pipeline.statistics import items_to_decide, wilson

NOTHING_BETTER = "the estimate lies too near the threshold for any number of items to decide"


def judge(
    evaluations: Mapping[str, Evaluation],
    loadtests: Mapping[str, LoadTest],
    policy: GateConfig,
    unit_digest: str,
) -> Verdict:
    """Judge the candidate: `evaluations` by system (candidate, base, incumbent), `loadtests` likewise.

    Raises GateFailed when the reports can't be judged by this policy: a metric, level or system that isn't
    there, other items than the candidate's, or another served unit than `unit_digest`. All such problems at
    once.
    """
    if problems := list(_unfit(evaluations, loadtests, policy, unit_digest)):
        raise GateFailed(problems)
    candidate = evaluations["candidate"]
    checks = [
        *_policy_checks(evaluations, policy),
        _items_check(candidate.items, policy),
        _errors_check("evaluation", *_failed(candidate), policy),
    ]
    checks += [line for check in policy.metrics for line in _metric_checks(check, evaluations, policy.confidence)]
    if "candidate" in loadtests:
        levels = loadtests["candidate"].levels
        failed, sent = (
            sum(level.failed for level in levels),
            sum(level.failed + level.completed for level in levels),
        )
        checks.append(_errors_check("load test", failed, sent, policy))
        by_size = {level.max_concurrency: level for level in levels}
        checks += [_load_check(check, by_size[check.max_concurrency], policy.confidence) for check in policy.load]
    return Verdict(
        outcome=worst([check.outcome for check in checks]),
        unit_digest=unit_digest,
        policy_digest=digest_of(policy.model_dump(mode="json")),
        checks=tuple(checks),
    )


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """Fail before inconclusive before pass."""
    return "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"


def policy_problems(policy: GateConfig, evaluate: EvaluateConfig, loadtest: LoadtestConfig) -> list[Problem]:
    """What a policy asks for that evaluation and load test won't measure: known before anything runs."""
    names = scoring.names_measured(evaluate.scorers)
    problems = []
    for index, check in enumerate(policy.metrics):
        if not scoring.is_measured(check.metric, evaluate.scorers):
            problems.append(_absent(f"gate.metrics[{index}].metric", check.metric, names, "evaluate.scorers"))
        if check.against == "base" and "base" not in evaluate.compare:
            problems.append(
                _absent(f"gate.metrics[{index}].against", "base", list(evaluate.compare), "evaluate.compare")
            )
    problems += _too_few_items(policy, evaluate)
    problems += _load_problems(policy, loadtest.max_concurrency)
    problems += _too_few_requests(policy, loadtest)
    return problems


def _too_few_items(policy: GateConfig, evaluate: EvaluateConfig) -> Iterator[Problem]:
    """Fewer scored items than the policy wants, however large the holdout is."""
    if evaluate.max_items is not None and evaluate.max_items < policy.min_items:
        yield Problem(
            f"{policy.min_items} scored items are wanted and only {evaluate.max_items} are asked for: it can't pass",
            key="gate.min_items",
            allowed=f"at most evaluate.max_items, {evaluate.max_items}",
            remedy=f"set evaluate.max_items: {policy.min_items} or more, or lower gate.min_items",
        )


def _absent(key: str, asked: str, there: Sequence[str], where: str) -> Problem:
    return Problem(
        f"{asked} is not measured",
        key=key,
        allowed=", ".join(there) or "nothing",
        remedy=f"add it to {where}, or drop the check",
    )


def _unfit(
    evaluations: Mapping[str, Evaluation],
    loadtests: Mapping[str, LoadTest],
    policy: GateConfig,
    unit_digest: str,
) -> Iterator[Problem]:
    """Why these reports can't be judged, if so."""
    if "candidate" not in evaluations or not evaluations["candidate"].items:
        yield Problem("the candidate was not evaluated", remedy="run the evaluate stage, then the gate again")
        return
    candidate, loadtest = evaluations["candidate"], loadtests.get("candidate")
    for report in (candidate, loadtest):
        if report is not None and report.unit_digest != unit_digest:
            found = f"of the served unit {report.unit_digest[:12]}, not {unit_digest[:12]}"
            what = f"the candidate's {type(report).__name__} is {found}"
            yield Problem(what, remedy="evaluate and load-test again what is to be registered")
    names = scoring.metric_names(candidate.items)
    for index, check in enumerate(policy.metrics):
        if check.metric not in names:
            yield _absent(f"gate.metrics[{index}].metric", check.metric, names, "evaluate.scorers")
        if check.against == "base" and "base" not in evaluations:
            yield _absent(f"gate.metrics[{index}].against", "base", sorted(evaluations), "evaluate.compare")
    for name in sorted({check.against for check in policy.metrics if check.against}):
        if name in evaluations:
            yield from _other_items(candidate, evaluations[name])
    sizes = [level.max_concurrency for level in loadtest.levels] if loadtest else []
    yield from _load_problems(policy, sizes)


def _load_problems(policy: GateConfig, sizes: Sequence[int]) -> Iterator[Problem]:
    for index, load in enumerate(policy.load):
        if load.max_concurrency not in sizes:
            key, there = f"gate.load[{index}].max_concurrency", [str(size) for size in sizes]
            yield _absent(key, str(load.max_concurrency), there, "loadtest.max_concurrency")


def _too_few_requests(policy: GateConfig, loadtest: LoadtestConfig) -> Iterator[Problem]:
    """Objectives on a tail that so few requests can't bound: such a check could fail but never pass."""
    sent = loadtest.num_prompts * loadtest.repeats
    for index, load in enumerate(policy.load):
        percentile, latency, *_ = load.metric.split("_")
        if load.max is None or latency not in ("ttft", "e2el"):
            continue
        needed = requests_needed(int(percentile[1:]) / 100, policy.confidence)
        if sent < needed:
            prompts = math.ceil(needed / loadtest.repeats)
            yield Problem(
                f"{load.metric} can't be bounded by {sent} requests a level",
                key=f"gate.load[{index}].metric",
                allowed=f"at least {needed} requests: loadtest.num_prompts times loadtest.repeats",
                remedy=f"set loadtest.num_prompts: {prompts}, or judge a lower percentile",
            )


def _other_items(candidate: Evaluation, other: Evaluation) -> Iterator[Problem]:
    """Why two evaluations aren't paired, if so."""
    remedy = f"evaluate {other.system} again on the candidate's holdout"
    if candidate.holdout_digest != other.holdout_digest:
        digests = f"{candidate.holdout_digest[:12]} and {other.holdout_digest[:12]}"
        yield Problem(f"candidate and {other.system} were scored on different holdouts ({digests})", remedy=remedy)
    ours, theirs = [item.id for item in candidate.items], [item.id for item in other.items]
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))
        found = f"{len(odd)} ids are in one only, such as {odd[0]}" if odd else "their order differs"
        yield Problem(f"candidate and {other.system} were not scored on the same items: {found}", remedy=remedy)
    elif any(one.scores.keys() != two.scores.keys() for one, two in zip(candidate.items, other.items, strict=True)):
        yield Problem(f"candidate and {other.system} were not scored by the same scorers", remedy=remedy)


def _policy_checks(evaluations: Mapping[str, Evaluation], policy: GateConfig) -> list[Check]:
    """An inconclusive check where no quality check applies, so that nothing passes unexamined."""
    if any(check.min is not None or check.against in evaluations for check in policy.metrics):
        return []
    why = "none of gate.metrics applies without an incumbent" if policy.metrics else "gate.metrics is empty"
    return [
        Check(
            name="policy",
            outcome="inconclusive",
            estimate=None,
            threshold=1,
            rule="quality checks that apply >= 1",
            why=f"{why}: add one with min, or against: base",
        )
    ]


def _items_check(items: Sequence[Item], policy: GateConfig) -> Check:
    short = policy.min_items - len(items)
    return Check(
        name="items",
        outcome="inconclusive" if short > 0 else "pass",
        estimate=None,
        threshold=policy.min_items,
        rule=f"scored items >= {policy.min_items}",
        why=f"{len(items)} items, {short} more are needed" if short > 0 else f"{len(items)} items",
    )


def _failed(evaluation: Evaluation) -> tuple[int, int]:
    return evaluation.errors, len(evaluation.items)


def _errors_check(where: str, failed: int, sent: int, policy: GateConfig) -> Check:
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


def _metric_checks(check: MetricCheck, evaluations: Mapping[str, Evaluation], confidence: float) -> Iterator[Check]:
    """The floor and the comparison that a metric's check asks for."""
    items = evaluations["candidate"].items
    counted = sum(check.metric in item.scores for item in items) or len(items)
    if check.min is not None:
        floor = scoring.metric(items, check.metric, confidence)
        yield _lower_bound(check.metric, f"{check.metric} >= {check.min:g}", floor, check.min, counted)
    if check.against is None:
        return
    name, rule = (
        f"{check.metric} vs {check.against}",
        f"{check.metric} - {check.against} >= {-check.margin:g}",
    )
    if check.against not in evaluations:
        yield Check(
            name=name,
            outcome="pass",
            estimate=None,
            threshold=-check.margin,
            rule=rule,
            why="no incumbent yet",
        )
        return
    gap = scoring.difference(items, evaluations[check.against].items, check.metric, confidence)
    yield _lower_bound(name, rule, gap, -check.margin, counted)


def _lower_bound(name: str, rule: str, interval: Interval, threshold: float, items: int) -> Check:
    """A check that the whole interval reaches `threshold`."""
    outcome: Outcome = "pass" if interval.low >= threshold else "fail" if interval.high < threshold else "inconclusive"
    more = _more(interval, items, threshold)
    why = {
        "pass": f"the whole interval from {interval.low:.4g} reaches it",
        "fail": f"the whole interval up to {interval.high:.4g} lies below",
        "inconclusive": f"{interval.low:.4g} to {interval.high:.4g} straddles it; {more}",
    }[outcome]
    return Check(name=name, outcome=outcome, estimate=interval, threshold=threshold, rule=rule, why=why)


def _more(interval: Interval, items: int, threshold: float) -> str:
    needed = items_to_decide(interval, items, threshold)
    if needed is None:
        return NOTHING_BETTER
    return f"about {needed - items} more items would decide if the estimate stays"


def _load_check(check: LoadCheck, level: LoadLevel, confidence: float) -> Check:
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
            why="no request finished",
        )
    outcome = _load_outcome(found, check)
    why = f"{found.interval.low:.4g} to {found.interval.high:.4g} by {found.how}"
    if outcome == "inconclusive" and found.unknown:
        why = f"{found.how}: nothing to make an interval from"
    elif outcome == "inconclusive" and found.open_above and check.max is not None:
        why = "too few requests for an upper bound"
        why += f": {found.needed} are needed, loadtest.num_prompts times repeats" if found.needed else ""
    elif outcome == "inconclusive":
        why += "; more requests or repeats would narrow it"
    return Check(name=name, outcome=outcome, estimate=found.interval, threshold=threshold, rule=rule, why=why)


def _load_outcome(found: Measured, check: LoadCheck) -> Outcome:
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
    return "pass" if holds else "fail" if broken else "inconclusive"
