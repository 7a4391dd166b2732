from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.artifacts import (
    Evaluation,
    Interval,
    Item,
    Judgement,
    JudgeReport,
    LoadLevel,
    LoadTest,
    PromptResult,
    Reports,
    TaskResult,
)
from pipeline.config import file
from pipeline.config.gate import AllowedRegression, GateConfig, JudgeCheck, LoadCheck, MetricCheck, SliceCheck
from pipeline.config.schema import Scorer
from pipeline.errors import GateFailed
from pipeline.evaluation import scoring
from pipeline.gate import gate

UNIT = "u" * 64
CONFIGS = Path(__file__).parents[3] / "configs"


def evaluation(
    system: str, scores: list[float], *, errors: int = 0, metric: str = "exact_match", **fields
) -> Evaluation:
    items = tuple(
        Item(
            id=f"{number:04x}",
            prompt="?",
            expected="yes",
            answer="yes" if score else "no",
            finish_reason="stop",
            scores={metric: score},
        )
        for number, score in enumerate(scores)
    )
    known = {
        "unit_digest": UNIT,
        "holdout_digest": "h",
        "metrics": {},
        "errors": errors,
        "seconds": 1.0,
        "items": items,
    }
    return Evaluation(system=system, **{**known, **fields})


def hits(right: int, of: int) -> list[float]:
    return [1.0] * right + [0.0] * (of - right)


def loadtest(e2el: list[float], *, failed: int = 0, unit: str = UNIT, repeats: tuple[float, ...] = (0.98, 1.0, 1.02)):
    """A level whose runs were `repeats` times as slow as `e2el`, in milliseconds."""
    runs = [[value * factor for value in e2el] for factor in repeats]
    mean = sum(e2el) / len(e2el) if e2el else 0.0
    level = LoadLevel(
        max_concurrency=4,
        completed=sum(map(len, runs)),
        failed=failed,
        metrics={
            "p95_e2el_ms": tuple(sorted(run)[int(0.95 * len(run))] if run else 0.0 for run in runs),
            "request_throughput": tuple(4000 / max(mean * factor, 1) for factor in repeats),
        },
        samples={"e2el_ms": tuple(map(tuple, runs)), "output_tokens": tuple((8.0,) * len(run) for run in runs)},
    )
    return LoadTest(system="candidate", unit_digest=unit, levels=(level,))


def verdict_of(evaluations, loadtests, policy, unit=UNIT, **more):
    return gate.verdict_of(Reports(evaluations=evaluations, loadtests=loadtests, **more), policy, unit)


def outcome_of(verdict, name: str) -> str:
    return {check.name: check.outcome for check in verdict.checks}[name]


FLOOR = GateConfig(metrics=(MetricCheck(metric="exact_match", min=0.8),), min_items=100)


@pytest.mark.parametrize(
    ("right", "outcome"), [(180, "pass"), (168, "inconclusive"), (160, "inconclusive"), (140, "fail")]
)
def test_a_floor_is_decided_by_the_whole_interval(right, outcome):
    """Wilson's 95 % limits of 180, 168, 160 and 140 of 200 are 0.851, 0.783, 0.739 and 0.634 to 0.759."""
    verdict = verdict_of({"candidate": evaluation("candidate", hits(right, 200))}, {}, FLOOR, UNIT)
    assert outcome_of(verdict, "exact_match") == outcome == verdict.outcome


def test_an_inconclusive_floor_says_how_many_items_would_decide():
    """168 of 200 against 0.8: the named number of items at the same share passes."""
    verdict = verdict_of({"candidate": evaluation("candidate", hits(168, 200))}, {}, FLOOR, UNIT)
    why = next(check.why for check in verdict.checks if check.name == "exact_match")
    more = int(why.split("about ")[1].split()[0])
    total = int(1.1 * (200 + more))
    again = verdict_of({"candidate": evaluation("candidate", hits(round(0.84 * total), total))}, {}, FLOOR, UNIT)
    assert again.outcome == "pass"


def test_the_untrained_model_fails_the_policy_that_the_tuned_one_passes():
    """A base that answers 4 of 200 fails a floor and a comparison that 190 of 200 pass."""
    policy = GateConfig(
        metrics=(
            MetricCheck(metric="exact_match", min=0.8),
            MetricCheck(metric="exact_match", against="base", margin=-0.1),
        )
    )
    base = evaluation("base", hits(4, 200), unit_digest="other")
    tuned = verdict_of({"candidate": evaluation("candidate", hits(190, 200)), "base": base}, {}, policy, UNIT)
    untrained = verdict_of({"candidate": evaluation("candidate", hits(4, 200)), "base": base}, {}, policy, UNIT)
    assert tuned.outcome == "pass"
    assert untrained.outcome == "fail"
    assert outcome_of(untrained, "exact_match vs base") == "fail"


