"""The gate's policy as it is written: which checks say something, their bounds and what holds unless one says so."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.config.gate import AllowedRegression, GateConfig, JudgeCheck, LoadCheck, MetricCheck, SliceCheck

CHECKS = (MetricCheck, SliceCheck, JudgeCheck, AllowedRegression, LoadCheck)
LOAD = {"metric": "p95_ttft_ms", "max_concurrency": 4}


@pytest.mark.parametrize(
    "bounds", [{"min": 0.5}, {"min": 0.0}, {"against": "base"}, {"min": 0.5, "against": "incumbent"}]
)
def test_a_quality_check_has_a_floor_or_a_comparison(bounds):
    """A floor of 0 is one too."""
    assert MetricCheck(metric="exact_match", **bounds).model_dump(exclude_unset=True) == {
        "metric": "exact_match",
        **bounds,
    }


@pytest.mark.parametrize("bounds", [{}, {"margin": 0.1}, {"min": None, "against": None}, {"required": False}])
def test_a_quality_check_without_either_is_refused(bounds):
    """It would pass whatever the model answers."""
    with pytest.raises(ValidationError, match="a check needs min, against, or both"):
        MetricCheck(metric="exact_match", **bounds)


def test_a_load_objective_has_one_bound():
    """A latency is bounded from above, a throughput from below; never both, never neither."""
    assert LoadCheck(**LOAD, max=100).min is None
    assert LoadCheck(metric="request_throughput", max_concurrency=1, min=0.5).max is None
    for bounds in ({}, {"min": 1, "max": 2}):
        with pytest.raises(ValidationError, match="a load check needs either min or max"):
            LoadCheck(**LOAD, **bounds)


@pytest.mark.parametrize(
    ("check", "settings", "key"),
    [
        (MetricCheck, {"metric": "accuracy", "against": "merged"}, "against"),
        (MetricCheck, {"metric": "accuracy", "against": "base", "margin": 1}, "margin"),
        (SliceCheck, {"by": "topic", "metric": "accuracy", "margin": -0.01}, "margin"),
        (SliceCheck, {"by": "topic", "metric": "accuracy", "min_items": 0}, "min_items"),
        (JudgeCheck, {"min": 1.1}, "min"),
        (AllowedRegression, {"check": "accuracy", "reason": ""}, "reason"),
        (LoadCheck, {**LOAD, "metric": "p95_tpot_ms", "max": 1}, "metric"),
        (LoadCheck, {**LOAD, "max": 0}, "max"),
        (LoadCheck, {**LOAD, "max_concurrency": 0, "max": 1}, "max_concurrency"),
        (GateConfig, {"confidence": 0.5}, "confidence"),
        (GateConfig, {"confidence": 1}, "confidence"),
        (GateConfig, {"min_items": 0}, "min_items"),
        (GateConfig, {"max_error_rate": -0.1}, "max_error_rate"),
        (GateConfig, {"prompts": "none"}, "prompts"),
    ],
)
def test_a_setting_past_its_bounds_is_named(check, settings, key):
    """The key alone is refused, beside others that are right."""
    with pytest.raises(ValidationError) as error:
        check(**settings)
    assert [problem["loc"] for problem in error.value.errors()] == [(key,)]


def test_a_comparison_may_ask_for_better_but_a_part_may_only_be_as_good():
    """A metric's margin goes below zero; no part of the holdout is asked to gain."""
    assert MetricCheck(metric="accuracy", against="base", margin=-0.1).margin == -0.1
    assert SliceCheck(by="expected", metric="accuracy", margin=0).margin == 0


def test_the_policy_of_nobody_asks_for_no_quality_and_forgives_nothing():
    """No checks, no failed request, no broken prompt, and 95 in a hundred."""
    policy = GateConfig()
    assert (policy.metrics, policy.slices, policy.judges, policy.load, policy.allowed_regressions) == ((),) * 5
    assert (policy.confidence, policy.min_items, policy.max_error_rate, policy.prompts) == (0.95, 100, 0.0, "all")
    assert policy.cluster_by is None


def test_a_check_is_strict_unless_one_says_so():
    """It decides, without a margin; parts and judges look at the incumbent, and parity lies inside a judge's floor."""
    metric, part, judge = (
        MetricCheck(metric="accuracy", min=0.5),
        SliceCheck(by="topic", metric="accuracy"),
        JudgeCheck(),
    )
    assert (metric.required, metric.margin, metric.against) == (True, 0.0, None)
    assert (part.against, part.margin, part.min_items) == ("incumbent", 0.0, 20)
    assert judge.against == "incumbent"
    assert 0 < judge.min < 0.5


def test_a_mistake_deep_in_a_policy_has_its_place():
    """The second check's, not the policy's."""
    with pytest.raises(ValidationError) as error:
        GateConfig(metrics=[{"metric": "accuracy", "min": 0.5}, {"metric": "accuracy", "minimum": 0.5, "min": 0.5}])
    assert [problem["loc"] for problem in error.value.errors()] == [("metrics", 1, "minimum")]


def test_a_policy_comes_back_from_json_as_it_went():
    """As the registry keeps it beside the model."""
    policy = GateConfig(
        metrics=[{"metric": "accuracy", "against": "base", "margin": -0.02}],
        slices=[{"by": "expected.topic", "metric": "json_field_match"}],
        judges=[{}],
        load=[{**LOAD, "max": 250}],
        allowed_regressions=[{"check": "accuracy vs base", "reason": "the base saw the holdout"}],
    )
    assert GateConfig.model_validate_json(policy.model_dump_json()) == policy


def test_what_no_name_tells_is_described_for_editors():
    """Every check in a sentence, and the keys whose meaning is a choice of ours."""
    schema = GateConfig.model_json_schema()
    assert all(schema["$defs"][check.__name__]["description"] for check in CHECKS)
    keys = {key for key, entry in schema["properties"].items() if "description" in entry}
    assert keys >= {"min_items", "cluster_by", "prompts", "max_error_rate"}
    metric = schema["$defs"]["MetricCheck"]["properties"]
    assert all("description" in metric[key] for key in ("metric", "min", "margin", "required"))
