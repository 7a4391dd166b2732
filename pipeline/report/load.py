"""Load in a report: latencies and throughput by level with their intervals, and the cost of a million tokens there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.artifacts import Build, Interval
from pipeline.intervals.load import Measured, measured
from pipeline.report.content import ROLES, confidence

HEAD = {
    "p50_ttft_ms": "TTFT p50",
    "p95_ttft_ms": "TTFT p95",
    "p50_itl_ms": "ITL p50",
    "p50_e2el_ms": "E2EL p50",
    "p95_e2el_ms": "E2EL p95",
    "output_throughput": "tokens/s",
    "request_throughput": "requests/s",
}


@dataclass(frozen=True)
class Level:
    """One level of one system's sweep: metrics by vLLM bench's names, milliseconds and rates, with their intervals."""

    system: str
    users: int
    metrics: dict[str, Measured]
    failed: int
    sent: int


@dataclass(frozen=True)
class Cost:
    """The cost of a million output tokens at one level; `objective`: the policy has a load objective there."""

    users: int
    tokens_per_second: Interval
    cost: Interval
    objective: bool


def levels(build: Build) -> list[Level]:
    """The candidate's levels, then the champion's, as `loadtest.max_concurrency` has them."""
    sure = confidence(build)
    return [
        Level(
            role,
            level.max_concurrency,
            {name: metric for name in HEAD if (metric := measured(level, name, sure))},
            level.failed,
            level.failed + level.completed,
        )
        for role in ROLES
        if role in build.loadtests
        for level in build.loadtests[role].levels
    ]


def costs(build: Build, sweep: list[Level]) -> list[Cost]:
    """The candidate's cost of a million output tokens at each level where `loadtest.cost_per_hour` is set.

    cost = cost_per_hour / (output tokens/s * 3600 s/h) * 1e6, in cost_per_hour's currency. vLLM's bench defines the
    throughput as all output tokens by the run's duration. Work on prompts is included, idle hours aren't. The cost's low
    end comes from the throughput's high end, and the reverse.
    """
    price = build.config.get("loadtest", {}).get("cost_per_hour")
    objectives = {check.get("max_concurrency") for check in build.config.get("gate", {}).get("load", ())}
    prices = []
    for level in sweep:
        rate = level.metrics.get("output_throughput")
        if price and level.system == "candidate" and rate and rate.interval.value > 0:
            prices.append(Cost(level.users, rate.interval, _cost(price, rate.interval), level.users in objectives))
    return prices


def _cost(price: float, rate: Interval) -> Interval:
    middle, low, high = (
        price / (speed * 3600) * 1e6 if speed else math.inf for speed in (rate.value, rate.high, rate.low)
    )
    return Interval(value=middle, low=low, high=high)


def rows(sweep: list[Level]) -> list[list[str]]:
    """The load table as text: head, then a row for each system and level."""
    head = ["system", "users", *HEAD.values(), "failed"]
    return [head, *([level.system, str(level.users), *map(_text, _metrics(level)), failed(level)] for level in sweep)]


def _metrics(level: Level) -> list[Measured | None]:
    return [level.metrics.get(name) for name in HEAD]


def _text(metric: Measured | None) -> str:
    return f"{figure(metric.interval.value)}{beneath(metric)}" if metric else "-"


def beneath(metric: Measured) -> str:
    """The interval behind a figure: ` (398 to 430)`, with an open end where too few requests bound it, or nothing."""
    if metric.unknown:
        return ""
    high = "?" if metric.open_above else figure(metric.interval.high)
    return f" ({figure(metric.interval.low)} to {high})"


def figure(number: float) -> str:
    """Milliseconds or a rate as a person reads it."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def failed(level: Level) -> str:
    """Failed requests of all requests."""
    return f"{level.failed} of {level.sent}"
