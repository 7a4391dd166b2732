"""Whether a policy's checks can be measured: problems before anything runs, and again before a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pipeline.artifacts import Evaluation, Item, Reports, TaskResult
from pipeline.config.gate import GateConfig
from pipeline.config.schema import EvaluateConfig, LoadtestConfig
from pipeline.errors import Problem
from pipeline.evaluation import scoring, slices
from pipeline.intervals.load import ENOUGH_REPEATS, requests_needed


def problems(
    policy: GateConfig, evaluate: EvaluateConfig, loadtest: LoadtestConfig, columns: Sequence[str] | None = None
) -> list[Problem]:
    """Checks of a policy that evaluation and load test won't be able to measure; called before anything runs.

    `columns` are those that holdout rows keep; None where nobody can tell yet.
    """
    return [
        *_unmeasurable(policy, evaluate),
        *_ambiguous(policy),
        *unknown_checks(policy),
        *_unkept_columns(policy, columns),
        *_too_few_items(policy, evaluate),
        *_load_problems(policy, loadtest.max_concurrency),
        *_too_few_requests(policy, loadtest),
        *_too_few_repeats(policy, loadtest),
    ]


def _unmeasurable(policy: GateConfig, evaluate: EvaluateConfig) -> Iterator[Problem]:
    """Metrics, systems and judges that the config doesn't ask for."""
    names = scoring.names_measured(evaluate.scorers)
    for key, metric, against in compared(policy):
        if not (scoring.is_measured(metric, evaluate.scorers) or _may_be_a_tasks(key, metric, evaluate)):
            yield _absent(f"{key}.metric", metric, names, "evaluate.scorers")
        if against == "base" and "base" not in evaluate.compare:
            yield _absent(f"{key}.against", "base", list(evaluate.compare), "evaluate.compare")
    for index, judge in enumerate(policy.judges):
        systems = [entry.against for entry in evaluate.judges]
        if judge.against not in systems:
            yield _absent(f"gate.judges[{index}].against", judge.against, systems, "evaluate.judges")


