from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from pipeline.artifacts import LoadLevel
from pipeline.intervals import load

RNG = np.random.default_rng(5)


def level(e2el: list[list[float]], metrics: dict[str, tuple[float, ...]], **samples) -> LoadLevel:
    """A level whose requests took these milliseconds, ten tokens each."""
    samples = {"e2el_ms": e2el, "output_tokens": [[10.0] * len(repeat) for repeat in e2el], **samples}
    return LoadLevel(
        max_concurrency=4, completed=sum(map(len, e2el)), failed=0, metrics=metrics,
        samples={name: tuple(map(tuple, repeats)) for name, repeats in samples.items()},
    )  # fmt: skip


def test_a_percentile_is_bounded_by_order_statistics():
    """Of 100 sorted values the median's 95 % limits are the 40th and the 61st (Conover's ranks)."""
    values = np.arange(1.0, 101.0)
    median = load.quantile_interval(values, 0.5, 0.95)
    assert (median.interval.low, median.interval.high, median.open_above) == (40.0, 61.0, False)


@pytest.mark.parametrize(("share", "needed"), [(0.5, 6), (0.95, 72), (0.99, 368)])
def test_too_few_requests_leave_a_percentile_open_above(share, needed):
    """The number of requests named is the smallest that bounds the percentile."""
    assert load.requests_needed(share, 0.95) == needed
    assert not load.quantile_interval(np.arange(float(needed)), share, 0.95).open_above
    assert load.quantile_interval(np.arange(float(needed - 1)), share, 0.95).open_above


def test_a_percentiles_interval_covers_the_truth():
    """Of 300 simulated runs about 95 % hold the true 95th percentile."""
    truth = -np.log(0.05)
    inside = 0
    for _ in range(300):
        interval = load.quantile_interval(RNG.exponential(size=150), 0.95, 0.95).interval
        inside += interval.low <= truth <= interval.high
    assert inside / 300 >= 0.93


def test_gaps_of_one_answer_are_not_taken_as_independent():
    """Where whole answers are slow or fast, the interval is that of few answers, not of many gaps."""
    pace = np.repeat(RNG.uniform(5, 50, size=30), 50)
    sizes = np.full(30, 50)
    clustered = load.clustered_quantile_interval(pace, sizes, 0.5, 0.95).interval
    independent = load.quantile_interval(pace, 0.5, 0.95).interval
    assert clustered.high - clustered.low > 2 * (independent.high - independent.low)


def test_a_gap_percentiles_interval_covers_the_truth():
    """With a pace of its own for each answer, Woodruff's interval holds the truth in about 95 % of runs."""
    truth = float(np.quantile(RNG.lognormal(0, 0.5, 400_000) * RNG.exponential(size=400_000), 0.9))
    inside = 0
    for _ in range(200):
        gaps = np.concatenate([RNG.lognormal(0, 0.5) * RNG.exponential(size=20) for _ in range(100)])
        interval = load.clustered_quantile_interval(gaps, np.full(100, 20), 0.9, 0.95).interval
        inside += interval.low <= truth <= interval.high
    assert inside / 200 >= 0.9


def test_throughput_of_one_run_has_the_spread_of_its_requests():
    """The relative width is that of the ratio of tokens to seconds over requests."""
    seconds = RNG.uniform(1, 3, size=200)
    interval = load.throughput_interval(50.0, np.full(200, 10.0), seconds, 0.95).interval
    expected = 1.96 * seconds.std(ddof=1) / seconds.mean() / np.sqrt(200)
    assert interval.value == 50.0
    assert (interval.high - 50) / 50 == pytest.approx(expected, rel=0.02)


def test_three_repeats_are_judged_by_their_own_spread():
    """With repeats the interval is Student's t over them, whatever the requests inside say."""
    runs = level([[100.0] * 80] * 3, {"p95_e2el_ms": (90.0, 100.0, 125.0)})
    latency = load.measured(runs, "p95_e2el_ms", 0.95)
    half = t.ppf(0.975, 2) * np.std([90, 100, 125], ddof=1) / np.sqrt(3)
    assert (latency.interval.low, latency.interval.high) == pytest.approx((105 - half, 105 + half))
    assert not latency.open_above


def test_repeats_of_a_few_requests_do_not_bound_a_tail():
    """Three runs of ten requests have no upper bound for a 99th percentile, however alike they are."""
    runs = level([[100.0] * 10] * 3, {"p99_e2el_ms": (100.0, 100.0, 100.0)})
    assert load.measured(runs, "p99_e2el_ms", 0.95).open_above


def test_one_repeat_without_samples_is_unknown():
    """A bare figure gets no made-up interval."""
    bare = LoadLevel(max_concurrency=1, completed=9, failed=0, metrics={"output_throughput": (40.0,)})
    throughput = load.measured(bare, "output_throughput", 0.95)
    assert throughput.unknown
    assert throughput.interval.value == 40.0


def test_nothing_finished_is_nothing_measured():
    """A level without a finished request has no figures, also where bench wrote zeros."""
    dead = LoadLevel(max_concurrency=1, completed=0, failed=9, metrics={"p50_e2el_ms": (0.0,)})
    assert load.measured(dead, "p50_e2el_ms", 0.95) is None
