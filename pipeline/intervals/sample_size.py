"""How many items a comparison needs. Standard library only, so that `tunegate check` can say it at once."""

from __future__ import annotations

import math
from statistics import NormalDist

POWER = 0.9
DIFFERING = 0.1


def items_for_margin(
    margin: float, variance: float, confidence: float, power: float = POWER, comparisons: int = 1
) -> int:
    """How many items prove non-inferiority by `margin`, with probability `power`, when two systems are equally good.

    `variance`: of the paired difference of an item's scores; for right or wrong answers the share of items that only one
    system gets right. n = (z + z_power)²·variance / margin², the normal approximation for paired proportions
    (R. J. Connor, Biometrics 43:207-211, 1987, at no difference). As many show a loss of the whole margin to be one. Where
    all of several `comparisons` must pass, each may miss its part of 1 - power only. Items in groups: `variance` times their
    design effect.
    """
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) + NormalDist().inv_cdf(1 - (1 - power) / comparisons)
    return math.ceil(reach**2 * variance / margin**2)
