"""Confidence intervals: for scores, for paired differences of scores, for macro-F1.

Pure and deterministic. All intervals are two-sided and cover `confidence` in the long run, each side missing at most half of
the rest; which formula is used where, and what it assumes, stands at each function. Right or wrong answers have formulas of
their own (Wilson, Tango); all else goes by empirical likelihood. Items are taken as independent draws from the traffic that
the holdout stands for; nothing here corrects for a holdout that was looked at many times.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.artifacts import Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.intp]

ENOUGH_GROUPS = 15  # groups with anything but the commonest value, from which their variance is known
UNSEEN = 0.18668  # u(1 - ln u) = 1/2: with u·z² items more of the worst score, likelihood goes where Wilson's does if all are right
SUREST = 1 - 1e-9


def normal_quantile(confidence: float) -> float:
    """The z of a two-sided interval: 1.96 for 0.95."""
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2))


def wilson(successes: float, n: float, confidence: float) -> Interval:
    """A proportion's interval by Wilson's score method (Wilson 1927); never empty, never outside 0 to 1.

    `successes` may be fractional: the mean of scores between 0 and 1 varies at most as much as a proportion
    of the same value, so the interval then errs on the wide side.
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


def mean_interval(scores: Sequence[float] | Floats, confidence: float, groups: Sequence[str] | None = None) -> Interval:
    """The mean of scores between 0 and 1: Wilson's interval where all are 0 or 1, else by `likelihood`.

    Graded scores are never known less well than the full marks among them, or the scores above 0, as right or wrong: so a
    worse score never lifts a limit, whichever formula it leaves or comes to. With `groups`, one a score, scores of one group
    count as one draw: see `design_effect` and `effective_groups`.
    """
    import numpy as np

    values, codes = np.asarray(scores, dtype=float), _codes(groups)
    effect, level = design_effect(values, codes), _level(confidence, codes)
    size = len(values) / effect
    full, some = (wilson(float(part.mean()) * size, size, level) for part in (values >= 1, values > 0))
    if is_binary(values):
        return full
    found = likelihood(values, (0.0, 1.0), effect, level)
    return found if _leaves(values, 0.0, 1.0) else _narrowed(found, full.low, some.high)


def difference_interval(
    ours: Sequence[float], theirs: Sequence[float], confidence: float, groups: Sequence[str] | None = None
) -> Interval:
    """The mean difference of two systems' scores on the same items, ours minus theirs.

    0/1 scores: Tango's interval; else by `likelihood`, and never known less well than Tango's with all differences rounded
    down, for the lower limit, or up, as in `mean_interval`. `groups` likewise.
    """
    import numpy as np

    first, second = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"paired scores must be of one length, not {len(first)} and {len(second)}")
    gap, codes = first - second, _codes(groups)
    effect, level = design_effect(gap, codes), _level(confidence, codes)

    def rounded(whole: Floats) -> Interval:
        better, worse = int((whole > 0).sum()), int((whole < 0).sum())
        return tango(better / effect, worse / effect, len(whole) / effect, level)

    down = rounded(np.floor(gap))
    if is_binary(np.abs(gap)):
        return down
    found = likelihood(gap, (-1.0, 1.0), effect, level)
    return found if _leaves(gap, -1.0, 1.0) else _narrowed(found, down.low, rounded(np.ceil(gap)).high)


def _leaves(values: Floats, least: float, most: float) -> bool:
    """Whether some lie outside: an lm-eval metric that is no share can't be gated, and is shown."""
    return bool((values < least).any() or (values > most).any())


def _narrowed(found: Interval, low: float, high: float) -> Interval:
    return Interval(value=found.value, low=max(found.low, low), high=min(found.high, high))


def likelihood(values: Floats, span: tuple[float, float], effect: float, confidence: float) -> Interval:
    """A mean's interval by empirical likelihood, which takes any distribution (A. B. Owen, Biometrika 75:237-249, 1988).

    A sample says nothing of losses too rare to be in it. So the lower limit is found as if UNSEEN·z² items more had the
    least score of `span`, the upper one as if they had the most: adjusted empirical likelihood (J. Chen, A. M. Variyath and
    B. Abraham, Journal of Computational and Graphical Statistics 17:426-443, 2008) with the adjustment at the worst. Of 0/1
    scores it is a little wider than Wilson's and Tango's intervals, everywhere. A worse score never lifts a limit. Counts are
    divided by the design `effect`.
    """
    least, most = min(span[0], float(values.min())), max(span[1], float(values.max()))
    low = least + _least_mean(values - least, effect, confidence)
    high = most - _least_mean(most - values, effect, confidence)
    value = float(values.mean())
    return Interval(value=value, low=min(low, value), high=max(high, value))


