from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from pipeline.intervals.proportions import tango, wilson

Z = norm.ppf(0.975)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (1, 50), (81, 263), (20, 20), (500, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_scipys(successes, n, confidence):
    """Wilson's interval equals scipy's, at the edges too."""
    interval = wilson(successes, n, confidence)
    reference = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert interval.value == successes / n


def test_wilson_gives_the_published_example():
    """Newcombe (1998) gives 0.2553 to 0.3662 for 81 of 263."""
    interval = wilson(81, 263, 0.95)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def tango_by_quartic(b: int, c: int, n: int) -> tuple[float, float]:
    """Tango's limits as roots of the quartic of Yang, Sun and Hardin (Statistics in Medicine 32, 2013)."""
    g = Z**2
    gap, both = b - c, b + c
    roots = np.roots(
        [
            n**2 * (n / g + 1) ** 2,
            -n * gap * (n / g + 1) * (4 * n / g + 1),
            2 * n * gap**2 * (3 * n / g + 2) / g - n**2 * (both / g + 1),
            n * gap * (2 * both / g + 1) - gap**3 * (4 * n / g + 1) / g,
            gap**2 * (gap**2 / g - both) / g,
        ]
    )
    real = sorted(root.real for root in roots if abs(root.imag) < 1e-7)
    return real[0], real[-1]


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (6, 16, 161), (40, 20, 160), (12, 2, 200), (3, 9, 32)])
def test_tango_agrees_with_its_closed_form(b, c, n):
    """The limits interval by bisection are the roots of the published non-iterative solution."""
    interval = tango(b, c, n, 0.95)
    assert (interval.low, interval.high) == pytest.approx(tango_by_quartic(b, c, n), abs=1e-6)
    assert interval.value == (b - c) / n


def test_tango_excludes_zero_exactly_when_mcnemar_rejects():
    """At no difference the score statistic is McNemar's (b - c) / sqrt(b + c)."""
    for b in range(15):
        for c in range(15):
            if b + c and abs(abs(b - c) / math.sqrt(b + c) - Z) > 1e-9:
                interval = tango(b, c, 60, 0.95)
                assert (interval.low > 0 or interval.high < 0) == (abs(b - c) / math.sqrt(b + c) > Z), (b, c)


def test_tango_is_antisymmetric_and_stays_within_one():
    """Swapping the systems mirrors the interval, and no limit leaves -1 to 1, even where one wins all."""
    for b, c, n in [(0, 0, 1), (5, 0, 5), (0, 5, 5), (3, 1, 50), (0, 1, 30)]:
        one, other = tango(b, c, n, 0.95), tango(c, b, n, 0.95)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
        assert -1 <= one.low <= one.value <= one.high <= 1


def test_tango_covers_the_truth():
    """In 2,000 simulated holdouts of 150 items the 95 % interval holds the true difference in about 95 %."""
    rng = np.random.default_rng(1)
    counts = rng.multinomial(150, [0.08, 0.03, 0.89], size=2000)
    inside = 0
    for b, c, _ in counts:
        interval = tango(int(b), int(c), 150, 0.95)
        inside += interval.low <= 0.05 <= interval.high
    assert 0.935 <= inside / 2000 <= 0.97
