"""The gate: a pure function from reports and policy to pass, fail or inconclusive, with intervals.

How it decides:
- A floor passes when the whole interval reaches it and fails when the whole interval lies below; else it is
  inconclusive, and `why` says about how many items would decide. Load objectives likewise.
- A comparison with a margin asks for non-inferiority on the same items: it passes when the whole interval of the paired
  difference reaches -margin, and fails when the candidate is shown to be worse, that is when the whole interval lies
  below 0 without reaching -margin. A negative margin asks to be better by that much, and is decided as a floor is. Without
  an incumbent it doesn't apply and passes, saying so.
- A slice fails when it is shown to be worse by more than its margin, and passes otherwise, saying what could go unseen.
- Failed requests and must-pass prompts are decided as counted: over the limit fails. A failed request has also scored 0; where
  another system failed too often, nothing is compared with it: inconclusive.
- Holdout items that share the value of gate.cluster_by count as one draw; fewer than MIN_CLUSTERS effective groups decide nothing.
- The verdict fails if any check fails, is inconclusive if any is, and passes only if all pass. Metrics and LLM judges are one
  family of questions and each slice check is one, see pipeline.gate.decide; load objectives stand alone. A check that is
  advisory or an allowed regression, failed or open, doesn't count.
- A policy of which no quality check applies is never passed.

The intervals are computed here from the items, at the policy's confidence, never taken from a report. Limits: greedy answers differ
a little with batching, so two evaluations of one model are not always equal; the intervals don't include that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from pipeline.artifacts import Check, Interval, Item, Outcome, Reports, Verdict
from pipeline.config.gate import GateConfig, MetricCheck, SliceCheck
from pipeline.digests import digest_of
from pipeline.errors import GateFailed
from pipeline.evaluation import scorers, scoring, slices
from pipeline.gate import load
from pipeline.gate import policy as gate_policy
from pipeline.gate.decide import Question, decide
from pipeline.intervals.groups import effective_groups
from pipeline.intervals.scores import difference_interval, mean_interval

ADVISORY = "advisory"
NO_INCUMBENT = "no incumbent yet"
MIN_CLUSTERS = 30  # effective ones; on fewer, 3 to 4 % of candidates on the edge pass instead of 2.5 %
MAX_UNJUDGED = 0.05  # share of items without a usable answer of an LLM judge


def verdict_of(reports: Reports, policy: GateConfig, unit_digest: str) -> Verdict:
    """The verdict on the candidate.

    Raises GateFailed when the policy can't be applied to the reports: a metric, level or system isn't there, items differ from the
    candidate's, or the served unit isn't `unit_digest`. All such problems at once.
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
        *_errors_of_compared(reports, policy),
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
    """Mark the regressions that the policy allows. Only checks with a name of the policy can be waived: too little evidence never is."""
    reasons = {regression.check: regression.reason for regression in policy.allowed_regressions}
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
    """Whether there are enough groups, and none too large, for intervals made from groups."""
    if policy.cluster_by is None:
        return []
    groups = scoring.groups(items, policy.cluster_by) or []
    effective = effective_groups(groups)
    sizes = f"{len(items)} items come in {len(set(groups))} groups"
    uneven = (
        f" of unequal size, which count as {effective:.1f} effective groups"
        if effective < len(set(groups)) - 0.05
        else ""
    )
    return [
        Check(
            name="groups",
            outcome="inconclusive" if effective < MIN_CLUSTERS else "pass",
            estimate=None,
            threshold=MIN_CLUSTERS,
            rule=f"effective groups by {policy.cluster_by} >= {MIN_CLUSTERS}",
            why=sizes + uneven,
        )
    ]