def _least_mean(values: Floats, effect: float, confidence: float) -> float:
    """The least mean not rejected by empirical likelihood, of values that can't be below 0.

    Twice the log likelihood ratio is twice the most, over t from 0 to 1, of the sum of log(1 - t + t·value/mean), the items
    unseen being values of 0: the dual of Owen's problem. It falls as the mean grows.
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


def _codes(groups: Sequence[str] | None) -> Indices | None:
    """Groups as numbers from 0, one an item."""
    import numpy as np

    return None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]


def effective_groups(codes: Sequence[str] | Indices) -> float:
    """How many groups of one size would be as good as these: (sum of sizes)² by the sum of squared sizes.

    A. V. Carter, K. T. Schnepel and D. G. Steigerwald, Review of Economics and Statistics 99:698-709, 2017, for groups of
    identical items: the least favourable case.
    """
    sizes = Counter(list(codes)).values()
    return sum(sizes) ** 2 / sum(size**2 for size in sizes) if sizes else 0.0


def _level(confidence: float, codes: Indices | None) -> float:
    """The confidence at which the normal quantile is Student's t at the given one, for a variance known from groups.

    With one degree of freedom less than there are effective groups, as G. W. Imbens and M. Kolesár advise (Review of
    Economics and Statistics 98:701-712, 2016), here with Carter's count in place of theirs.
    """
    from scipy.stats import norm, t

    if codes is None:
        return confidence
    quantile = t.ppf(0.5 + confidence / 2, max(1.0, effective_groups(codes) - 1))
    return min(SUREST, float(2 * norm.cdf(quantile) - 1))


def design_effect(values: Floats, codes: Indices | None) -> float:
    """How many times more items in groups it takes than independent ones for the same certainty about their mean.

    The variance of the mean over groups by that over items, at least 1; dividing the counts by it lets formulas for
    independent items hold for grouped ones (J. N. K. Rao and A. J. Scott, Biometrics 48:577-585, 1992). The former is the
    jackknife's, that leaves out a group at a time: a large group draws the mean to itself and would else look as if it lay
    close to it. Where fewer than ENOUGH_GROUPS hold anything but the commonest value, that variance is hardly known, and the
    effect is at least what groups of identical items would have: the sum of squared sizes by the number of items.
    """
    import numpy as np

    if codes is None:
        return 1.0
    sizes = np.bincount(codes)
    alike = float((sizes**2).sum() / len(values))
    found, counts = np.unique(values, return_counts=True)
    odd = values != found[counts.argmax()]
    if not odd.any() or len(sizes) == 1:
        return alike
    apart = values - values.mean()
    between = np.bincount(codes, apart) / (1 - sizes / len(values))
    effect = max(1.0, (1 - 1 / len(sizes)) * float((between**2).sum() / (apart**2).sum()))
    return effect if len(set(codes[odd].tolist())) >= ENOUGH_GROUPS else max(effect, alike)


def is_binary(values: Floats) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())


def tango(better: float, worse: float, n: float, confidence: float) -> Interval:
    """The difference of two paired proportions, (better - worse) / n, by Tango's score interval.

    `better` items are right only with us, `worse` only with them. The limits are the differences d at which
    the score statistic (b - c - n·d) / sqrt(n·(2q + d·(1 - d))) is ±z, q being the constrained maximum
    likelihood estimate of the share of worse items (T. Tango, Statistics in Medicine 17:891-908, 1998). At d
    = 0 it is McNemar's statistic, so the interval leaves out 0 exactly when McNemar's test rejects. Counts may be
    fractional, as counts of grouped items divided by their design effect are.
    """
    z = normal_quantile(confidence)
    value = (better - worse) / n

    def score(d: float) -> float:
        linear = -better - worse + (2 * n - better + worse) * d
        root = math.sqrt(max(0.0, linear * linear + 8 * n * worse * d * (1 - d)))
        variance = n * (2 * (root - linear) / (4 * n) + d * (1 - d))
        gap = better - worse - n * d
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    low = -1.0 if value == -1 else _falling_root(lambda d: score(d) - z, -1.0, value)
    high = 1.0 if value == 1 else _falling_root(lambda d: score(d) + z, value, 1.0)
    return Interval(value=value, low=low, high=high)


def _falling_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between `low` and `high`, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def f1_macro(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Macro-averaged F1 over the labels that are expected somewhere, as sklearn's f1_score computes it.

    A made-up label counts as a miss of the expected one, not as a class of its own: a model that chatters
    would otherwise be averaged over hundreds of classes that nobody asked for.
    """
    from sklearn.metrics import f1_score

    labels = sorted(set(expected))
    return float(f1_score(expected, predicted, labels=labels, average="macro", zero_division=0.0))


def f1_macro_interval(
    expected: Sequence[str], predicted: Sequence[str], confidence: float, groups: Sequence[str] | None = None
) -> Interval:
    """Macro-F1 with an interval by `_of_pseudo_values`; the items unseen are misses of the class that they cost most."""
    counts = _LabelCounts(expected, predicted)
    miss, hit, false = counts.changes()
    span = (float(miss.min()) + false, float(hit.max()))
    return _of_pseudo_values(counts.value(), counts.without_each(), span, (0.0, 1.0), confidence, groups)


