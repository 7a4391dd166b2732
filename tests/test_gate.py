from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config_file, gate, scoring
from pipeline.artifacts import Evaluation, Item, LoadLevel, LoadTest
from pipeline.config import EvaluateConfig, GateConfig, LoadCheck, LoadtestConfig, MetricCheck, Scorer
from pipeline.errors import GateFailed

UNIT = "u" * 64
CONFIGS = Path(__file__).parents[1] / "configs"


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


def loadtest(e2el: list[float], *, failed: int = 0, unit: str = UNIT) -> LoadTest:
    mean = sum(e2el) / len(e2el) if e2el else 0.0
    tail = sorted(e2el)[int(0.95 * len(e2el))] if e2el else 0.0
    level = LoadLevel(
        max_concurrency=4,
        completed=len(e2el),
        failed=failed,
        metrics={"p95_e2el_ms": (tail,), "request_throughput": (4000 / max(mean, 1),)},
        samples={"e2el_ms": (tuple(e2el),), "output_tokens": ((8.0,) * len(e2el),)},
    )
    return LoadTest(system="candidate", unit_digest=unit, levels=(level,))


def outcome_of(verdict, name: str) -> str:
    return {check.name: check.outcome for check in verdict.checks}[name]


FLOOR = GateConfig(metrics=(MetricCheck(metric="exact_match", min=0.8),), min_items=100)


@pytest.mark.parametrize(
    ("right", "outcome"), [(180, "pass"), (168, "inconclusive"), (160, "inconclusive"), (140, "fail")]
)
def test_a_floor_is_judged_by_the_whole_interval(right, outcome):
    """Wilson's 95 % limits of 180, 168, 160 and 140 of 200 are 0.851, 0.783, 0.739 and 0.634 to 0.759."""
    verdict = gate.judge({"candidate": evaluation("candidate", hits(right, 200))}, {}, FLOOR, UNIT)
    assert outcome_of(verdict, "exact_match") == outcome == verdict.outcome


def test_an_inconclusive_floor_says_how_many_items_would_decide():
    """168 of 200 against 0.8: the named number of items at the same share passes."""
    verdict = gate.judge({"candidate": evaluation("candidate", hits(168, 200))}, {}, FLOOR, UNIT)
    why = next(check.why for check in verdict.checks if check.name == "exact_match")
    more = int(why.split("about ")[1].split()[0])
    total = int(1.1 * (200 + more))
    again = gate.judge({"candidate": evaluation("candidate", hits(round(0.84 * total), total))}, {}, FLOOR, UNIT)
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
    tuned = gate.judge({"candidate": evaluation("candidate", hits(190, 200)), "base": base}, {}, policy, UNIT)
    untrained = gate.judge({"candidate": evaluation("candidate", hits(4, 200)), "base": base}, {}, policy, UNIT)
    assert tuned.outcome == "pass"
    assert untrained.outcome == "fail"
    assert outcome_of(untrained, "exact_match vs base") == "fail"


def test_chatter_of_a_corrupted_model_fails_every_quality_check():
    """A model that answers 'newnewnew' to everything is caught."""
    verdict = gate.judge({"candidate": evaluation("candidate", hits(0, 200))}, {}, FLOOR, UNIT)
    assert verdict.outcome == "fail"


@pytest.mark.parametrize(
    ("better", "worse", "margin", "outcome"),
    [
        (0, 0, 0.02, "pass"),
        (0, 0, 0.0, "inconclusive"),
        (30, 2, 0.0, "pass"),
        (2, 30, 0.02, "fail"),
        (5, 6, 0.02, "inconclusive"),
    ],
)
def test_a_comparison_is_paired_and_ties_do_not_prove_equality(better, worse, margin, outcome):
    """200 items; only discordant ones move the difference, and no discordant one leaves ±1.9 points open."""
    ours, theirs = hits(100 + better, 200), hits(100, 200)
    ours[:worse] = [0.0] * worse
    policy = GateConfig(metrics=(MetricCheck(metric="exact_match", against="incumbent", margin=margin),))
    reports = {"candidate": evaluation("candidate", ours), "incumbent": evaluation("incumbent", theirs)}
    assert gate.judge(reports, {}, policy, UNIT).outcome == outcome


def test_pairing_decides_what_unpaired_intervals_would_not():
    """12 gained and none lost of 200: the Wilson intervals overlap, the paired difference is above 0."""
    reports = {
        "candidate": evaluation("candidate", hits(172, 200)),
        "incumbent": evaluation("incumbent", hits(160, 200)),
    }
    policy = GateConfig(metrics=(MetricCheck(metric="exact_match", against="incumbent"),))
    verdict = gate.judge(reports, {}, policy, UNIT)
    check = verdict.checks[-1]
    assert verdict.outcome == "pass"
    assert check.estimate.value == pytest.approx(0.06)
    assert 0.03 < check.estimate.low < 0.06 < check.estimate.high < 0.11


