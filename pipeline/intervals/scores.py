"""Confidence intervals of scores between 0 and 1: their mean, and the paired difference of two systems' means.

Pure and deterministic. Intervals are two-sided and cover `confidence` in the long run; each side misses at most half of the rest.
Right or wrong answers have formulas of their own (proportions); graded scores go by empirical likelihood (likelihood). Items are
taken as independent draws from the traffic that the holdout stands for, or in groups. Limits: nothing here corrects for a holdout
that was looked at many times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.artifacts import Interval
from pipeline.intervals.groups import confidence_over_groups, design_effect, group_codes
from pipeline.intervals.likelihood import likelihood
from pipeline.intervals.proportions import tango, wilson

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def mean_interval(scores: Sequence[float] | Floats, confidence: float, groups: Sequence[str] | None = None) -> Interval:
    """The mean of scores between 0 and 1: Wilson's interval where all are 0 or 1, else by `likelihood`.

    For graded scores the limits are also bounded by Wilson's for (score = 1) and (score > 0). This keeps them monotone: a lower
    score never raises a limit. With `groups`, a name for each score, scores of one group count as one draw: see `design_effect`
    and `effective_groups`.
    """
    import numpy as np

    values, codes = np.asarray(scores, dtype=float), group_codes(groups)
    effect, level = design_effect(values, codes), confidence_over_groups(confidence, codes)
    size = len(values) / effect
    full, above_zero = (wilson(float(part.mean()) * size, size, level) for part in (values >= 1, values > 0))
    if is_binary(values):
        return full
    interval = likelihood(values, (0.0, 1.0), effect, level)
    return interval if _leaves(values, 0.0, 1.0) else _narrowed(interval, full.low, above_zero.high)


def difference_interval(
    ours: Sequence[float], theirs: Sequence[float], confidence: float, groups: Sequence[str] | None = None
) -> Interval:
    """The mean difference of two systems' scores on the same items, ours minus theirs.

    0/1 scores: Tango's interval. Graded scores: `likelihood`, and as in `mean_interval` also bounded by Tango's limits for all
    differences rounded down (lower limit) or up (upper limit). `groups` as in `mean_interval`.
    """
    import numpy as np

    first, second = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"paired scores must be of one length, not {len(first)} and {len(second)}")
    gap, codes = first - second, group_codes(groups)
    effect, level = design_effect(gap, codes), confidence_over_groups(confidence, codes)

    def of_signs(whole: Floats) -> Interval:
        better, worse = int((whole > 0).sum()), int((whole < 0).sum())
        return tango(better / effect, worse / effect, len(whole) / effect, level)

    down = of_signs(np.floor(gap))
    if is_binary(np.abs(gap)):
        return down
    interval = likelihood(gap, (-1.0, 1.0), effect, level)
    return interval if _leaves(gap, -1.0, 1.0) else _narrowed(interval, down.low, of_signs(np.ceil(gap)).high)


def is_binary(values: Floats) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())


def _leaves(values: Floats, least: float, most: float) -> bool:
    """Whether some values lie outside: an lm-eval metric that isn't a share is shown, and can't be gated."""
    return bool((values < least).any() or (values > most).any())


def _narrowed(interval: Interval, low: float, high: float) -> Interval:
    return Interval(value=interval.value, low=max(interval.low, low), high=min(interval.high, high))