def test_chatter_of_a_corrupted_model_fails_every_quality_check():
    """A model that answers 'newnewnew' to everything is caught."""
    verdict = verdict_of({"candidate": evaluation("candidate", hits(0, 200))}, {}, FLOOR, UNIT)
    assert verdict.outcome == "fail"


@pytest.mark.parametrize(
    ("better", "worse", "margin", "outcome"),
    [
        (0, 0, 0.02, "pass"),
        (0, 0, 0.0, "inconclusive"),
        (30, 2, 0.0, "pass"),
        (2, 30, 0.02, "fail"),
        (0, 8, 0.05, "fail"),
        (0, 8, 0.1, "pass"),
        (5, 6, 0.02, "inconclusive"),
    ],
)
def test_a_comparison_is_paired_and_ties_do_not_prove_equality(better, worse, margin, outcome):
    """200 items; only discordant ones move the difference, and no discordant one leaves ±1.9 points open.

    8 lost and none gained is 1.6 to 7.7 points worse: a fail where 5 are allowed, a pass where 10 are.
    """
    ours, theirs = hits(100 + better, 200), hits(100, 200)
    ours[:worse] = [0.0] * worse
    policy = GateConfig(metrics=(MetricCheck(metric="exact_match", against="incumbent", margin=margin),))
    reports = {"candidate": evaluation("candidate", ours), "incumbent": evaluation("incumbent", theirs)}
    assert verdict_of(reports, {}, policy, UNIT).outcome == outcome


def test_pairing_decides_what_unpaired_intervals_would_not():
    """12 gained and none lost of 200: the Wilson intervals overlap, the paired difference is above 0."""
    reports = {
        "candidate": evaluation("candidate", hits(172, 200)),
        "incumbent": evaluation("incumbent", hits(160, 200)),
    }
    policy = GateConfig(metrics=(MetricCheck(metric="exact_match", against="incumbent"),))
    verdict = verdict_of(reports, {}, policy, UNIT)
    check = verdict.checks[-1]
    assert verdict.outcome == "pass"
    assert check.estimate.value == pytest.approx(0.06)
    assert 0.03 < check.estimate.low < 0.06 < check.estimate.high < 0.11


def test_without_an_incumbent_its_check_passes_and_says_so():
    """The first build has nobody to be compared with."""
    policy = GateConfig(metrics=(MetricCheck(metric="exact_match", min=0.8, against="incumbent"),))
    verdict = verdict_of({"candidate": evaluation("candidate", hits(195, 200))}, {}, policy, UNIT)
    check = next(check for check in verdict.checks if check.name == "exact_match vs incumbent")
    assert (check.outcome, check.why, verdict.outcome) == ("pass", "no incumbent yet", "pass")


def test_too_few_items_are_never_a_pass():
    """40 of 40 with min_items 100 is inconclusive and says that 60 are missing; a clear failure stays one."""
    good = verdict_of({"candidate": evaluation("candidate", hits(40, 40))}, {}, FLOOR, UNIT)
    bad = verdict_of({"candidate": evaluation("candidate", hits(0, 40))}, {}, FLOOR, UNIT)
    assert (good.outcome, bad.outcome) == ("inconclusive", "fail")
    assert next(check.why for check in good.checks if check.name == "items") == "40 items, 60 more are needed"


def test_failed_requests_fail_the_gate_as_counted():
    """One failed request of 200 breaks a limit of none and holds one of 1 %."""
    reports = {"candidate": evaluation("candidate", hits(190, 200), errors=1)}
    strict = verdict_of(reports, {}, FLOOR, UNIT)
    lax = verdict_of(reports, {}, FLOOR.model_copy(update={"max_error_rate": 0.01}), UNIT)
    assert (strict.outcome, lax.outcome) == ("fail", "pass")


@pytest.mark.parametrize("metrics", [(), (MetricCheck(metric="exact_match", against="incumbent"),)])
def test_a_policy_of_which_nothing_applies_passes_nothing(metrics):
    """No checks, or only ones against an incumbent that isn't there, can't say pass."""
    policy = GateConfig(metrics=metrics)
    verdict = verdict_of({"candidate": evaluation("candidate", hits(200, 200))}, {}, policy, UNIT)
    assert (verdict.outcome, outcome_of(verdict, "policy")) == ("inconclusive", "inconclusive")


LOAD = FLOOR.model_copy(update={"load": (LoadCheck(metric="p95_e2el_ms", max_concurrency=4, max=200.0),)})
GOOD = {"candidate": evaluation("candidate", hits(190, 200))}
STEADY = [float(100 + number % 50) for number in range(200)]


