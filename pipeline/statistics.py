"""Confidence intervals: for scores, for paired differences of scores, for latencies and throughput.

Pure and deterministic: the bootstraps are seeded. All intervals are two-sided and cover `confidence` in the
long run; which formula is used where, and what it assumes, stands at each function. Items are taken as
independent draws from the traffic that the holdout stands for; nothing here corrects for a holdout that was
looked at many times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.artifacts import Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.intp]

RESAMPLES = 4000
SEED = 20240229
BATCH_ELEMENTS = 4_000_000
FEW_DIFFER = 20  # items or groups of which two systems' scores differ, below which a bootstrap knows too little
ENOUGH_GROUPS = 15  # groups with anything but the commonest value, from which their variance is known


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
    """The mean of scores: Wilson where all are 0 or 1, or in between and alike; else bootstrap BCa (Efron 1987).

    With `groups`, one a score, scores of one group count as one draw: Wilson's with the effective number of items,
    the bootstrap over groups.
    """
    import numpy as np

    values = np.asarray(scores, dtype=float)
    codes = _codes(groups)
    size = len(values) / design_effect(values, codes)
    of_shares = bool(((values >= 0) & (values <= 1)).all())
    if of_shares and (is_binary(values) or np.ptp(values) == 0 or _units(values, codes) < 2):
        return wilson(float(values.mean()) * size, size, confidence)
    return _bootstrap_mean(values, codes, confidence)


def difference_interval(
    ours: Sequence[float], theirs: Sequence[float], confidence: float, groups: Sequence[str] | None = None
) -> Interval:
    """The mean difference of two systems' scores on the same items, ours minus theirs.

    0/1 scores: Tango's score interval; others: bootstrap BCa over the items' differences. Where few items (or groups)
    differ, the bootstrap knows too little of those that might: it is then never narrower than Tango's for so many
    discordant pairs, which for none is ±z²/(n+z²), because agreeing on n items is no proof of being alike. Where all
    differ by the same, Wilson's interval of (difference + 1) / 2 is stretched back, for the like reason. With `groups`
    as in `mean_interval`.
    """
    import numpy as np

    first, second = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"paired scores must be of one length, not {len(first)} and {len(second)}")
    gap, codes = first - second, _codes(groups)
    if gap.any() and np.ptp(gap) == 0 and not is_binary(np.abs(gap)):
        as_share = mean_interval((gap + 1) / 2, confidence, groups)
        return Interval(value=float(gap[0]), low=2 * as_share.low - 1, high=2 * as_share.high - 1)
    effect = design_effect(gap, codes)
    better, worse = int((gap > 0).sum()), int((gap < 0).sum())
    by_signs = tango(better / effect, worse / effect, len(gap) / effect, confidence)
    if is_binary(np.abs(gap)):
        return by_signs
    if _units(gap, codes) < 2:
        return Interval(value=float(gap.mean()), low=-1.0, high=1.0)
    found = _bootstrap_mean(gap, codes, confidence)
    if _units(gap[gap != 0], None if codes is None else codes[gap != 0]) >= FEW_DIFFER:
        return found
    return Interval(value=found.value, low=min(found.low, by_signs.low), high=max(found.high, by_signs.high))


def _codes(groups: Sequence[str] | None) -> Indices | None:
    """Groups as numbers from 0, one an item."""
    import numpy as np

    return None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]


def _units(values: Floats, codes: Indices | None) -> int:
    """How many independent draws there are: items, or groups of them."""
    return len(values) if codes is None else len(set(codes.tolist()))


def _bootstrap_mean(values: Floats, codes: Indices | None, confidence: float) -> Interval:
    """The mean's bootstrap interval, over items or over whole groups of them."""
    import numpy as np

    if codes is None:
        return bootstrap(lambda chosen: values[chosen].mean(axis=-1), len(values), confidence)
    sums, sizes = np.bincount(codes, values), np.bincount(codes)
    return bootstrap(lambda chosen: sums[chosen].sum(axis=-1) / sizes[chosen].sum(axis=-1), len(sizes), confidence)