def _ambiguous(policy: GateConfig) -> Iterator[Problem]:
    """Two checks of one name: an allowed regression would mean both."""
    names = [*_names(policy)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(
            f"two checks are called {name!r}",
            key="gate",
            allowed="a floor, and a comparison with each system, once for each metric",
            remedy="drop one of them",
        )


def unfit(reports: Reports, policy: GateConfig, unit_digest: str) -> Iterator[Problem]:
    """Why the policy can't be applied to these reports, if so."""
    evaluations = reports.evaluations
    if "candidate" not in evaluations or not evaluations["candidate"].items:
        yield Problem("the candidate was not evaluated", remedy="run the evaluate stage, then the gate again")
        return
    candidate, loadtest = evaluations["candidate"], reports.loadtests.get("candidate")
    for report in (candidate, loadtest):
        if report is not None and report.unit_digest != unit_digest:
            units = f"of the served unit {report.unit_digest[:12]}, not {unit_digest[:12]}"
            yield Problem(
                f"the candidate's {type(report).__name__} is {units}",
                remedy="evaluate and load-test the unit that is to be registered: tunegate run CONFIG --again",
            )
    yield from _unmeasured(reports, policy)
    yield from _without_judgements(reports, policy)
    yield from unknown_checks(policy)
    for name in compared_systems(policy):
        if name in evaluations:
            yield from _unpaired(candidate, evaluations[name])
    yield from _absent_columns(candidate.items, policy)
    sizes = [level.max_concurrency for level in loadtest.levels] if loadtest else []
    yield from _load_problems(policy, sizes)


def unknown_checks(policy: GateConfig) -> Iterator[Problem]:
    """Allowed regressions whose name isn't that of a possible check of this policy."""
    names = [*_names(policy), *(f"{name}…" for name in _slices(policy))]
    for index, regression in enumerate(policy.allowed_regressions):
        if regression.check not in names and not regression.check.startswith(tuple(_slices(policy))):
            yield Problem(
                f"{regression.check!r} is not a check of this policy",
                key=f"gate.allowed_regressions[{index}].check",
                allowed=", ".join(names),
                remedy="name a check as the gate's table does, or drop the entry",
            )


def _names(policy: GateConfig) -> Iterator[str]:
    """The names of a policy's checks, without the parts of slices."""
    yield "must-pass prompts"
    for check in policy.metrics:
        yield from [check.metric] if check.min is not None else []
        yield from [f"{check.metric} vs {check.against}"] if check.against else []
    yield from (f"{part.metric} vs {part.against} by {part.by}" for part in policy.slices)
    yield from (f"judge vs {judge.against}" for judge in policy.judges)
    yield from (f"{load.metric} at {load.max_concurrency}" for load in policy.load)


def _slices(policy: GateConfig) -> list[str]:
    """The beginnings of the names of slices' parts."""
    return [f"{part.metric} vs {part.against} where {part.by}=" for part in policy.slices]


def task_result(results: Sequence[TaskResult], metric: str) -> TaskResult | None:
    """The lm-eval result that a metric's name TASK/METRIC means, if it is one."""
    return next((result for result in results if f"{result.task}/{result.metric}" == metric), None)


def _may_be_a_tasks(key: str, metric: str, evaluate: EvaluateConfig) -> bool:
    """Whether a check's metric may be TASK/METRIC: which tasks a group, tag or folder holds is known when lm-eval loads it."""
    return key.startswith("gate.metrics") and bool(evaluate.tasks) and "/" in metric


def compared(policy: GateConfig) -> Iterator[tuple[str, str, str | None]]:
    """Key, metric and the other system of every check of a score."""
    for index, check in enumerate(policy.metrics):
        yield f"gate.metrics[{index}]", check.metric, check.against
    for index, part in enumerate(policy.slices):
        yield f"gate.slices[{index}]", part.metric, part.against


def compared_systems(policy: GateConfig) -> list[str]:
    """The systems that the candidate is compared with, by scores or by an LLM judge."""
    by_scores = {against for _, _, against in compared(policy) if against}
    return sorted(by_scores | {judge.against for judge in policy.judges})


def _absent(key: str, metric: str, present: Sequence[str], where: str) -> Problem:
    return Problem(
        f"{metric} is not measured",
        key=key,
        allowed=", ".join(present) or "nothing",
        remedy=f"add it to {where}, or drop the check",
    )


def _unkept_columns(policy: GateConfig, columns: Sequence[str] | None) -> Iterator[Problem]:
    """Columns that group or slice items, although no holdout row will have them."""
    for key, name in _columns_of(policy):
        of_answer = key != "gate.cluster_by" and name.partition(".")[0] == slices.EXPECTED
        if columns is not None and name not in columns and not of_answer:
            yield Problem(
                f"{name} isn't among the columns that holdout rows keep",
                key=key,
                allowed=", ".join(columns) or "no column is kept",
                remedy=f"add {name} to data.columns",
            )


def _columns_of(policy: GateConfig) -> Iterator[tuple[str, str]]:
    """Key and name of each column or field that groups or slices items."""
    yield from ((f"gate.slices[{index}].by", check.by) for index, check in enumerate(policy.slices))
    if policy.cluster_by:
        yield "gate.cluster_by", policy.cluster_by


def _too_few_items(policy: GateConfig, evaluate: EvaluateConfig) -> Iterator[Problem]:
    """Limits on items that keep a check from passing, however large the holdout is."""
    gated_systems = [judge.against for judge in policy.judges]
    for index, judge in enumerate(evaluate.judges):
        if judge.against in gated_systems and judge.max_items < policy.min_items:
            yield Problem(
                f"gate.min_items is {policy.min_items} and this judge sees {judge.max_items} items: its check can't pass",
                key=f"evaluate.judges[{index}].max_items",
                allowed=f"{policy.min_items} or more",
                remedy=f"set max_items: {policy.min_items}, or lower gate.min_items",
            )
    if evaluate.max_items is not None and evaluate.max_items < policy.min_items:
        yield Problem(
            f"{policy.min_items} scored items must be there and evaluate.max_items is {evaluate.max_items}: no check can pass",
            key="gate.min_items",
            allowed=f"at most evaluate.max_items, {evaluate.max_items}",
            remedy=f"set evaluate.max_items: {policy.min_items} or more, or lower gate.min_items",
        )


def _unmeasured(reports: Reports, policy: GateConfig) -> Iterator[Problem]:
    """Metrics and systems of the policy that the reports lack."""
    ours = reports.tasks.get("candidate", ())
    names = [
        *scoring.metric_names(reports.evaluations["candidate"].items),
        *(f"{result.task}/{result.metric}" for result in ours),
    ]
    for key, metric, against in compared(policy):
        if metric not in names:
            yield _absent(f"{key}.metric", metric, names, "evaluate.scorers")
        if against == "base" and "base" not in reports.evaluations:
            yield _absent(f"{key}.against", "base", sorted(reports.evaluations), "evaluate.compare")
        result = task_result(ours, metric)
        if result is not None:
            yield from _unfit_task(key, result, against, reports)


def _without_judgements(reports: Reports, policy: GateConfig) -> Iterator[Problem]:
    """Systems of gate.judges without an LLM judge's report."""
    present = [report.against for report in reports.judged]
    for index, check in enumerate(policy.judges):
        if check.against in reports.evaluations and check.against not in present:
            yield _absent(
                f"gate.judges[{index}].against", f"the candidate against {check.against}", present, "evaluate.judges"
            )


def _unfit_task(key: str, result: TaskResult, against: str | None, reports: Reports) -> Iterator[Problem]:
    """Why an lm-eval result can't be gated: it isn't a share of right answers, or the other system's isn't paired."""
    name = f"{result.task}/{result.metric}"
    if not result.higher_is_better or not all(0 <= value <= 1 for value in result.values):
        yield Problem(
            f"{name} is not a score from 0 to 1 with 1 the best",
            key=f"{key}.metric",
            allowed="a metric such as acc or exact_match",
            remedy="choose another metric of the task, or drop the check",
        )
    if against in reports.evaluations:
        theirs = task_result(reports.tasks.get(against or "", ()), name)
        if theirs is None or theirs.ids != result.ids:
            yield Problem(
                f"{name} was not measured on the same documents for {against}",
                key=f"{key}.against",
                remedy="run both again: tunegate run CONFIG --again",
            )


def _absent_columns(items: Sequence[Item], policy: GateConfig) -> Iterator[Problem]:
    """Columns that group or slice items, although items lack them."""
    for key, name in _columns_of(policy):
        without = sum(
            slices.value_of(item, name) is None if key != "gate.cluster_by" else name not in item.columns
            for item in items
        )
        if without == len(items) or (without and key == "gate.cluster_by"):
            yield Problem(
                f"{name} is missing in {without} of {len(items)} items",
                key=key,
                allowed=", ".join(sorted({column for item in items for column in item.columns})) or "no column is kept",
                remedy=f"add {name} to data.columns, then run again",
            )


def _load_problems(policy: GateConfig, sizes: Sequence[int]) -> Iterator[Problem]:
    for index, load in enumerate(policy.load):
        if load.max_concurrency not in sizes:
            key, levels = f"gate.load[{index}].max_concurrency", [str(size) for size in sizes]
            yield _absent(key, str(load.max_concurrency), levels, "loadtest.max_concurrency")


def _too_few_requests(policy: GateConfig, loadtest: LoadtestConfig) -> Iterator[Problem]:
    """Objectives on a tail that so few requests can't bound: such a check could fail but never pass."""
    requests = loadtest.num_prompts * loadtest.repeats
    for index, load in enumerate(policy.load):
        percentile, latency, *_ = load.metric.split("_")
        if load.max is None or latency not in ("ttft", "e2el"):
            continue
        least = requests_needed(int(percentile[1:]) / 100, policy.confidence)
        if requests < least:
            prompts = math.ceil(least / loadtest.repeats)
            yield Problem(
                f"{load.metric} can't be bounded by {requests} requests a level",
                key=f"gate.load[{index}].metric",
                allowed=f"at least {least} requests: loadtest.num_prompts times loadtest.repeats",
                remedy=f"set loadtest.num_prompts: {prompts}, or gate a lower percentile",
            )


def _too_few_repeats(policy: GateConfig, loadtest: LoadtestConfig) -> Iterator[Problem]:
    """Objectives on too few runs to pass."""
    if policy.load and loadtest.repeats < ENOUGH_REPEATS:
        yield Problem(
            f"objectives of gate.load can't pass on {loadtest.repeats} runs a level: they don't show how runs differ",
            key="loadtest.repeats",
            allowed=f"{ENOUGH_REPEATS} or more",
            remedy=f"set loadtest.repeats: {ENOUGH_REPEATS}, or drop gate.load",
        )


def _unpaired(candidate: Evaluation, rival: Evaluation) -> Iterator[Problem]:
    """Why two evaluations aren't paired, if so."""
    remedy = f"evaluate {rival.system} again on the candidate's holdout"
    if candidate.holdout_digest != rival.holdout_digest:
        digests = f"{candidate.holdout_digest[:12]} and {rival.holdout_digest[:12]}"
        yield Problem(f"candidate and {rival.system} were scored on different holdouts ({digests})", remedy=remedy)
    ours, theirs = [item.id for item in candidate.items], [item.id for item in rival.items]
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))
        difference = f"{len(odd)} ids are in one only, such as {odd[0]}" if odd else "their order differs"
        yield Problem(f"candidate and {rival.system} were not scored on the same items: {difference}", remedy=remedy)
    elif any(mine.scores.keys() != its.scores.keys() for mine, its in zip(candidate.items, rival.items, strict=True)):
        yield Problem(f"candidate and {rival.system} were not scored by the same scorers", remedy=remedy)
