"""The gate: a pure function from reports and policy to pass, fail or inconclusive, with intervals.

How it decides:
- A floor passes when the whole interval reaches it and fails when the whole interval lies below; else it is
  inconclusive, and `why` says about how many items would decide. Load objectives likewise.
- A comparison with a margin asks for non-inferiority on the same items: it passes when the whole interval of the paired
  difference reaches -margin, and fails when the candidate is shown to be worse, that is when the whole interval lies
  below 0 without reaching -margin. A negative margin asks to be better by that much, and is judged as a floor is. Without
  an incumbent it doesn't apply and passes, saying so.
- A slice fails when it is shown to be worse by more than its margin, and passes otherwise, saying what could go unseen.
- Failed requests and must-pass prompts are judged as counted: over the limit fails. A failed request has also scored 0.
- Items that share the value of gate.cluster_by count as one draw.
- The verdict fails if any check fails, is inconclusive if any is, and passes only if all pass; pipeline.gate_decide
  says what many questions at once do to that. A check that is advisory or an allowed regression doesn't count.
- A policy of which no quality check applies is never passed.

The intervals are computed here from the items, at the policy's confidence, never taken from a report. Greedy
answers differ a little with batching; two evaluations of one model are not always equal, and that isn't in
the intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from pipeline import gate_policy, scoring, slices, statistics
from pipeline.artifacts import (
    Check,
    Interval,
    Item,
    LoadLevel,
    LoadTest,
    Outcome,
    PromptResult,
    Reports,
    Verdict,
)
from pipeline.config import GateConfig, LoadCheck, MetricCheck, SliceCheck
from pipeline.digests import digest_of
from pipeline.errors import GateFailed
from pipeline.gate_decide import Question, decide
from pipeline.load_statistics import Measured, measured

ADVISORY = "advisory"
NO_INCUMBENT = "no incumbent yet"
MIN_CLUSTERS = 20


def judge(reports: Reports, policy: GateConfig, unit_digest: str) -> Verdict:
    """Judge the candidate.

    Raises GateFailed when the reports can't be judged by this policy: a metric, level or system that isn't
    there, other items than the candidate's, or another served unit than `unit_digest`. All such problems at
    once.
    """
    if problems := list(gate_policy.unfit(reports, policy, unit_digest)):
        raise GateFailed(problems)
    candidate = reports.evaluations["candidate"]
    evidence = [
        *_policy_checks(reports, policy),
        _items_check(candidate.items, policy),
        *_clusters_checks(candidate.items, policy),
        _errors_check("evaluation", candidate.errors, len(candidate.items), policy),
        *_load_errors(reports.loadtests, policy),
    ]
    results = [
        *_prompt_checks(reports.prompts, policy),
        *_quality_checks(reports, policy),
        *_load_checks(reports.loadtests, policy),
    ]
    checks = [*evidence, *_waive(results, policy)]
    return Verdict(
        outcome=worst([check.outcome for check in checks if not check.waived]),
        unit_digest=unit_digest,
        policy_digest=digest_of(policy.model_dump(mode="json")),
        checks=tuple(checks),
    )


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """Fail before inconclusive before pass."""
    return "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"


def _waive(checks: Sequence[Check], policy: GateConfig) -> list[Check]:
    """Mark the regressions that the policy allows; raises GateFailed for one that names none of these checks.

    What is waived is a result: too little evidence is never allowed.
    """
    reasons = {allowed.check: allowed.reason for allowed in policy.allowed_regressions}
    names = [check.name for check in checks]
    if problems := list(gate_policy.unknown_checks(policy, names)):
        raise GateFailed(problems)
    return [
        check.model_copy(update={"waived": f"allowed: {reasons[check.name]}"})
        if check.name in reasons and check.outcome != "pass"
        else check
        for check in checks
    ]


def _policy_checks(reports: Reports, policy: GateConfig) -> list[Check]:
    """An inconclusive check where no quality check applies, so that nothing passes unexamined."""
    deciding = [check for check in policy.metrics if check.required]
    if any(check.min is not None or check.against in reports.evaluations for check in deciding):
        return []
    why = "none of gate.metrics applies without an incumbent" if deciding else "gate.metrics decides nothing"
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


def _clusters_checks(items: Sequence[Item], policy: GateConfig) -> list[Check]:
    """That there are enough groups for intervals made from groups."""
    if policy.cluster_by is None:
        return []
    count = len(set(scoring.groups(items, policy.cluster_by) or ()))
    return [
        Check(
            name="groups",
            outcome="inconclusive" if count < MIN_CLUSTERS else "pass",
            estimate=None,
            threshold=MIN_CLUSTERS,
            rule=f"values of {policy.cluster_by} >= {MIN_CLUSTERS}",
            why=f"{len(items)} items come in {count} groups",
        )
    ]


def _errors_check(where: str, failed: int, sent: int, policy: GateConfig) -> Check:
    """Failed requests as counted: an interval would never lie wholly at 0, however many requests go well."""
    rate = statistics.wilson(failed, sent, policy.confidence) if sent else None
    return Check(
        name=f"errors in {where}",
        outcome="inconclusive" if rate is None else "pass" if rate.value <= policy.max_error_rate else "fail",
        estimate=rate,
        threshold=policy.max_error_rate,
        rule=f"failed requests in {where} <= {policy.max_error_rate:g}, as counted",
        why=f"{failed} of {sent} requests failed",
    )


def _prompt_checks(prompts: Mapping[str, Sequence[PromptResult]], policy: GateConfig) -> list[Check]:
    """Must-pass prompts as counted: all of them, or those that the incumbent passes."""
    ours = prompts.get("candidate", ())
    if not ours:
        return []
    broken = {result.id for result in ours if result.broken}
    passed_before = {result.id for result in prompts.get("incumbent", ()) if not result.broken}
    new, old = broken & passed_before, broken - passed_before
    counted = new if policy.prompts == "no_regression" else broken
    which = "that the incumbent passes" if policy.prompts == "no_regression" else "of all"
    told = f"{len(new)} broke since the incumbent, {len(old)} others are broken" if broken else "none is broken"
    return [
        Check(
            name="must-pass prompts",
            outcome="fail" if counted else "pass",
            estimate=None,
            threshold=0,
            rule=f"broken prompts {which} <= 0, as counted",
            why=f"{told}, of {len(ours)}" + (f": {', '.join(sorted(counted)[:5])}" if counted else ""),
        )
    ]


def _quality_checks(reports: Reports, policy: GateConfig) -> list[Check]:
    """All that is judged by an interval over items, looked at together; what doesn't apply passes where it stands."""
    asked: list[Question | Check] = [
        *(entry for check in policy.metrics for entry in _metric_questions(check, reports, policy)),
        *(entry for check in policy.slices for entry in _slice_questions(check, reports, policy)),
        *_judge_questions(reports, policy),
    ]
    answers = iter(decide([entry for entry in asked if isinstance(entry, Question)], policy.confidence))
    return [entry if isinstance(entry, Check) else next(answers) for entry in asked]


