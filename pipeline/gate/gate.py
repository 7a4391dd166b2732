"""The gate: a pure function from reports and policy to pass, fail or inconclusive, with intervals.

How it decides:
- A floor passes when the whole interval reaches it and fails when the whole interval lies below; else it is
  inconclusive, and `why` says about how many items would decide. Load objectives likewise.
- A comparison with a margin asks for non-inferiority on the same items: it passes when the whole interval of the paired
  difference reaches -margin, and fails when the candidate is shown to be worse, that is when the whole interval lies
  below 0 without reaching -margin. A negative margin asks to be better by that much, and is judged as a floor is. Without
  an incumbent it doesn't apply and passes, saying so.
- A slice fails when it is shown to be worse by more than its margin, and passes otherwise, saying what could go unseen.
- Failed requests and must-pass prompts are judged as counted: over the limit fails. A failed request has also scored 0; where
  another system failed too often, nothing is compared with it: inconclusive.
- Holdout items that share the value of gate.cluster_by count as one draw; fewer than MIN_CLUSTERS effective groups decide nothing.
- The verdict fails if any check fails, is inconclusive if any is, and passes only if all pass. Metrics and judges are one
  family of questions and each slice check is one, see pipeline.gate.decide; load objectives stand alone. A check that is
  advisory or an allowed regression, failed or open, doesn't count.
- A policy of which no quality check applies is never passed.

The intervals are computed here from the items, at the policy's confidence, never taken from a report. Greedy
answers differ a little with batching; two evaluations of one model are not always equal, and that isn't in
the intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from pipeline.artifacts import (
    Check,
    Interval,
    Item,
    Outcome,
    Reports,
    Verdict,
)
from pipeline.config.gate import GateConfig, MetricCheck, SliceCheck
from pipeline.digests import digest_of
from pipeline.errors import GateFailed
from pipeline.evaluation import scoring, slices
from pipeline.gate import load
from pipeline.gate import policy as gate_policy
from pipeline.gate.decide import Question, decide
from pipeline.intervals.groups import effective_groups
from pipeline.intervals.scores import difference_interval, mean_interval

ADVISORY = "advisory"
NO_INCUMBENT = "no incumbent yet"
MIN_CLUSTERS = 30  # effective ones; on fewer, 3 to 4 % of candidates on the edge pass instead of 2.5 %
MAX_UNJUDGED = 0.05  # share of items without a usable answer of an LLM judge


def judge(reports: Reports, policy: GateConfig, unit_digest: str) -> Verdict:
    """Judge the candidate.

    Raises GateFailed when the reports can't be judged by this policy: a metric, level or system that isn't
    there, other items than the candidate's, or another served unit than `unit_digest`. All such problems at
    once.
    """
    if problems := list(gate_policy.unfit(reports, policy, unit_digest)):
        raise GateFailed(problems)
    candidate = reports.evaluations["candidate"]
    quality = _waive(_quality_checks(reports, policy), policy)
    checks = [
        *_policy_checks(quality),
        _items_check(candidate.items, policy),
        *_clusters_checks(candidate.items, policy),
        load.errors_check("evaluation", candidate.errors, len(candidate.items), policy),
        *_others_errors(reports, policy),
        *load.errors(reports.loadtests, policy),
        *_waive(_prompt_checks(reports, policy), policy),
        *quality,
        *_waive(list(load.objectives(reports.loadtests, policy)), policy),
    ]
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
    """Mark the regressions that the policy allows. What is waived is a result: too little evidence is never allowed."""
    reasons = {allowed.check: allowed.reason for allowed in policy.allowed_regressions}
    return [
        check.model_copy(update={"waived": f"allowed: {reasons[check.name]}"})
        if check.name in reasons and check.outcome != "pass"
        else check
        for check in checks
    ]


def _policy_checks(quality: Sequence[Check]) -> list[Check]:
    """An inconclusive check where no check of quality applies and counts, so that nothing passes unexamined."""
    if any(check.estimate is not None and not check.waived for check in quality):
        return []
    return [
        Check(
            name="policy",
            outcome="inconclusive",
            estimate=None,
            threshold=1,
            rule="quality checks that apply and count >= 1",
            why="none does, without an incumbent or at all: add one to gate.metrics with min, or against: base",
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
    """That there are enough groups, and none too large, for intervals made from groups."""
    if policy.cluster_by is None:
        return []
    named = scoring.groups(items, policy.cluster_by) or []
    effective = effective_groups(named)
    found = f"{len(items)} items come in {len(set(named))} groups"
    uneven = (
        f" of unequal size, which count as {effective:.1f} effective groups"
        if effective < len(set(named)) - 0.05
        else ""
    )
    return [
        Check(
            name="groups",
            outcome="inconclusive" if effective < MIN_CLUSTERS else "pass",
            estimate=None,
            threshold=MIN_CLUSTERS,
            rule=f"effective groups by {policy.cluster_by} >= {MIN_CLUSTERS}",
            why=found + uneven,
        )
    ]


def _others_errors(reports: Reports, policy: GateConfig) -> Iterator[Check]:
    """That the systems which the candidate is held against answered: a request that failed lowers their scores."""
    for name in gate_policy.others(policy):
        if name not in reports.evaluations:
            continue
        found = reports.evaluations[name]
        check = load.errors_check(f"evaluation of {name}", found.errors, len(found.items), policy)
        again = f"{check.why}: measure it again before anything is held against it (tunegate run CONFIG --again)"
        yield check if check.outcome == "pass" else check.model_copy(update={"outcome": "inconclusive", "why": again})


def _prompt_checks(reports: Reports, policy: GateConfig) -> list[Check]:
    """Must-pass prompts as counted: all of them, or those that the incumbent doesn't break as well."""
    ours = reports.prompts.get("candidate", ())
    if not ours:
        return []
    broken = {result.id for result in ours if result.broken}
    old = broken & {result.id for result in reports.prompts.get("incumbent", ()) if result.broken}
    new = broken - old
    counted = new if policy.prompts == "no_regression" else broken
    which = "that the incumbent doesn't break" if policy.prompts == "no_regression" else "of all"
    told = (
        f"{len(new)} broken that the incumbent doesn't break, {len(old)} that it does" if broken else "none is broken"
    )
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
    """All that is judged by an interval over items; what doesn't apply passes where it stands.

    Metrics and judges are looked at together, and so are the parts of each slice check: another part more makes no other
    question harder.
    """
    metrics = [entry for check in policy.metrics for entry in _metric_questions(check, reports, policy)]
    families = [[*metrics, *_judge_questions(reports, policy)]]
    families += [list(_slice_questions(check, reports, policy)) for check in policy.slices]
    return [check for family in families for check in _decided(family, policy)]


