"""Load in a report: latencies and throughput by level with their intervals, and what a million tokens costs there."""

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
    """What a million output tokens costs at one level; `objective`: the policy has a load objective there."""

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
            {name: found for name in HEAD if (found := measured(level, name, sure))},
            level.failed,
            level.failed + level.completed,
        )
        for role in ROLES
        if role in build.loadtests
        for level in build.loadtests[role].levels
    ]


def costs(build: Build, found: list[Level]) -> list[Cost]:
    """The candidate's cost of a million output tokens at each level where `loadtest.cost_per_hour` is set.

    cost_per_hour / (output tokens/s * 3600 s/h) * 1e6, in cost_per_hour's currency: what the machine costs while it makes
    them, for the throughput that vLLM's bench defines as all output tokens by the run's duration. The prompts' tokens are in
    it, idle hours aren't. The interval is the throughput's, the other way round.
    """
    price = build.config.get("loadtest", {}).get("cost_per_hour")
    asked = {check.get("max_concurrency") for check in build.config.get("gate", {}).get("load", ())}
    made = []
    for level in found:
        rate = level.metrics.get("output_throughput")
        if price and level.system == "candidate" and rate and rate.interval.value > 0:
            made.append(Cost(level.users, rate.interval, _cost(price, rate.interval), level.users in asked))
    return made


def _cost(price: float, rate: Interval) -> Interval:
    value, low, high = (
        price / (speed * 3600) * 1e6 if speed else math.inf for speed in (rate.value, rate.high, rate.low)
    )
    return Interval(value=value, low=low, high=high)


def rows(found: list[Level]) -> list[list[str]]:
    """The load table as text: head, then a row for each system and level."""
    head = ["system", "users", *HEAD.values(), "failed"]
    return [head, *([level.system, str(level.users), *map(_text, _metrics(level)), failed(level)] for level in found)]


def _metrics(level: Level) -> list[Measured | None]:
    return [level.metrics.get(name) for name in HEAD]


def _text(found: Measured | None) -> str:
    return f"{figure(found.interval.value)}{beneath(found)}" if found else "-"


def beneath(found: Measured) -> str:
    """The interval behind a figure: ` (398 to 430)`, with an open end where too few requests bound it, or nothing."""
    if found.unknown:
        return ""
    high = "?" if found.open_above else figure(found.interval.high)
    return f" ({figure(found.interval.low)} to {high})"


def figure(value: float) -> str:
    """Milliseconds or a rate as a person reads it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def failed(level: Level) -> str:
    """How many of how many requests failed."""
    return f"{level.failed} of {level.sent}"