def _metric_questions(check: MetricCheck, reports: Reports, policy: GateConfig) -> Iterator[Question | Check]:
    """The floor and the comparison that a metric's check asks for."""
    waived = "" if check.required else ADVISORY
    if check.min is not None:
        yield Question(
            name=check.metric,
            rule=f"{check.metric} >= {check.min:g}",
            estimate=partial(_level, reports, check.metric, policy),
            reach=check.min,
            broken=check.min,
            items=_counted(reports, check.metric),
            waived=waived,
        )
    if check.against is None:
        return
    name = f"{check.metric} vs {check.against}"
    rule = f"{check.metric} - {check.against} >= {-check.margin:g}"
    if check.against not in reports.evaluations:
        yield _not_applicable(name, rule, -check.margin)
        return
    yield Question(
        name=name,
        rule=rule,
        estimate=partial(_gap, reports, check.against, check.metric, policy),
        reach=-check.margin,
        broken=max(0.0, -check.margin),
        items=_counted(reports, check.metric),
        waived=waived,
    )


def _level(reports: Reports, metric: str, policy: GateConfig, confidence: float) -> Interval:
    task = gate_policy.task_result(reports.tasks.get("candidate", ()), metric)
    if task is not None:
        return statistics.mean_interval(task.values, confidence)
    return scoring.metric(reports.evaluations["candidate"].items, metric, confidence, policy.cluster_by)