def test_without_an_incumbent_its_check_passes_and_says_so():
    """The first build has nobody to be compared with."""
    policy = GateConfig(metrics=(MetricCheck(metric="exact_match", min=0.8, against="incumbent"),))
    verdict = gate.judge({"candidate": evaluation("candidate", hits(195, 200))}, {}, policy, UNIT)
    check = next(check for check in verdict.checks if check.name == "exact_match vs incumbent")
    assert (check.outcome, check.why, verdict.outcome) == ("pass", "no incumbent yet", "pass")


def test_too_few_items_are_never_a_pass():
    """40 of 40 with min_items 100 is inconclusive and says that 60 are missing; a clear failure stays one."""
    good = gate.judge({"candidate": evaluation("candidate", hits(40, 40))}, {}, FLOOR, UNIT)
    bad = gate.judge({"candidate": evaluation("candidate", hits(0, 40))}, {}, FLOOR, UNIT)
    assert (good.outcome, bad.outcome) == ("inconclusive", "fail")
    assert next(check.why for check in good.checks if check.name == "items") == "40 items, 60 more are needed"


def test_failed_requests_fail_the_gate_as_counted():
    """One failed request of 200 breaks a limit of none and holds one of 1 %."""
    reports = {"candidate": evaluation("candidate", hits(190, 200), errors=1)}
    strict = gate.judge(reports, {}, FLOOR, UNIT)
    lax = gate.judge(reports, {}, FLOOR.model_copy(update={"max_error_rate": 0.01}), UNIT)
    assert (strict.outcome, lax.outcome) == ("fail", "pass")


@pytest.mark.parametrize("metrics", [(), (MetricCheck(metric="exact_match", against="incumbent"),)])
def test_a_policy_of_which_nothing_applies_passes_nothing(metrics):
    """No checks, or only ones against an incumbent that isn't there, can't say pass."""
    policy = GateConfig(metrics=metrics)
    verdict = gate.judge({"candidate": evaluation("candidate", hits(200, 200))}, {}, policy, UNIT)
    assert (verdict.outcome, outcome_of(verdict, "policy")) == ("inconclusive", "inconclusive")


LOAD = FLOOR.model_copy(update={"load": (LoadCheck(metric="p95_e2el_ms", max_concurrency=4, max=200.0),)})
GOOD = {"candidate": evaluation("candidate", hits(190, 200))}
STEADY = [float(100 + number % 50) for number in range(200)]


@pytest.mark.parametrize(
    ("latencies", "outcome"),
    [
        (STEADY, "pass"),
        ([value * 3 for value in STEADY], "fail"),
        ([*STEADY[:189], *[250.0] * 11], "inconclusive"),
        (STEADY[:30], "inconclusive"),
    ],
)
def test_a_load_objective_is_judged_by_its_interval(latencies, outcome):
    """Clearly within, clearly beyond, a tail that straddles, and too few requests to bound it."""
    verdict = gate.judge(GOOD, {"candidate": loadtest(latencies)}, LOAD, UNIT)
    assert outcome_of(verdict, "p95_e2el_ms at 4") == outcome


def test_too_few_requests_are_told_how_many_it_takes():
    """A 95th percentile needs 72 requests for an upper bound at 95 %."""
    verdict = gate.judge(GOOD, {"candidate": loadtest(STEADY[:30])}, LOAD, UNIT)
    assert "72 are needed" in verdict.checks[-1].why


def test_a_throughput_floor_is_judged_from_below():
    """33 requests/s hold a floor of 25 and break one of 45."""
    for floor, outcome in [(25.0, "pass"), (45.0, "fail")]:
        check = LoadCheck(metric="request_throughput", max_concurrency=4, min=floor)
        verdict = gate.judge(GOOD, {"candidate": loadtest(STEADY)}, FLOOR.model_copy(update={"load": (check,)}), UNIT)
        assert verdict.checks[-1].outcome == outcome


def test_a_level_on_which_nothing_finished_fails():
    """Zeros that bench writes for no answers are not fast answers."""
    verdict = gate.judge(GOOD, {"candidate": loadtest([], failed=20)}, LOAD, UNIT)
    assert verdict.checks[-1].outcome == "fail"
    assert outcome_of(verdict, "errors in load test") == "fail"


def test_reports_that_cannot_be_judged_are_refused_with_every_reason():
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
        gate.judge(reports, {"candidate": loadtest(STEADY)}, policy, UNIT)
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
    """Judging is pure, bootstraps and all."""
    graded = [0.25 * (number % 5) for number in range(150)]
    policy = GateConfig(metrics=(MetricCheck(metric="token_f1", min=0.4, against="base", margin=0.05),))
    reports = {
        "candidate": evaluation("candidate", graded, metric="token_f1"),
        "base": evaluation("base", graded[::-1], metric="token_f1"),
    }
    assert gate.judge(reports, {}, policy, UNIT) == gate.judge(reports, {}, policy, UNIT)


