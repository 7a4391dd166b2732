"""What a policy asks for that isn't measured, told before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import file
from pipeline.config.gate import AllowedRegression, GateConfig, JudgeCheck, LoadCheck, MetricCheck, SliceCheck
from pipeline.config.schema import EvaluateConfig, JudgeConfig, LoadtestConfig, Scorer, TaskConfig
from pipeline.gate import policy as gate_policy

CONFIGS = Path(__file__).parents[3] / "configs"
FLOOR = GateConfig(metrics=(MetricCheck(metric="exact_match", min=0.8),), min_items=100)
LOAD = FLOOR.model_copy(update={"load": (LoadCheck(metric="p95_e2el_ms", max_concurrency=4, max=200.0),)})


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
    found = gate_policy.problems(policy, evaluate, LoadtestConfig())
    assert [problem.key for problem in found] == [
        "gate.metrics[0].metric", "gate.metrics[1].against", "gate.load[0].max_concurrency",
    ]  # fmt: skip
    assert gate_policy.problems(FLOOR, EvaluateConfig(), LoadtestConfig()) == []


def test_a_tasks_metric_may_be_asked_for_where_there_are_tasks():
    """Which metrics a group of tasks has shows when it is loaded; without tasks, and for a part of the holdout, there are none."""
    asked = EvaluateConfig(tasks=(TaskConfig(task="mmlu"),))
    policy = GateConfig(metrics=(MetricCheck(metric="mmlu_law/acc", min=0.3),))
    assert gate_policy.problems(policy, asked, LoadtestConfig()) == []
    assert len(gate_policy.problems(policy, EvaluateConfig(), LoadtestConfig())) == 1
    part = GateConfig(slices=(SliceCheck(by="expected", metric="mmlu_law/acc"),))
    assert len(gate_policy.problems(part, asked, LoadtestConfig())) == 1


def test_a_floor_for_a_judge_that_nobody_asks_is_told_before_anything_runs():
    """Else it would never apply, and pass."""
    asked = EvaluateConfig(judges=(JudgeConfig(against="base", base_url="https://judge.example/v1", model="m"),))
    for against, wrong in [("base", 0), ("incumbent", 1)]:
        found = gate_policy.problems(GateConfig(judges=(JudgeCheck(against=against),)), asked, LoadtestConfig())
        assert [problem.key for problem in found] == ["gate.judges[0].against"] * wrong


def test_fewer_items_than_the_policy_wants_are_told_before_anything_runs():
    """max_items below min_items could only be inconclusive."""
    (problem,) = gate_policy.problems(FLOOR, EvaluateConfig(max_items=50), LoadtestConfig())
    assert problem.key == "gate.min_items"
    assert "set evaluate.max_items: 100" in str(problem)
    assert gate_policy.problems(FLOOR, EvaluateConfig(max_items=100), LoadtestConfig()) == []


def test_a_field_is_measured_where_the_scorer_compares_it():
    """Named fields are all there is; without names the holdout's own fields are, whatever they will be."""
    policy = GateConfig(
        metrics=(
            MetricCheck(metric="json_field_match/category", min=0.5),
            MetricCheck(metric="json_field_match/colour", min=0.5),
        )
    )
    some = EvaluateConfig(scorers=(Scorer(metric="json_field_match", fields=("category",)),))
    (problem,) = gate_policy.problems(policy, some, LoadtestConfig())
    assert problem.key == "gate.metrics[1].metric"
    assert problem.allowed == "json_field_match, json_field_match/category"
    every = EvaluateConfig(scorers=(Scorer(metric="json_field_match"),))
    assert gate_policy.problems(policy, every, LoadtestConfig()) == []


def test_a_tail_that_too_few_requests_cannot_bound_is_told_before_anything_runs():
    """A 95th percentile needs 72 requests; 3 repeats of 16 get the number of prompts that would do."""
    loadtest = LoadtestConfig(max_concurrency=(4,), num_prompts=16, repeats=3)
    (problem,) = gate_policy.problems(LOAD, EvaluateConfig(), loadtest)
    assert problem.key == "gate.load[0].metric"
    assert "loadtest.num_prompts: 24" in str(problem)
    enough = loadtest.model_copy(update={"num_prompts": 24})
    assert gate_policy.problems(LOAD, EvaluateConfig(), enough) == []


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_policy_can_be_decided(name):
    """Nothing is asked for that the config doesn't measure, and no tail that its requests can't bound."""
    config = file.load(CONFIGS / name)
    assert gate_policy.problems(config.gate, config.evaluate, config.loadtest) == []


def test_a_slices_metric_is_looked_for_too():
    """A slice of what no scorer gives is told with its key."""
    policy = FLOOR.model_copy(update={"slices": (SliceCheck(by="language", metric="accuracy"),)})
    (problem,) = gate_policy.problems(policy, EvaluateConfig(), LoadtestConfig())
    assert problem.key == "gate.slices[0].metric"


def test_objectives_on_single_runs_are_told_before_anything_runs():
    """One run says nothing of the next."""
    loadtest = LoadtestConfig(max_concurrency=(4,), num_prompts=100, repeats=1)
    (problem,) = gate_policy.problems(LOAD, EvaluateConfig(), loadtest)
    assert (problem.key, problem.allowed) == ("loadtest.repeats", "3 or more")
    assert gate_policy.problems(FLOOR, EvaluateConfig(), loadtest) == []


def test_columns_that_no_row_keeps_are_told_before_anything_runs():
    """For slices and for groups; parts by the expected answer need none."""
    by = tuple(SliceCheck(by=name, metric="exact_match") for name in ("language", "expected", "expected.category"))
    policy = FLOOR.model_copy(update={"slices": by, "cluster_by": "customer"})
    found = gate_policy.problems(policy, EvaluateConfig(), LoadtestConfig(), ("channel",))
    assert [problem.key for problem in found] == ["gate.slices[0].by", "gate.cluster_by"]
    assert gate_policy.problems(policy, EvaluateConfig(), LoadtestConfig(), ("language", "customer")) == []


def test_names_that_no_check_or_two_checks_have_are_told_before_anything_runs():
    """An allowed regression must mean one check."""
    twice = (MetricCheck(metric="exact_match", min=0.5), MetricCheck(metric="exact_match", min=0.9))
    allowed = tuple(AllowedRegression(check=name, reason="x") for name in ("exact_match", "accuracy"))
    policy = GateConfig(metrics=twice, allowed_regressions=allowed)
    found = gate_policy.problems(policy, EvaluateConfig(), LoadtestConfig())
    assert [problem.key for problem in found] == ["gate", "gate.allowed_regressions[1].check"]


@pytest.mark.parametrize(
    "check",
    [
        {"against": "incumbent", "margin": 3}, {"against": "incumbent", "margin": -1}, {"min": 80},
        {"against": "incumbent", "margin": float("inf")}, {"min": float("nan")},
    ],
)  # fmt: skip
def test_scores_lie_between_0_and_1_and_so_do_thresholds(check):
    """Three points are 0.03; a margin of 3 would let everything pass."""
    with pytest.raises(ValueError, match=r"less than|greater than"):
        MetricCheck(metric="exact_match", **check)