def _gap(reports: Reports, other: str, metric: str, policy: GateConfig, confidence: float) -> Interval:
    task = gate_policy.task_result(reports.tasks.get("candidate", ()), metric)
    if task is not None:
        theirs = gate_policy.task_result(reports.tasks[other], metric)
        assert theirs is not None  # noqa: S101 - gate_policy.unfit looked
        return statistics.difference_interval(task.values, theirs.values, confidence)
    ours, against = reports.evaluations["candidate"].items, reports.evaluations[other].items
    return scoring.difference(ours, against, metric, confidence, policy.cluster_by)


def _counted(reports: Reports, metric: str) -> int:
    """How many items a metric rests on."""
    task = gate_policy.task_result(reports.tasks.get("candidate", ()), metric)
    items = reports.evaluations["candidate"].items
    return len(task.values) if task else sum(metric in item.scores for item in items) or len(items)


def _not_applicable(name: str, rule: str, threshold: float, why: str = NO_INCUMBENT) -> Check:
    return Check(name=name, outcome="pass", estimate=None, threshold=threshold, rule=rule, why=why)


def _slice_questions(check: SliceCheck, reports: Reports, policy: GateConfig) -> Iterator[Question | Check]:
    """One question a part of the holdout: is it shown to be worse by more than the margin?"""
    other = check.against
    if other not in reports.evaluations:
        rule = f"{check.metric} - {other} in each {check.by}, not shown to be below {-check.margin:g}"
        yield _not_applicable(f"{check.metric} by {check.by}", rule, -check.margin)
        return
    ours, theirs = reports.evaluations["candidate"].items, reports.evaluations[other].items
    rule = f"{check.metric} - {other} not shown to be below {-check.margin:g}"
    for part, chosen in slices.split(ours, check.by, check.min_items).items():
        name = f"{check.metric} vs {other} where {check.by}={part}"
        if len(chosen) < check.min_items:
            why = f"{len(chosen)} items of small parts are too few to be judged"
            yield _not_applicable(name, rule, -check.margin, why)
            continue
        mine, against = [ours[index] for index in chosen], [theirs[index] for index in chosen]
        yield Question(
            name=name,
            rule=rule,
            estimate=partial(scoring.difference, mine, against, check.metric, cluster_by=policy.cluster_by),
            reach=None,
            broken=-check.margin,
            items=len(chosen),
        )


def _judge_questions(reports: Reports, policy: GateConfig) -> Iterator[Question | Check]:
    """Floors for an LLM judge's win rate."""
    for check in policy.judges:
        name, rule = f"judge vs {check.against}", f"win rate over {check.against} >= {check.min:g}"
        found = next((report for report in reports.judged if report.against == check.against), None)
        if found is None:
            yield _not_applicable(name, rule, check.min)
            continue
        scores = [judgement.score for judgement in found.items]
        yield Question(
            name=name,
            rule=rule,
            estimate=partial(statistics.mean_interval, scores),
            reach=check.min,
            broken=check.min,
            items=len(scores),
        )


def _load_errors(loadtests: Mapping[str, LoadTest], policy: GateConfig) -> Iterator[Check]:
    if "candidate" in loadtests:
        levels = loadtests["candidate"].levels
        failed = sum(level.failed for level in levels)
        yield _errors_check("load test", failed, failed + sum(level.completed for level in levels), policy)


def _load_checks(loadtests: Mapping[str, LoadTest], policy: GateConfig) -> Iterator[Check]:
    if "candidate" in loadtests:
        by_size = {level.max_concurrency: level for level in loadtests["candidate"].levels}
        for check in policy.load:
            yield _load_check(check, by_size[check.max_concurrency], policy.confidence)


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
    elif outcome == "inconclusive" and not found.repeated:
        why += ": one run says little of the next; set loadtest.repeats to 3 or more"
    elif outcome == "inconclusive":
        why += "; more requests or repeats would narrow it"
    return Check(name=name, outcome=outcome, estimate=found.interval, threshold=threshold, rule=rule, why=why)


def _load_outcome(found: Measured, check: LoadCheck) -> Outcome:
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
    return "pass" if holds and found.repeated else "fail" if broken else "inconclusive"