def design_effect(values: Floats, codes: Indices | None) -> float:
    """How many times more items in groups it takes than independent ones for the same certainty about their mean.

    The variance of the mean over groups by that over items, at least 1; dividing the counts by it lets formulas for
    independent items hold for grouped ones (J. N. K. Rao and A. J. Scott, Biometrics 48:577-585, 1992). Where fewer than
    ENOUGH_GROUPS hold anything but the commonest value, that variance is hardly known, and the effect is at least what
    groups of identical items would have: the sum of squared sizes by the number of items.
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
    between = np.bincount(codes, apart)
    effect = max(1.0, len(sizes) / (len(sizes) - 1) * float((between**2).sum() / (apart**2).sum()))
    return effect if _units(values[odd], codes[odd]) >= ENOUGH_GROUPS else max(effect, alike)


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


def bootstrap(statistic: Callable[[Indices], Floats], n: int, confidence: float) -> Interval:
    """A seeded bootstrap BCa interval of a statistic of n items; percentile where BCa isn't defined.

    `statistic` maps item indices, any shape (..., n), to values of shape (...).
    """
    import warnings

    import numpy as np
    from scipy import stats

    def limits(method: str) -> tuple[float, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a degenerate jackknife; see below
            found = stats.bootstrap(
                (np.arange(n),),
                lambda chosen, axis: statistic(np.moveaxis(chosen, axis, -1)),
                n_resamples=RESAMPLES,
                batch=max(1, BATCH_ELEMENTS // n),
                vectorized=True,
                axis=-1,
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(SEED),
            ).confidence_interval
        return float(found.low), float(found.high)

    value = float(statistic(np.arange(n)))
    low, high = limits("BCa")
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = limits("percentile")
    return Interval(value=value, low=min(low, value), high=max(high, value))


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
    """Macro-F1 with a bootstrap BCa interval over the items, or over groups of them; Wilson's where no resample differs."""
    import numpy as np

    statistic, units = _f1_macro_of(expected, predicted, groups)
    value = float(statistic(np.arange(units)))
    found = bootstrap(statistic, units, confidence) if units > 1 else Interval(value=value, low=value, high=value)
    return found if found.low < found.high else wilson(value * units, units, confidence)


def f1_macro_difference_interval(
    expected: Sequence[str],
    ours: Sequence[str],
    theirs: Sequence[str],
    confidence: float,
    groups: Sequence[str] | None = None,
) -> Interval:
    """The difference of two systems' macro-F1 on the same items, by the paired bootstrap.

    Where no resample differs, as for no discordant pair in `difference_interval`.
    """
    (mine, units), (other, _) = _f1_macro_of(expected, ours, groups), _f1_macro_of(expected, theirs, groups)
    if units > 1:
        found = bootstrap(lambda chosen: mine(chosen) - other(chosen), units, confidence)
        if found.low < found.high:
            return found
    return tango(0, 0, units, confidence)


def _f1_macro_of(
    expected: Sequence[str], predicted: Sequence[str], groups: Sequence[str] | None
) -> tuple[Callable[[Indices], Floats], int]:
    """`f1_macro` of resampled units (items, or groups of them), from counts, and how many units there are.

    Many times faster than sklearn on each resample. A class that a resample lacks is left out of its mean.
    """
    import numpy as np

    names = {label: code for code, label in enumerate(sorted(set(expected)))}
    classes = len(names)
    truth = np.array([names[label] for label in expected])
    guess = np.array([names.get(label, classes) for label in predicted])
    codes = _codes(groups)
    unit = np.arange(len(truth)) if codes is None else codes
    units = int(unit.max()) + 1

    def table(labels: NDArray[np.intp], chosen: NDArray[np.bool_]) -> Floats:
        """How often each class occurs in each unit: (units, classes)."""
        found = np.zeros((units, classes + 1))
        np.add.at(found, (unit[chosen], labels[chosen]), 1.0)
        return found[:, :classes]

    every = np.ones(len(truth), dtype=bool)
    support, guessed, hits = table(truth, every), table(guess, every), table(truth, truth == guess)

    def statistic(chosen: Indices) -> Floats:
        rows = chosen.reshape(-1, chosen.shape[-1])
        shifted = rows + units * np.arange(len(rows))[:, None]
        times = np.bincount(shifted.ravel(), minlength=len(rows) * units).reshape(len(rows), units).astype(float)
        present = times @ support
        f1 = 2 * (times @ hits) / np.maximum(present + times @ guessed, 1)
        averaged: Floats = (f1 * (present > 0)).sum(axis=-1) / (present > 0).sum(axis=-1)
        return averaged.reshape(chosen.shape[:-1])

    return statistic, units


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
