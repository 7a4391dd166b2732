"""A mean's confidence interval by empirical likelihood, for scores of any distribution. Pure and deterministic."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.artifacts import Interval
from pipeline.intervals.proportions import normal_quantile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Solves u·(1 - ln u) = 1/2. With u·z² more items of the worst score, the limit is Wilson's where all answers are right.
UNSEEN = 0.18668


def likelihood(values: Floats, span: tuple[float, float], effect: float, confidence: float) -> Interval:
    """A mean's interval by empirical likelihood, which takes any distribution (A. B. Owen, Biometrika 75:237-249, 1988).

    A sample can't show losses too rare to be in it. So the lower limit is computed as if UNSEEN·z² more items had the least
    score of `span`, the upper one as if they had the highest. This is adjusted empirical likelihood (J. Chen, A. M. Variyath
    and B. Abraham, Journal of Computational and Graphical Statistics 17:426-443, 2008) with the adjustment at the worst.

    For 0/1 scores it is a little wider than Wilson's and Tango's intervals, everywhere. A lower score never raises a limit.
    Counts are divided by the design `effect`.
    """
    least, most = min(span[0], float(values.min())), max(span[1], float(values.max()))
    low = least + _least_mean(values - least, effect, confidence)
    high = most - _least_mean(most - values, effect, confidence)
    mean = float(values.mean())
    return Interval(value=mean, low=min(low, mean), high=max(high, mean))


def _least_mean(values: Floats, effect: float, confidence: float) -> float:
    """The least mean that empirical likelihood doesn't reject, of values that can't be below 0.

    The dual of Owen's problem, with u unseen items of value 0 and a maximum over t from 0 to 1:

        2·log likelihood ratio = 2·max(sum of log(1 - t + t·value / mean) + u·log(1 - t))

    It falls as the mean grows.
    """
    import numpy as np
    from scipy.optimize import brentq

    z2 = normal_quantile(confidence) ** 2
    unseen = UNSEEN * z2 * effect
    top = float(values.sum()) / (len(values) + unseen)

    def excess(mean: float) -> float:
        above = values / mean - 1

        def slope(t: float) -> float:
            return float((above / (1 + t * above)).sum()) - unseen / (1 - t)

        if slope(0.0) <= 0:
            return -z2
        t = brentq(slope, 0.0, 1 - 1e-12, xtol=1e-14)
        return 2 / effect * (float(np.log1p(t * above).sum()) + unseen * math.log1p(-t)) - z2

    bottom = top * 1e-9
    return float(brentq(excess, bottom, top, xtol=1e-10)) if top > 0 and excess(bottom) > 0 else 0.0