@pytest.mark.parametrize(
    ("latencies", "repeats", "outcome"),
    [
        (STEADY, (0.98, 1.0, 1.02), "pass"),
        ([value * 3 for value in STEADY], (0.98, 1.0, 1.02), "fail"),
        (STEADY, (0.7, 1.0, 1.8), "inconclusive"),
        (STEADY[:20], (0.98, 1.0, 1.02), "inconclusive"),
    ],
)
def test_a_load_objective_is_decided_by_how_runs_differ(latencies, repeats, outcome):
    """Clearly within, clearly beyond, runs that differ much, and too few requests to bound a tail."""
    verdict = verdict_of(GOOD, {"candidate": loadtest(latencies, repeats=repeats)}, LOAD, UNIT)
    assert outcome_of(verdict, "p95_e2el_ms at 4") == outcome


def test_one_run_never_passes_an_objective_and_can_fail_it():
    """A single run says nothing of the next, however many requests it had; far beyond the limit it is told at once."""
    good = verdict_of(GOOD, {"candidate": loadtest(STEADY, repeats=(1.0,))}, LOAD, UNIT)
    bad = verdict_of(GOOD, {"candidate": loadtest([value * 3 for value in STEADY], repeats=(1.0,))}, LOAD, UNIT)
    assert (good.outcome, bad.outcome) == ("inconclusive", "fail")
    assert "loadtest.repeats" in good.checks[-1].why


def test_too_few_requests_are_told_how_many_it_takes():
    """A 95th percentile needs 72 requests for an upper bound at 95 %."""
    verdict = verdict_of(GOOD, {"candidate": loadtest(STEADY[:20])}, LOAD, UNIT)
    assert "72 are needed" in verdict.checks[-1].why


def test_a_throughput_floor_is_decided_from_below():
    """33 requests/s hold a floor of 25 and break one of 45."""
    for floor, outcome in [(25.0, "pass"), (45.0, "fail")]:
        check = LoadCheck(metric="request_throughput", max_concurrency=4, min=floor)
        verdict = verdict_of(GOOD, {"candidate": loadtest(STEADY)}, FLOOR.model_copy(update={"load": (check,)}), UNIT)
        assert verdict.checks[-1].outcome == outcome


def test_a_level_on_which_nothing_finished_fails():
    """Zeros that bench writes for no answers are not fast answers."""
    verdict = verdict_of(GOOD, {"candidate": loadtest([], failed=20)}, LOAD, UNIT)
    assert verdict.checks[-1].outcome == "fail"
    assert outcome_of(verdict, "errors in load test") == "fail"


def test_reports_that_cannot_be_decided_are_refused_with_every_reason():
    """Another unit, items, holdout, an unknown metric and an unknown level: five problems at once."""
    policy = GateConfig(
        metrics=(MetricCheck(metric="exact_match", against="base"), MetricCheck(metric="f1_macro", min=0.5)),
        load=(LoadCheck(metric="p50_ttft_ms", max_concurrency=64, max=1.0),),
    )
    reports = {
        "candidate": evaluation("candidate", hits(9, 10), unit_digest="x" * 64),
        "base": evaluation("base", hits(1, 9), holdout_digest="h2"),
    }
    with pytest.raises(GateFailed) as error:
        verdict_of(reports, {"candidate": loadtest(STEADY)}, policy, UNIT)
    whole = str(error.value)
    assert len(error.value.problems) == 5
    for word in (
        "xxxxxxxxxxxx, not uuuuuuuuuuuu",
        "f1_macro is not measured",
        "different holdouts",
        "0009",
        "64 is not measured",
    ):
        assert word in whole


def test_the_same_reports_give_the_same_verdict():
    """Judging is pure."""
    graded = [0.25 * (number % 5) for number in range(150)]
    policy = GateConfig(metrics=(MetricCheck(metric="token_f1", min=0.4, against="base", margin=0.05),))
    reports = {
        "candidate": evaluation("candidate", graded, metric="token_f1"),
        "base": evaluation("base", graded[::-1], metric="token_f1"),
    }
    assert verdict_of(reports, {}, policy, UNIT) == verdict_of(reports, {}, policy, UNIT)


def test_more_right_answers_never_make_a_verdict_worse():
    """Over all counts of 120, the outcome climbs from fail through inconclusive to pass and never back."""
    order = ["fail", "inconclusive", "pass"]
    outcomes = [
        order.index(verdict_of({"candidate": evaluation("candidate", hits(right, 120))}, {}, FLOOR, UNIT).outcome)
        for right in range(0, 121, 3)
    ]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {0, 1, 2}


