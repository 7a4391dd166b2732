"""Confidence intervals of right or wrong answers: one proportion (Wilson), and the difference of two paired ones (Tango).

Pure and deterministic. Both intervals are two-sided score intervals.
"""

from __future__ import annotations

import math

from pipeline.artifacts import Interval

ROOT_TOLERANCE = 1e-14


def normal_quantile(confidence: float) -> float:
    """The z of a two-sided interval: 1.96 for 0.95."""
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2))


def wilson(successes: float, n: float, confidence: float) -> Interval:
    """A proportion's interval by Wilson's score method (Wilson 1927); never empty, never outside 0 to 1.

    `successes` may be fractional. The mean of scores between 0 and 1 varies at most as much as a proportion of the same value,
    so the interval then errs on the wide side.
    """
    z2 = normal_quantile(confidence) ** 2
    p = min(1.0, successes / n)
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(
        value=p,
        low=0.0 if p == 0 else max(0.0, middle - half),
        high=1.0 if p == 1 else min(1.0, middle + half),
    )


def tango(better: float, worse: float, n: float, confidence: float) -> Interval:
    """The difference of two paired proportions, (better - worse) / n, by Tango's score interval.

    `better` items are right only with us, `worse` only with them. With b = better, c = worse, the limits are the d at which

        (b - c - n·d) / sqrt(n·(2q + d·(1 - d))) = ±z

    where q is the constrained maximum likelihood estimate of the share of worse items (T. Tango, Statistics in Medicine
    17:891-908, 1998). At d = 0 the left side is McNemar's statistic: the interval leaves out 0 exactly when McNemar's test
    rejects. Counts may be fractional, as counts of grouped items divided by their design effect are.
    """
    from scipy.optimize import brentq

    z = normal_quantile(confidence)
    difference = (better - worse) / n

    def score(d: float) -> float:
        linear = -better - worse + (2 * n - better + worse) * d
        root = math.sqrt(max(0.0, linear * linear + 8 * n * worse * d * (1 - d)))
        variance = n * (2 * (root - linear) / (4 * n) + d * (1 - d))
        gap = better - worse - n * d
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    def limit(level: float, start: float, end: float) -> float:
        return float(brentq(lambda d: score(d) - level, start, end, xtol=ROOT_TOLERANCE))

    low = -1.0 if difference == -1 else limit(z, -1.0, difference)
    high = 1.0 if difference == 1 else limit(-z, difference, 1.0)
    return Interval(value=difference, low=low, high=high)