def _errors_of_compared(reports: Reports, policy: GateConfig) -> Iterator[Check]:
    """Whether the systems that the candidate is compared with answered: a failed request lowers their scores."""
    for name in gate_policy.compared_systems(policy):
        if name not in reports.evaluations:
            continue
        evaluation = reports.evaluations[name]
        check = load.errors_check(f"evaluation of {name}", evaluation.errors, len(evaluation.items), policy)
        again = f"{check.why}: measure it again before anything is held against it (tunegate run CONFIG --again)"
        yield check if check.outcome == "pass" else check.model_copy(update={"outcome": "inconclusive", "why": again})


def _prompt_checks(reports: Reports, policy: GateConfig) -> list[Check]:
    """Must-pass prompts as counted: all broken ones, or those that the incumbent doesn't break as well."""
    ours = reports.prompts.get("candidate", ())
    if not ours:
        return []
    broken_ids = {prompt.id for prompt in ours if prompt.broken}
    old = broken_ids & {prompt.id for prompt in reports.prompts.get("incumbent", ()) if prompt.broken}
    new = broken_ids - old
    regressions_only = policy.prompts == "no_regression"
    faults = new if regressions_only else broken_ids
    scope = "that the incumbent doesn't break" if regressions_only else "of all"
    split = f"{len(new)} broken that the incumbent doesn't break, {len(old)} that it does"
    return [
        Check(
            name="must-pass prompts",
            outcome="fail" if faults else "pass",
            estimate=None,
            threshold=0,
            rule=f"broken prompts {scope} <= 0, as counted",
            why=f"{split if broken_ids else 'none is broken'}, of {len(ours)}"
            + (f": {', '.join(sorted(faults)[:5])}" if faults else ""),
        )
    ]


def _quality_checks(reports: Reports, policy: GateConfig) -> list[Check]:
    """All checks that are decided by an interval over items; a check that doesn't apply passes in its place.

    Metrics and LLM judges are one family, and the parts of each slice check are one: a further part makes no other question
    harder. Slices have a least number of items of their own.
    """
    metrics = [entry for check in policy.metrics for entry in _metric_questions(check, reports, policy)]
    checks = _decided([*metrics, *_judge_questions(reports, policy)], policy, policy.min_items)
    for part in policy.slices:
        checks += _decided([*_slice_questions(part, reports, policy)], policy, min_items=1)
    return checks


def _decided(family: Sequence[Question | Check], policy: GateConfig, min_items: int) -> list[Check]:
    """The family's checks in order, each question decided."""
    questions = [entry for entry in family if isinstance(entry, Question)]
    checks = iter(decide(questions, policy.confidence, min_items))
    return [entry if isinstance(entry, Check) else next(checks) for entry in family]


def _metric_questions(check: MetricCheck, reports: Reports, policy: GateConfig) -> Iterator[Question | Check]:
    """The floor and the comparison that a metric's check asks for."""
    reason = "" if check.required else ADVISORY
    if check.min is not None:
        yield Question(
            name=check.metric,
            kind="reach",
            rule=f"{check.metric} >= {check.min:g}",
            estimate=partial(_level, reports, check.metric, policy),
            threshold=check.min,
            fails_below=check.min,
            items=_counted(reports, check.metric),
            waived=reason,
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
        kind="reach",
        rule=rule,
        estimate=partial(_gap, reports, check.against, check.metric, policy),
        threshold=reach,
        fails_below=max(0.0, reach),
        items=_counted(reports, check.metric),
        waived=reason,
    )


def _level(reports: Reports, metric: str, policy: GateConfig, confidence: float) -> Interval:
    task = gate_policy.task_result(reports.tasks.get("candidate", ()), metric)
    if task is not None:
        return mean_interval(task.values, confidence)
    return scoring.metric(reports.evaluations["candidate"].items, metric, confidence, policy.cluster_by)


def _gap(reports: Reports, against: str, metric: str, policy: GateConfig, confidence: float) -> Interval:
    task = gate_policy.task_result(reports.tasks.get("candidate", ()), metric)
    if task is not None:
        theirs = gate_policy.task_result(reports.tasks[against], metric)
        assert theirs is not None  # noqa: S101 - gate_policy.unfit looked
        return difference_interval(task.values, theirs.values, confidence)
    ours, others = reports.evaluations["candidate"].items, reports.evaluations[against].items
    return scoring.difference(ours, others, metric, confidence, policy.cluster_by)