def f1_macro_difference_interval(
    expected: Sequence[str],
    ours: Sequence[str],
    theirs: Sequence[str],
    confidence: float,
    groups: Sequence[str] | None = None,
) -> Interval:
    """The difference of two systems' macro-F1 on the same items, as `f1_macro_interval`: unseen is what only one gets right."""
    mine, other = _LabelCounts(expected, ours), _LabelCounts(expected, theirs)
    (miss, hit, false), (their_miss, their_hit, their_false) = mine.changes(), other.changes()
    span = (float((miss - their_hit).min()) + false, float((hit - their_miss).max()) - their_false)
    without = mine.without_each() - other.without_each()
    return _of_pseudo_values(mine.value() - other.value(), without, span, (-1.0, 1.0), confidence, groups)


def _of_pseudo_values(
    value: float,
    without: Floats,
    changes: tuple[float, float],
    bounds: tuple[float, float],
    confidence: float,
    groups: Sequence[str] | None,
) -> Interval:
    """A statistic's interval from its values `without` each item: jackknife empirical likelihood.

    B.-Y. Jing, J. Yuan and W. Zhou, Journal of the American Statistical Association 104:1224-1232, 2009: pseudo-values n·T -
    (n - 1)·T(without the item) are taken for independent. `changes`: the most by which one further item lowers or raises T.
    """
    n, codes = len(without), _codes(groups)
    values = value + (n - 1) * (value - without)
    span = (value + (n + 1) * changes[0], value + (n + 1) * changes[1])
    found = likelihood(values, span, design_effect(values, codes), _level(confidence, codes))
    low, high = min(found.low, value), max(found.high, value)
    return Interval(value=value, low=max(bounds[0], low), high=min(bounds[1], high))


class _LabelCounts:
    """How often each expected class was asked for, answered, and both: what macro-F1 is made from."""

    def __init__(self, expected: Sequence[str], predicted: Sequence[str]) -> None:
        import numpy as np

        names = {label: code for code, label in enumerate(sorted(set(expected)))}
        self.classes = len(names)
        self.truth = np.array([names[label] for label in expected])
        self.guess = np.array([names.get(label, self.classes) for label in predicted])
        rows = (self.truth, self.guess, self.truth[self.truth == self.guess])
        self.asked, self.answered, self.both = (
            np.bincount(row, minlength=self.classes + 1)[: self.classes].astype(float) for row in rows
        )

    def value(self) -> float:
        """`f1_macro`, many times faster than sklearn's."""
        return float(_f1(self.both, self.asked, self.answered).mean())

    def without_each(self) -> Floats:
        """Macro-F1 without each item in turn; a class that is then not asked for is left out of the mean."""
        import numpy as np

        pairs, place = np.unique(np.stack((self.truth, self.guess)), axis=1, return_inverse=True)
        truth, guess = (row[:, None] == np.arange(self.classes) for row in pairs)
        asked = self.asked - truth
        f1 = _f1(self.both - (truth & guess), asked, self.answered - guess)
        of_each: Floats = (f1 * (asked > 0)).sum(axis=-1) / np.maximum((asked > 0).sum(axis=-1), 1)
        return of_each[place.ravel()]

    def changes(self) -> tuple[Floats, Floats, float]:
        """By how much macro-F1 changes with one more item of each class, missed or hit, and with one taken for another class.

        An answer costs the class that it names wrongly as much as a miss of that class does; which it is, is left to chance.
        """
        now = _f1(self.both, self.asked, self.answered)
        miss = _f1(self.both, self.asked + 1, self.answered)
        hit = _f1(self.both + 1, self.asked + 1, self.answered + 1)
        lost, won = (miss - now) / self.classes, (hit - now) / self.classes
        return lost, won, float((lost * self.asked).sum() / self.asked.sum())


def _f1(both: Floats, asked: Floats, answered: Floats) -> Floats:
    import numpy as np

    found: Floats = 2 * both / np.maximum(asked + answered, 1)
    return found


def items_to_decide(passing: Interval, failing: Interval, n: int, reach: float, broken: float) -> int | None:
    """About how many items would decide if the estimate stays; None: no number.

    Decided means that `passing` lies wholly above `reach` or `failing`, the interval at the confidence that a failure
    takes, wholly below `broken`. An interval's width falls with the square root of n.
    """
    wanted = [
        n * (side / distance) ** 2
        for side, distance in (
            (passing.value - passing.low, passing.value - reach),
            (failing.high - failing.value, broken - failing.value),
        )
        if distance > 0
    ]
    needed = min(wanted, default=math.inf)
    return max(n + 1, math.ceil(needed)) if needed < 1e7 else None