def _decided(family: Sequence[Question | Check], policy: GateConfig) -> Iterator[Check]:
    asked = [entry for entry in family if isinstance(entry, Question)]
    in_slices = all(question.reach is None for question in asked)  # they have a least number of items of their own
    answers = iter(decide(asked, policy.confidence, 1 if in_slices else policy.min_items))
    for entry in family:
        yield entry if isinstance(entry, Check) else next(answers)


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
    reach = 0.0 - check.margin
    rule = f"{check.metric} - {check.against} >= {reach:g}"
    if check.against not in reports.evaluations:
        yield _not_applicable(name, rule, reach)
        return
    yield Question(
        name=name,
        rule=rule,
        estimate=partial(_gap, reports, check.against, check.metric, policy),
        reach=reach,
        broken=max(0.0, reach),
        items=_counted(reports, check.metric),
        waived=waived,
    )


def _level(reports: Reports, metric: str, policy: GateConfig, confidence: float) -> Interval:
    task = gate_policy.task_result(reports.tasks.get("candidate", ()), metric)
    if task is not None:
        return mean_interval(task.values, confidence)
    return scoring.metric(reports.evaluations["candidate"].items, metric, confidence, policy.cluster_by)


def _gap(reports: Reports, other: str, metric: str, policy: GateConfig, confidence: float) -> Interval:
    task = gate_policy.task_result(reports.tasks.get("candidate", ()), metric)
    if task is not None:
        theirs = gate_policy.task_result(reports.tasks[other], metric)
        assert theirs is not None  # noqa: S101 - gate_policy.unfit looked
        return difference_interval(task.values, theirs.values, confidence)
    ours, against = reports.evaluations["candidate"].items, reports.evaluations[other].items
    return scoring.difference(ours, against, metric, confidence, policy.cluster_by)