def _counted(reports: Reports, metric: str) -> int:
    """How many items a metric rests on."""
    task = gate_policy.task_result(reports.tasks.get("candidate", ()), metric)
    items = reports.evaluations["candidate"].items
    return len(task.values) if task else sum(metric in item.scores for item in items) or len(items)


def _not_applicable(name: str, rule: str, threshold: float) -> Check:
    return Check(name=name, outcome="pass", estimate=None, threshold=threshold, rule=rule, why=NO_INCUMBENT)


def _slice_questions(check: SliceCheck, reports: Reports, policy: GateConfig) -> Iterator[Question | Check]:
    """One question a part of the holdout: is it shown to be worse by more than the margin?"""
    against, limit = check.against, 0.0 - check.margin
    rule = f"{check.metric} - {against} not shown to be below {limit:g}"
    whole = f"{check.metric} vs {against} by {check.by}"
    if against not in reports.evaluations:
        yield _not_applicable(whole, rule, limit)
        return
    score = scorers.scored_by(check.metric)
    pairs = [
        pair
        for pair in zip(reports.evaluations["candidate"].items, reports.evaluations[against].items, strict=True)
        if score in pair[0].scores
    ]
    parts = slices.split([ours for ours, _ in pairs], check.by, check.min_items)
    small = 0
    for part, indices in parts.items():
        mine, theirs = [pairs[index][0] for index in indices], [pairs[index][1] for index in indices]
        draws = effective_groups(scoring.groups(mine, policy.cluster_by) or [])
        if len(indices) < check.min_items or (policy.cluster_by and draws < MIN_CLUSTERS):
            small += len(indices)
            continue
        yield Question(
            name=f"{check.metric} vs {against} where {check.by}={part}",
            kind="no_loss",
            rule=rule,
            estimate=partial(scoring.difference, mine, theirs, check.metric, cluster_by=policy.cluster_by),
            threshold=limit,
            fails_below=limit,
            items=len(indices),
        )
    if small:
        yield _too_small(whole, rule, limit, small, len(pairs))


def _too_small(name: str, rule: str, threshold: float, small: int, items: int) -> Check:
    """The check of parts that aren't decided; where all parts are so small, it is open."""
    outcome: Outcome = "inconclusive" if small == items else "pass"
    why = f"{small} of {items} items are in parts too small to decide"
    return Check(name=name, outcome=outcome, estimate=None, threshold=threshold, rule=rule, why=why)


def _judge_questions(reports: Reports, policy: GateConfig) -> Iterator[Question | Check]:
    """Floors for an LLM judge's win rate; too many items without a usable answer leave the floor open."""
    for check in policy.judges:
        name, rule = f"judge vs {check.against}", f"win rate over {check.against} >= {check.min:g}"
        if check.against not in reports.evaluations:
            yield _not_applicable(name, rule, check.min)
            continue
        report = next(report for report in reports.judged if report.against == check.against)
        total = len(report.items) + report.failed
        if not report.items or report.failed > MAX_UNJUDGED * total:
            why = f"the judge gave no usable answer to {report.failed} of {total} items"
            yield Check(name=name, outcome="inconclusive", estimate=None, threshold=check.min, rule=rule, why=why)
            continue
        score_of = {judgement.id: judgement.score for judgement in report.items}
        items = [item for item in reports.evaluations["candidate"].items if item.id in score_of]
        scores, groups = [score_of[item.id] for item in items], scoring.groups(items, policy.cluster_by)
        yield Question(
            name=name,
            kind="reach",
            rule=rule,
            estimate=partial(mean_interval, scores, groups=groups),
            threshold=check.min,
            fails_below=check.min,
            items=len(scores),
        )
