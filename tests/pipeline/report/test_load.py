"""Load and cost in a report."""

from __future__ import annotations

import math

import pytest
from support.sample_build import full_build

from pipeline.artifacts import Build, LoadLevel
from pipeline.report import load


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return full_build(tmp_path_factory.mktemp("store"))


def one_run(level: LoadLevel) -> LoadLevel:
    """The first of a level's repeats."""
    metrics = {name: values[:1] for name, values in level.metrics.items()}
    samples = {name: values[:1] for name, values in level.samples.items()}
    return level.model_copy(update={"completed": 32, "metrics": metrics, "samples": samples})


def test_a_million_tokens_costs_what_the_machine_costs_meanwhile(build):
    """1.8 an hour at 38 tokens a second: 7.31 hours for a million tokens; the interval is the throughput's upside down."""
    costs = load.costs(build, load.levels(build))
    assert [(cost.users, cost.objective) for cost in costs] == [(1, True), (8, False)]
    first = costs[0]
    assert first.tokens_per_second.value == pytest.approx(38, rel=0.01)
    assert first.cost.value == pytest.approx(1.8 * 1e6 / 38 / 3600, rel=0.01)
    assert first.cost.low == pytest.approx(1.8 * 1e6 / first.tokens_per_second.high / 3600)
    assert first.cost.low < first.cost.value < first.cost.high


def test_without_a_price_there_is_no_cost(build):
    """And where the throughput's interval reaches 0 the cost has no upper end."""
    free = build.model_copy(update={"config": {**build.config, "loadtest": {}}})
    levels = load.levels(build)
    assert load.costs(free, levels) == []
    rate = levels[0].metrics["output_throughput"].interval
    levels[0].metrics["output_throughput"] = load.Measured(rate.model_copy(update={"low": 0.0}), "t")
    assert math.isinf(load.costs(build, levels)[0].cost.high)


def test_every_figure_has_its_interval_and_an_open_end_says_so(build):
    """32 requests bound the median above and not the 95th percentile; candidate first, then the champion."""
    once = {
        role: test.model_copy(update={"levels": tuple(map(one_run, test.levels))})
        for role, test in build.loadtests.items()
    }
    head, *rows = load.rows(load.levels(build.model_copy(update={"loadtests": once})))
    assert [row[:2] for row in rows] == [["candidate", "1"], ["candidate", "8"], ["incumbent", "1"], ["incumbent", "8"]]
    first = dict(zip(head, rows[0], strict=True))
    assert "?" not in first["TTFT p50"]
    assert first["TTFT p95"].endswith(" to ?)")
    assert first["ITL p50"] == "19.6"
    assert first["failed"] == "0 of 32"
