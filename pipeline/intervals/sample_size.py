"""How many items a comparison needs: before there are any, and when some left it open.

Standard library only, so that `tunegate check` can answer at once.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.artifacts import Interval

POWER = 0.9
DIFFERING = 0.1
MOST_ITEMS = 1e7  # more are no advice


def items_for_margin(
    margin: float, variance: float, confidence: float, power: float = POWER, comparisons: int = 1
) -> int:
    """How many items prove non-inferiority by `margin`, with probability `power`, when two systems are equally good.

        n = (z + z_power)²·variance / margin²

    The normal approximation for paired proportions (R. J. Connor, Biometrics 43:207-211, 1987, at no difference). As many items
    show a loss of the whole margin to be a loss.

    - `variance` is that of the paired difference of an item's scores. For right or wrong answers it is the share of items that
      only one system gets right. Items in groups: `variance` times their design effect.
    - Where all of several `comparisons` must pass, each may miss its part of 1 - power only.
    """
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) + NormalDist().inv_cdf(1 - (1 - power) / comparisons)
    return math.ceil(reach**2 * variance / margin**2)


def items_to_decide(passing: Interval, failing: Interval, n: int, reach: float, broken_below: float) -> int | None:
    """About how many items would decide a check that `n` items left open, if the estimate stays; None: no number would.

    Decided means that `passing` lies wholly above `reach`, or `failing` wholly below `broken_below`. `failing` is the interval at
    the confidence that a failure takes. An interval's width falls with the square root of n.
    """
    sizes = [
        n * (side / distance) ** 2
        for side, distance in (
            (passing.value - passing.low, passing.value - reach),
            (failing.high - failing.value, broken_below - failing.value),
        )
        if distance > 0
    ]
    size = min(sizes, default=math.inf)
    return max(n + 1, math.ceil(size)) if size < MOST_ITEMS else None