def _counted(reports: Reports, metric: str) -> int:
    """How many items a metric rests on."""
    task = gate_policy.task_result(reports.tasks.get("candidate", ()), metric)
    items = reports.evaluations["candidate"].items
    return len(task.values) if task else sum(metric in item.scores for item in items) or len(items)


def _not_applicable(name: str, rule: str, threshold: float) -> Check:
    return Check(name=name, outcome="pass", estimate=None, threshold=threshold, rule=rule, why=NO_INCUMBENT)


def _slice_questions(check: SliceCheck, reports: Reports, policy: GateConfig) -> Iterator[Question | Check]:
    """One question a part of the holdout: is it shown to be worse by more than the margin?"""
    other, broken = check.against, 0.0 - check.margin
    rule = f"{check.metric} - {other} not shown to be below {broken:g}"
    whole = f"{check.metric} vs {other} by {check.by}"
    if other not in reports.evaluations:
        yield _not_applicable(whole, rule, broken)
        return
    named = check.metric if check.metric != scoring.F1_MACRO else "accuracy"
    pairs = [
        pair
        for pair in zip(reports.evaluations["candidate"].items, reports.evaluations[other].items, strict=True)
        if named in pair[0].scores
    ]
    parts = slices.split([ours for ours, _ in pairs], check.by, check.min_items)
    small = 0
    for part, chosen in parts.items():
        mine, against = [pairs[index][0] for index in chosen], [pairs[index][1] for index in chosen]
        draws = effective_groups(scoring.groups(mine, policy.cluster_by) or [])
        if len(chosen) < check.min_items or (policy.cluster_by and draws < MIN_CLUSTERS):
            small += len(chosen)
            continue
        yield Question(
            name=f"{check.metric} vs {other} where {check.by}={part}",
            rule=rule,
            estimate=partial(scoring.difference, mine, against, check.metric, cluster_by=policy.cluster_by),
            reach=None,
            broken=broken,
            items=len(chosen),
        )
    if small:
        yield _too_small(whole, rule, broken, small, len(pairs))


def _too_small(name: str, rule: str, threshold: float, small: int, items: int) -> Check:
    """What is said of parts that aren't judged; where all of them are so small, the check is open."""
    outcome: Outcome = "inconclusive" if small == items else "pass"
    why = f"{small} of {items} items are in parts too small to be judged"
    return Check(name=name, outcome=outcome, estimate=None, threshold=threshold, rule=rule, why=why)


def _judge_questions(reports: Reports, policy: GateConfig) -> Iterator[Question | Check]:
    """Floors for an LLM judge's win rate; too many items that it gave no usable answer to leave the floor open."""
    for check in policy.judges:
        name, rule = f"judge vs {check.against}", f"win rate over {check.against} >= {check.min:g}"
        if check.against not in reports.evaluations:
            yield _not_applicable(name, rule, check.min)
            continue
        found = next(report for report in reports.judged if report.against == check.against)
        asked = len(found.items) + found.failed
        if not found.items or found.failed > MAX_UNJUDGED * asked:
            why = f"the judge gave no usable answer to {found.failed} of {asked} items"
            yield Check(name=name, outcome="inconclusive", estimate=None, threshold=check.min, rule=rule, why=why)
            continue
        judged = {judgement.id: judgement.score for judgement in found.items}
        items = [item for item in reports.evaluations["candidate"].items if item.id in judged]
        scores, groups = [judged[item.id] for item in items], scoring.groups(items, policy.cluster_by)
        yield Question(
            name=name,
            rule=rule,
            estimate=partial(mean_interval, scores, groups=groups),
            reach=check.min,
            broken=check.min,
            items=len(scores),
        )