def test_surer_policies_decide_less():
    """What passes at 99 % passes at 90 %, and the interval is wider."""
    reports = {"candidate": evaluation("candidate", hits(172, 200))}
    sure, unsure = (
        verdict_of(reports, {}, FLOOR.model_copy(update={"confidence": level}), UNIT) for level in (0.99, 0.9)
    )
    assert (sure.outcome, unsure.outcome) == ("inconclusive", "pass")


def demo_evaluation(system: str, scorers: tuple[Scorer, ...], *, tuned: bool) -> Evaluation:
    """240 tickets answered rightly, or as an untrained model does."""
    truth = '{"category":"billing","priority":"high","product":"Orchid","entities":["INV-599"]}'
    answer = truth if tuned else "I'm sorry to hear that. I will look into your receipt."
    scores = scoring.item_scorer(scorers)(truth, answer)
    item = Item(id="", prompt="?", expected=truth, answer=answer, finish_reason="stop", scores=scores)
    items = tuple(item.model_copy(update={"id": f"{number:04x}"}) for number in range(240))
    return evaluation(system, [], items=items, unit_digest=UNIT if system == "candidate" else "other")


def test_the_demos_policy_passes_the_tuned_model_and_fails_the_untrained_one():
    """The policy of configs/demo.yaml as it is shipped, with the scorers it names."""
    config = file.load(CONFIGS / "demo.yaml")
    scorers, size = config.evaluate.scorers, config.gate.load[0].max_concurrency
    level = loadtest([100.0 + number for number in range(config.loadtest.num_prompts)]).levels[0]
    samples = {**level.samples, "ttft_ms": level.samples["e2el_ms"]}
    shown = {
        "max_concurrency": size,
        "samples": samples,
        "metrics": {config.gate.load[0].metric: (110.0, 111.0, 112.0)},
    }
    tests = {"candidate": LoadTest(system="candidate", unit_digest=UNIT, levels=(level.model_copy(update=shown),))}
    base = demo_evaluation("base", scorers, tuned=False)
    for tuned, outcome in ((True, "pass"), (False, "fail")):
        reports = {"base": base, "candidate": demo_evaluation("candidate", scorers, tuned=tuned)}
        assert verdict_of(reports, tests, config.gate, UNIT).outcome == outcome


def versus(ours: list[float], theirs: list[float], **fields) -> dict[str, Evaluation]:
    """Candidate and incumbent on the same items; a list in `fields` is a column."""
    columns = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    made = {"candidate": evaluation("candidate", ours), "incumbent": evaluation("incumbent", theirs)}
    if not columns:
        return made
    return {
        system: found.model_copy(
            update={
                "items": tuple(
                    item.model_copy(update={"columns": column})
                    for item, column in zip(found.items, columns, strict=True)
                )
            }
        )
        for system, found in made.items()
    }


NOT_WORSE = GateConfig(metrics=(MetricCheck(metric="exact_match", against="incumbent", margin=0.03),))


def test_a_loss_within_the_margin_is_no_failure_and_one_beyond_it_is():
    """1 of 900 lost is shown to be within three points; 27 lost are shown to be worse and not to be within."""
    small = verdict_of(versus(hits(799, 900), hits(800, 900)), {}, NOT_WORSE, UNIT)
    large = verdict_of(versus(hits(773, 900), hits(800, 900)), {}, NOT_WORSE, UNIT)
    assert (small.outcome, large.outcome) == ("pass", "fail")
    assert "isn't above -0.03" in large.checks[-1].why


def test_a_part_that_got_worse_fails_although_the_whole_did_not():
    """40 of 400 items are in German; 14 of them are lost, and as many won elsewhere."""
    language = ["de"] * 40 + ["en"] * 360
    ours, theirs = hits(26, 40) + hits(340, 360), hits(40, 40) + hits(326, 360)
    policy = GateConfig(
        metrics=(MetricCheck(metric="exact_match", min=0.5),),
        slices=(SliceCheck(by="language", metric="exact_match"),),
    )
    verdict = verdict_of(versus(ours, theirs, language=language), {}, policy, UNIT)
    by_name = {check.name: check for check in verdict.checks}
    assert by_name["exact_match vs incumbent where language=de"].outcome == "fail"
    assert by_name["exact_match vs incumbent where language=en"].outcome == "pass"
    assert verdict.outcome == "fail"
    even = verdict_of(versus(theirs, theirs, language=language), {}, policy, UNIT)
    assert even.outcome == "pass"
    assert "would miss a loss of up to" in even.checks[-1].why


