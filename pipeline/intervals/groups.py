"""Items that come in groups, such as tickets of one customer: how many independent draws they are worth.

Pure. A design effect divides the counts that a formula for independent items takes; few groups also ask for more confidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.intp]

ENOUGH_GROUPS = 15  # with so many groups that hold anything but the commonest value, their variance can be estimated
HIGHEST_CONFIDENCE = 1 - 1e-9


def group_codes(groups: Sequence[str] | None) -> Indices | None:
    """Groups as numbers from 0, a number for each item; None for independent items."""
    import numpy as np

    return None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]


def effective_groups(codes: Sequence[str] | Indices) -> float:
    """How many groups of one size would be as good as these: (sum of sizes)² / (sum of squared sizes).

    A. V. Carter, K. T. Schnepel and D. G. Steigerwald, Review of Economics and Statistics 99:698-709, 2017, for groups of
    identical items: the least favourable case.
    """
    sizes = Counter(list(codes)).values()
    return sum(sizes) ** 2 / sum(size**2 for size in sizes) if sizes else 0.0


def confidence_over_groups(confidence: float, codes: Indices | None) -> float:
    """The confidence whose normal quantile equals Student's t at `confidence`, for a variance estimated from groups.

    Degrees of freedom: one less than there are effective groups, as G. W. Imbens and M. Kolesár advise (Review of Economics and
    Statistics 98:701-712, 2016), here with Carter's count in place of theirs.
    """
    from scipy.stats import norm, t

    if codes is None:
        return confidence
    quantile = t.ppf(0.5 + confidence / 2, max(1.0, effective_groups(codes) - 1))
    return min(HIGHEST_CONFIDENCE, float(2 * norm.cdf(quantile) - 1))


def design_effect(values: Floats, codes: Indices | None) -> float:
    """How many grouped items are worth one independent item, for the mean of `values`; at least 1.

    The effect is (variance of the mean over groups) / (variance of the mean over items). Counts divided by it let formulas for
    independent items hold for grouped ones (J. N. K. Rao and A. J. Scott, Biometrics 48:577-585, 1992).

    - The variance over groups is the jackknife's, which leaves out a group at a time. A large group draws the mean to itself,
      and would otherwise seem to lie close to it.
    - Where fewer than ENOUGH_GROUPS groups hold anything but the commonest value, that variance is badly known. The effect is
      then at least that of groups of identical items: (sum of squared sizes) / (number of items).
    """
    import numpy as np

    if codes is None:
        return 1.0
    sizes = np.bincount(codes)
    effect_of_identical = float((sizes**2).sum() / len(values))
    levels, counts = np.unique(values, return_counts=True)
    odd = values != levels[counts.argmax()]
    if not odd.any() or len(sizes) == 1:
        return effect_of_identical
    apart = values - values.mean()
    between = np.bincount(codes, apart) / (1 - sizes / len(values))
    effect = max(1.0, (1 - 1 / len(sizes)) * float((between**2).sum() / (apart**2).sum()))
    return effect if len(set(codes[odd].tolist())) >= ENOUGH_GROUPS else max(effect, effect_of_identical)