def test_more_right_answers_never_make_a_verdict_worse():
    """Over all counts of 120, the outcome climbs from fail through inconclusive to pass and never back."""
    order = ["fail", "inconclusive", "pass"]
    outcomes = [
        order.index(gate.judge({"candidate": evaluation("candidate", hits(right, 120))}, {}, FLOOR, UNIT).outcome)
        for right in range(0, 121, 3)
    ]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {0, 1, 2}


def test_surer_policies_decide_less():
    """What passes at 99 % passes at 90 %, and the interval is wider."""
    reports = {"candidate": evaluation("candidate", hits(172, 200))}
    sure, unsure = (
        gate.judge(reports, {}, FLOOR.model_copy(update={"confidence": level}), UNIT) for level in (0.99, 0.9)
    )
    assert (sure.outcome, unsure.outcome) == ("inconclusive", "pass")


def test_a_policy_that_asks_for_what_is_not_measured_is_told_before_anything_runs():
    """A metric without scorer, a base that isn't compared, a level outside the sweep."""
    policy = GateConfig(
        metrics=(
            MetricCheck(metric="accuracy", min=0.5),
            MetricCheck(metric="json_field_match/category", against="base"),
        ),
        load=(LoadCheck(metric="p50_ttft_ms", max_concurrency=64, max=1.0),),
    )
    evaluate = EvaluateConfig(scorers=(Scorer(metric="json_field_match"),), compare=("merged",))
    found = gate.policy_problems(policy, evaluate, LoadtestConfig())
    assert [problem.key for problem in found] == [
        "gate.metrics[0].metric", "gate.metrics[1].against", "gate.load[0].max_concurrency",
    ]  # fmt: skip
    assert gate.policy_problems(FLOOR, EvaluateConfig(), LoadtestConfig()) == []


def test_fewer_items_than_the_policy_wants_are_told_before_anything_runs():
    """max_items below min_items could only be inconclusive."""
    (problem,) = gate.policy_problems(FLOOR, EvaluateConfig(max_items=50), LoadtestConfig())
    assert problem.key == "gate.min_items"
    assert "set evaluate.max_items: 100" in str(problem)
    assert gate.policy_problems(FLOOR, EvaluateConfig(max_items=100), LoadtestConfig()) == []


def test_a_field_is_measured_where_the_scorer_compares_it():
    """Named fields are all there is; without names the holdout's own fields are, whatever they will be."""
    policy = GateConfig(
        metrics=(
            MetricCheck(metric="json_field_match/category", min=0.5),
            MetricCheck(metric="json_field_match/colour", min=0.5),
        )
    )
    some = EvaluateConfig(scorers=(Scorer(metric="json_field_match", fields=("category",)),))
    (problem,) = gate.policy_problems(policy, some, LoadtestConfig())
    assert problem.key == "gate.metrics[1].metric"
    assert problem.allowed == "json_field_match, json_field_match/category"
    every = EvaluateConfig(scorers=(Scorer(metric="json_field_match"),))
    assert gate.policy_problems(policy, every, LoadtestConfig()) == []


def test_a_tail_that_too_few_requests_cannot_bound_is_told_before_anything_runs():
    """A 95th percentile needs 72 requests; 2 repeats of 16 get the number of prompts that would do."""
    loadtest = LoadtestConfig(max_concurrency=(4,), num_prompts=16, repeats=2)
    (problem,) = gate.policy_problems(LOAD, EvaluateConfig(), loadtest)
    assert problem.key == "gate.load[0].metric"
    assert "loadtest.num_prompts: 36" in str(problem)
    enough = loadtest.model_copy(update={"num_prompts": 36})
    assert gate.policy_problems(LOAD, EvaluateConfig(), enough) == []


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
    config = config_file.load(CONFIGS / "demo.yaml")
    scorers, size = config.evaluate.scorers, config.gate.load[0].max_concurrency
    level = loadtest([100.0 + number for number in range(config.loadtest.num_prompts)]).levels[0]
    samples = {**level.samples, "ttft_ms": level.samples["e2el_ms"]}
    shown = {"max_concurrency": size, "samples": samples, "metrics": {config.gate.load[0].metric: (110.0,)}}
    tests = {"candidate": LoadTest(system="candidate", unit_digest=UNIT, levels=(level.model_copy(update=shown),))}
    base = demo_evaluation("base", scorers, tuned=False)
    for tuned, outcome in ((True, "pass"), (False, "fail")):
        reports = {"base": base, "candidate": demo_evaluation("candidate", scorers, tuned=tuned)}
        assert gate.judge(reports, tests, config.gate, UNIT).outcome == outcome


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_policy_can_be_judged(name):
    """Nothing is asked for that the config doesn't measure, and no tail that its requests can't bound."""
    config = config_file.load(CONFIGS / name)
    assert gate.policy_problems(config.gate, config.evaluate, config.loadtest) == []