def test_parts_too_small_to_judge_are_said_to_be():
    """Five items in Finnish, all lost, are no part and too few for a rest: they fail the whole or nothing."""
    language = ["fi"] * 5 + ["en"] * 395
    policy = GateConfig(
        metrics=(MetricCheck(metric="exact_match", min=0.5),),
        slices=(SliceCheck(by="language", metric="exact_match"),),
    )
    verdict = verdict_of(versus([0.0] * 5 + [1.0] * 395, [1.0] * 400, language=language), {}, policy, UNIT)
    check = next(check for check in verdict.checks if check.name.endswith("by language"))
    assert (check.outcome, check.why) == ("pass", "5 of 400 items are in parts too small to decide")


def test_a_slice_without_its_column_is_refused():
    """The remedy names data.columns."""
    policy = NOT_WORSE.model_copy(update={"slices": (SliceCheck(by="language", metric="exact_match"),)})
    with pytest.raises(GateFailed, match=r"add language to data\.columns"):
        verdict_of(versus(hits(90, 120), hits(90, 120)), {}, policy, UNIT)


def test_items_of_one_group_count_as_one_draw():
    """400 items of 40 customers whose items all go the same way: 4 customers lost prove less than 40 lost items."""
    theirs = [1.0] * 400
    ours = [0.0] * 40 + [1.0] * 360
    customers = [str(number // 10) for number in range(400)]
    alone = verdict_of(versus(ours, theirs, customer=customers), {}, NOT_WORSE, UNIT)
    grouped = verdict_of(
        versus(ours, theirs, customer=customers), {}, NOT_WORSE.model_copy(update={"cluster_by": "customer"}), UNIT
    )
    one, other = alone.checks[-1].estimate, grouped.checks[-1].estimate
    assert one.value == pytest.approx(other.value)
    assert other.high - other.low > 2.5 * (one.high - one.low)
    assert (alone.outcome, outcome_of(grouped, "groups")) == ("fail", "pass")


def test_few_groups_decide_nothing():
    """Ten customers are too few for an interval over customers."""
    customers = [str(number % 10) for number in range(200)]
    policy = NOT_WORSE.model_copy(update={"cluster_by": "customer"})
    verdict = verdict_of(versus(hits(200, 200), hits(100, 200), customer=customers), {}, policy, UNIT)
    assert (outcome_of(verdict, "groups"), verdict.outcome) == ("inconclusive", "inconclusive")


def test_one_dominating_group_decides_nothing():
    """Thirty customers of whom one has most items: what that one's items are like says little of another's."""
    customers = [*["large"] * 800, *(str(number % 29) for number in range(232))]
    policy = FLOOR.model_copy(update={"cluster_by": "customer"})
    slices = (SliceCheck(by="language", metric="exact_match"),)
    scores = [*hits(700, 800), *hits(190, 232)]
    verdict = verdict_of(versus(scores, scores, customer=customers), {}, policy, UNIT)
    groups = next(check for check in verdict.checks if check.name == "groups")
    assert (groups.outcome, verdict.outcome) == ("inconclusive", "inconclusive")
    assert groups.why == "1032 items come in 30 groups of unequal size, which count as 1.7 effective groups"
    sliced = versus(scores, scores, customer=customers, language=["de"] * 1032)
    verdict = verdict_of(sliced, {}, policy.model_copy(update={"slices": slices}), UNIT)
    assert outcome_of(verdict, "exact_match vs incumbent by language") == "inconclusive"


def test_a_worse_graded_answer_never_makes_a_verdict_better():
    """From a hundred full marks downwards, an answer at a time and each by a little, by half or wholly."""
    order = ["fail", "inconclusive", "pass"]
    policy = GateConfig(
        metrics=(
            MetricCheck(metric="token_f1", min=0.955),
            MetricCheck(metric="token_f1", against="incumbent", margin=0.045),
        )
    )
    for kept in (0.99, 0.5, 0.0):
        scores, outcomes = [1.0] * 100, []
        for number in range(0, 100, 4):
            found = {
                name: evaluation(name, found, metric="token_f1")
                for name, found in (("candidate", scores), ("incumbent", [1.0] * 100))
            }
            outcomes.append(order.index(verdict_of(found, {}, policy, UNIT).outcome))
            scores[number : number + 4] = [kept, kept, 0.0, kept]
        assert outcomes == sorted(outcomes, reverse=True)
        assert (outcomes[0], outcomes[-1]) == (2, 0)


def test_one_slightly_worse_answer_turns_nothing_into_a_pass():
    """A hundred full marks don't reach 0.99; ninety-nine of them and 0.99 don't either."""
    policy = GateConfig(metrics=(MetricCheck(metric="token_f1", min=0.99),))
    for last in (1.0, 0.99, 0.5):
        found = {"candidate": evaluation("candidate", [*hits(99, 99), last], metric="token_f1")}
        assert verdict_of(found, {}, policy, UNIT).outcome == "inconclusive"


def test_an_allowed_regression_is_shown_with_its_reason_and_does_not_count():
    """The check still says fail; a reason for a check that isn't there is refused."""
    allowed = AllowedRegression(check="exact_match vs incumbent", reason="the old labels were wrong")
    policy = GateConfig(
        metrics=(MetricCheck(metric="exact_match", min=0.5, against="incumbent"),), allowed_regressions=(allowed,)
    )
    verdict = verdict_of(versus(hits(150, 200), hits(190, 200)), {}, policy, UNIT)
    check = verdict.checks[-1]
    assert (check.outcome, check.waived, verdict.outcome) == ("fail", "allowed: the old labels were wrong", "pass")
    better = verdict_of(versus(hits(199, 200), hits(150, 200)), {}, policy, UNIT)
    assert not better.checks[-1].waived
    wrong = policy.model_copy(update={"allowed_regressions": (AllowedRegression(check="accuracy", reason="x"),)})
    with pytest.raises(GateFailed, match="'accuracy' is not a check"):
        verdict_of(versus(hits(150, 200), hits(190, 200)), {}, wrong, UNIT)
    thin = policy.model_copy(
        update={"min_items": 500, "allowed_regressions": (AllowedRegression(check="items", reason="x"),)}
    )
    with pytest.raises(GateFailed, match="'items' is not a check"):
        verdict_of(versus(hits(150, 200), hits(190, 200)), {}, thin, UNIT)


def test_an_advisory_check_does_not_decide():
    """It is in the table with its outcome; a policy of nothing else passes nothing."""
    advisory = MetricCheck(metric="exact_match", min=0.99, required=False)
    both = GateConfig(metrics=(MetricCheck(metric="exact_match", min=0.5), advisory))
    verdict = verdict_of(GOOD, {}, both, UNIT)
    assert [(check.outcome, check.waived) for check in verdict.checks[-2:]] == [("pass", ""), ("fail", "advisory")]
    assert verdict.outcome == "pass"
    assert verdict_of(GOOD, {}, GateConfig(metrics=(advisory,)), UNIT).outcome == "inconclusive"


def prompts(broken: set[int], of: int = 7) -> tuple[PromptResult, ...]:
    """Must-pass prompts of which some are broken."""
    return tuple(
        PromptResult(
            id=f"p{number}", prompt="?", answer="!", broken=("contains: no 'yes'",) if number in broken else ()
        )
        for number in range(of)
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "rule", "outcome"),
    [
        (set(), {1}, "all", "pass"),
        ({1}, {1}, "all", "fail"),
        ({1}, {1}, "no_regression", "pass"),
        ({1, 2}, {1}, "no_regression", "fail"),
        ({1}, None, "no_regression", "fail"),
        ({6}, {1}, "no_regression", "fail"),
    ],
)
def test_must_pass_prompts_are_decided_as_counted(ours, theirs, rule, outcome):
    """All of them, or those that the incumbent doesn't break; one that it was never asked counts. The broken are named."""
    found = {"candidate": prompts(ours), **({"incumbent": prompts(theirs, of=5)} if theirs is not None else {})}
    verdict = verdict_of(GOOD, {}, FLOOR.model_copy(update={"prompts": rule}), UNIT, prompts=found)
    assert outcome_of(verdict, "must-pass prompts") == outcome == verdict.outcome
    if outcome == "fail":
        assert f"p{max(ours)}" in next(check.why for check in verdict.checks if check.name == "must-pass prompts")


def task(values: list[float], **fields) -> tuple[TaskResult, ...]:
    known = {"task": "boolq", "metric": "acc", "higher_is_better": True, "ids": tuple(map(str, range(len(values))))}
    return (TaskResult(**{**known, **fields}, values=tuple(values)),)


def test_an_lm_eval_task_is_decided_like_any_metric():
    """By name TASK/METRIC, as a floor and paired with the incumbent on the same documents."""
    policy = GateConfig(
        metrics=(
            MetricCheck(metric="exact_match", min=0.5),
            MetricCheck(metric="boolq/acc", min=0.5, against="incumbent", margin=0.05),
        )
    )
    reports = versus(hits(190, 200), hits(190, 200))
    same = {"candidate": task(hits(280, 400)), "incumbent": task(hits(282, 400))}
    worse = {"candidate": task(hits(240, 400)), "incumbent": task(hits(282, 400))}
    assert verdict_of(reports, {}, policy, UNIT, tasks=same).outcome == "pass"
    assert outcome_of(verdict_of(reports, {}, policy, UNIT, tasks=worse), "boolq/acc vs incumbent") == "fail"


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (task(hits(2, 4), ids=tuple("abcd")), task(hits(2, 4)), "same documents"),
        (task(hits(2, 4)), task([0.5, 3.0, 1.0, 1.0]), "not a score from 0 to 1"),
        (task(hits(2, 4)), task(hits(2, 4), higher_is_better=False), "not a score from 0 to 1"),
    ],
)
def test_a_task_that_cannot_be_decided_is_refused(theirs, ours, words):
    """Other documents, values that are no shares, and a metric of which less is better."""
    policy = GateConfig(metrics=(MetricCheck(metric="boolq/acc", against="incumbent"),))
    with pytest.raises(GateFailed, match=words):
        verdict_of(versus(hits(9, 9), hits(9, 9)), {}, policy, UNIT, tasks={"candidate": ours, "incumbent": theirs})


def judged(wins: int, losses: int, ties: int) -> tuple[JudgeReport, ...]:
    said = ["candidate"] * wins + ["other"] * losses + ["tie"] * ties
    items = [Judgement(id=f"{n:04x}", candidate_first=word, candidate_second=word) for n, word in enumerate(said)]
    nothing = Interval(value=0.0, low=0.0, high=0.0)  # the gate makes its own
    return (
        JudgeReport(
            against="incumbent", model="judge", win_rate=nothing, agreement=nothing, items=tuple(items), failed=0
        ),
    )


def test_an_llm_judges_win_rate_has_a_floor():
    """Parity over 300 items reaches 0.43, 90 of 300 won doesn't; without an incumbent it doesn't apply."""
    policy, both = FLOOR.model_copy(update={"judges": (JudgeCheck(min=0.43),)}), versus(hits(290, 300), hits(290, 300))
    parity, worse = (verdict_of(both, {}, policy, UNIT, judged=judged(*n)) for n in ((130, 130, 40), (90, 210, 0)))
    assert (outcome_of(parity, "judge vs incumbent"), outcome_of(worse, "judge vs incumbent")) == ("pass", "fail")
    assert outcome_of(verdict_of(GOOD, {}, policy, UNIT), "judge vs incumbent") == "pass"
    customers = [str(n // 10) for n in range(300)]
    grouped = verdict_of(
        versus(hits(290, 300), hits(290, 300), customer=customers), {},
        policy.model_copy(update={"cluster_by": "customer"}), UNIT, judged=judged(130, 130, 40),
    )  # fmt: skip
    one, other = (
        next(c.estimate for c in found.checks if c.name == "judge vs incumbent") for found in (parity, grouped)
    )
    assert other.high - other.low > 2 * (one.high - one.low)


def test_a_judge_that_judged_little_or_nothing_passes_nothing():
    """No report is refused; few items, or many without a usable answer, are open."""
    policy, both = FLOOR.model_copy(update={"judges": (JudgeCheck(min=0.3),)}), versus(hits(190, 200), hits(190, 200))
    with pytest.raises(GateFailed, match="against incumbent is not measured"):
        verdict_of(both, {}, policy, UNIT)
    few, mute = (verdict_of(both, {}, policy, UNIT, judged=found) for found in (judged(40, 0, 0), judged(0, 0, 0)))
    half = verdict_of(both, {}, policy, UNIT, judged=(judged(200, 0, 0)[0].model_copy(update={"failed": 100}),))
    assert {outcome_of(verdict, "judge vs incumbent") for verdict in (few, mute, half)} == {"inconclusive"}
    assert "100 of 300" in half.checks[-1].why


def test_a_system_that_failed_requests_is_nothing_to_be_held_against():
    """An incumbent that answered too little would lower the bar: open, with the way out."""
    reports = versus(hits(150, 200), hits(120, 200))
    reports["incumbent"] = reports["incumbent"].model_copy(update={"errors": 60})
    verdict = verdict_of(reports, {}, NOT_WORSE, UNIT)
    check = next(check for check in verdict.checks if check.name == "errors in evaluation of incumbent")
    assert (check.outcome, verdict.outcome) == ("inconclusive", "inconclusive")
    assert "--again" in check.why


def test_a_judge_is_not_asked_to_beat_a_system_that_failed_requests():
    """Nor an incumbent that only a judge compares with."""
    policy, reports = (
        FLOOR.model_copy(update={"judges": (JudgeCheck(min=0.3),)}),
        versus(hits(190, 200), hits(190, 200)),
    )
    reports["incumbent"] = reports["incumbent"].model_copy(update={"errors": 60})
    verdict = verdict_of(reports, {}, policy, UNIT, judged=judged(200, 0, 0))
    assert outcome_of(verdict, "errors in evaluation of incumbent") == verdict.outcome == "inconclusive"


def test_a_metric_of_few_items_passes_nothing():
    """Four items with a field decide nothing about it, whatever the size of the holdout."""
    items = evaluation("candidate", hits(190, 200)).items
    some = tuple(
        item.model_copy(update={"scores": {**item.scores, **({"json_field_match/refund": 1.0} if n < 4 else {})}})
        for n, item in enumerate(items)
    )
    policy = GateConfig(metrics=(MetricCheck(metric="json_field_match/refund", min=0.3),))
    verdict = verdict_of({"candidate": evaluation("candidate", [], items=some)}, {}, policy, UNIT)
    assert outcome_of(verdict, "json_field_match/refund") == verdict.outcome == "inconclusive"


def test_more_slices_make_no_other_question_harder():
    """A part that is shown to be worse stays so, and a metric too, whatever else is looked at."""
    language, channel = ["de"] * 40 + ["en"] * 360, [str(n % 8) for n in range(400)]
    reports = versus(hits(33, 40) + hits(360, 360), [1.0] * 400, language=language, channel=channel)
    one = SliceCheck(by="language", metric="exact_match")
    floor = (MetricCheck(metric="exact_match", min=0.5),)
    for more in ((), (SliceCheck(by="channel", metric="exact_match"),)):
        verdict = verdict_of(reports, {}, GateConfig(metrics=floor, slices=(one, *more)), UNIT)
        assert outcome_of(verdict, "exact_match vs incumbent where language=de") == verdict.outcome == "fail"


def test_slices_of_which_none_is_large_enough_are_open():
    """A check that looked at nothing passes nothing."""
    reports = versus([1.0] * 200, [1.0] * 200, customer=[str(n // 4) for n in range(200)])
    floor, by = (MetricCheck(metric="exact_match", min=0.5),), SliceCheck(by="customer", metric="exact_match")
    verdict = verdict_of(
        reports, {}, GateConfig(metrics=floor, slices=(by.model_copy(update={"min_items": 300}),)), UNIT
    )
    assert verdict.outcome == "inconclusive"
    grouped = GateConfig(metrics=floor, slices=(by.model_copy(update={"min_items": 4}),), cluster_by="customer")
    assert "200 of 200 items are in parts too small" in verdict_of(reports, {}, grouped, UNIT).checks[-1].why


def test_a_slice_in_which_nothing_has_the_metric_is_left_out():
    """Only scored items make parts."""
    language = ["de"] * 100 + ["en"] * 100
    reports = {
        system: found.model_copy(
            update={
                "items": tuple(
                    item.model_copy(update={"scores": {**item.scores, **({"rougeL": 0.5} if n < 100 else {})}})
                    for n, item in enumerate(found.items)
                )
            }
        )
        for system, found in versus([1.0] * 200, [1.0] * 200, language=language).items()
    }
    policy = GateConfig(
        metrics=(MetricCheck(metric="exact_match", min=0.5),), slices=(SliceCheck(by="language", metric="rougeL"),)
    )
    names = [check.name for check in verdict_of(reports, {}, policy, UNIT).checks]
    assert [name for name in names if "where" in name] == ["rougeL vs incumbent where language=de"]


def test_a_policy_whose_only_check_is_allowed_to_fail_passes_nothing():
    """An allowed regression can't leave a build unexamined."""
    allowed = (AllowedRegression(check="exact_match vs incumbent", reason="known"),)
    policy = NOT_WORSE.model_copy(update={"allowed_regressions": allowed})
    verdict = verdict_of(versus(hits(0, 200), hits(190, 200)), {}, policy, UNIT)
    assert (outcome_of(verdict, "policy"), verdict.outcome) == ("inconclusive", "inconclusive")


def test_an_allowed_regression_that_does_not_apply_yet_is_no_mistake():
    """The first build has no incumbent, and a part may be too small by now."""
    allowed = (AllowedRegression(check="exact_match vs incumbent where language=de", reason="relabelled"),)
    policy = GateConfig(
        metrics=(MetricCheck(metric="exact_match", min=0.5),),
        slices=(SliceCheck(by="language", metric="exact_match"),),
        allowed_regressions=allowed,
    )
    first = evaluation("candidate", hits(190, 200)).items
    items = tuple(item.model_copy(update={"columns": {"language": "en"}}) for item in first)
    assert verdict_of({"candidate": evaluation("candidate", [], items=items)}, {}, policy, UNIT).outcome == "pass"
