"""Confidence intervals for the figures of a load test: percentiles of latencies, and throughput.

With three or more repeats the interval is Student's t over them, which includes whatever moves a whole run. With fewer it comes
from the requests inside the run, taken as independent. Limits of the latter: a noisy neighbour or a cold cache stays unseen, and
requests that share a batch aren't quite independent. One repeat is therefore weak evidence. Pure; no random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pipeline.artifacts import Interval, LoadLevel
from pipeline.intervals.proportions import normal_quantile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ENOUGH_REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """An interval and the evidence that it rests on.

    - `open_above`: too few requests for any upper bound at this confidence; `high` is only the largest value seen. An upper
      bound takes `least_requests`, where that number is known.
    - `unknown`: no samples to make an interval from; `low` and `high` are the value itself.
    - `over_runs`: it rests on repeated runs, so it includes how runs differ.
    """

    interval: Interval
    how: str
    open_above: bool = False
    least_requests: int | None = None
    unknown: bool = False
    over_runs: bool = False


def measured(level: LoadLevel, metric: str, confidence: float) -> Measured | None:
    """One metric of one level with its interval; None where no request finished or it wasn't measured."""
    values = level.metrics.get(metric, ())
    if not values or not level.completed:
        return None
    within = _within_runs(level, metric, confidence)
    if len(values) < ENOUGH_REPEATS:
        mean = sum(values) / len(values)
        return within or Measured(Interval(value=mean, low=mean, high=mean), "no per-request samples", unknown=True)
    return Measured(
        over_repeats(values, confidence),
        f"t interval over {len(values)} repeats",
        open_above=within is not None and within.open_above,
        least_requests=within.least_requests if within else None,
        over_runs=True,
    )


def over_repeats(values: tuple[float, ...], confidence: float) -> Interval:
    """The mean of one value a repeat with Student's t interval, cut at 0 as times and rates are."""
    import numpy as np
    from scipy.stats import t

    mean = float(np.mean(values))
    half = float(t.ppf(0.5 + confidence / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(value=mean, low=max(0.0, mean - half), high=mean + half)


def _within_runs(level: LoadLevel, metric: str, confidence: float) -> Measured | None:
    """The interval from the requests of all repeats, or None without samples."""
    import numpy as np

    def pooled(name: str) -> Floats:
        return np.array([value for repeat in level.samples.get(name, ()) for value in repeat], dtype=float)

    if metric in ("output_throughput", "request_throughput"):
        seconds = pooled("e2el_ms") / 1000
        work = pooled("output_tokens") if metric == "output_throughput" else np.ones_like(seconds)
        rate = float(np.mean(level.metrics[metric]))
        return throughput_interval(rate, work, seconds, confidence) if len(seconds) > 1 else None
    percentile, latency, _ = metric.split("_")
    share, values = int(percentile[1:]) / 100, pooled(f"{latency}_ms")
    if not len(values):
        return None
    if latency == "itl":
        return clustered_quantile_interval(values, pooled("gaps").astype(int), share, confidence)
    return quantile_interval(values, share, confidence)


def quantile_interval(values: Floats, share: float, confidence: float) -> Measured:
    """A quantile of independent values by order statistics: no assumption on their distribution.

    The limits are the order statistics whose ranks the binomial distribution gives (Conover, Practical Nonparametric Statistics,
    1999, section 3.2), as scipy.stats.quantile_test computes them.
    """
    import numpy as np
    from scipy.stats import quantile_test

    limits = quantile_test(values, p=share).confidence_interval(confidence)
    open_above = math.isnan(limits.high)
    interval = Interval(
        value=float(np.quantile(values, share)),
        low=0.0 if math.isnan(limits.low) else float(limits.low),
        high=float(values.max() if open_above else limits.high),
    )
    how = f"order statistics of {len(values)} requests"
    return Measured(interval, how, open_above, requests_needed(share, confidence))


def requests_needed(share: float, confidence: float) -> int:
    """How many requests give a quantile an upper bound at all: share^n <= (1 - confidence) / 2."""
    return math.ceil(math.log((1 - confidence) / 2) / math.log(share))


def clustered_quantile_interval(values: Floats, sizes: NDArray[np.int_], share: float, confidence: float) -> Measured:
    """A quantile of values in clusters (the gaps between one answer's tokens), by Woodruff's method.

    The limits are the quantiles at share ± z·error (R. S. Woodruff, JASA 47:635-646, 1952). `error` is the linearized standard
    error of the share of values at or below the quantile, a ratio over clusters. It is never taken smaller than that of
    independent values.
    """
    import numpy as np

    quantile = float(np.quantile(values, share))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    below = np.array([(values[a:b] <= quantile).sum() for a, b in pairwise(starts)])
    clusters, total = len(sizes), len(values)
    residual = below - sizes * below.sum() / total
    spread = clusters / (clusters - 1) * float((residual**2).sum()) if clusters > 1 else float(total)
    error = max(math.sqrt(spread) / total, math.sqrt(share * (1 - share) / total))
    upper = share + normal_quantile(confidence) * error
    lower = share - normal_quantile(confidence) * error
    interval = Interval(
        value=quantile,
        low=float(np.quantile(values, lower)) if lower > 0 else 0.0,
        high=float(np.quantile(values, min(1.0, upper))),
    )
    return Measured(interval, f"Woodruff's interval over {clusters} requests", open_above=upper >= 1)


def throughput_interval(rate: float, work: Floats, seconds: Floats, confidence: float) -> Measured:
    """Throughput with the relative error of the ratio mean(work) / mean(seconds) over requests.

    In a closed loop of c users, throughput = c·mean(work) / mean(seconds) (Little's law). So the requests' spread gives the
    ratio's linearized standard error (Cochran, Sampling Techniques, 1977, section 6.4), carried over to the measured `rate`.
    """
    import numpy as np

    n = len(seconds)
    ratio = float(work.mean() / seconds.mean())
    error = float(np.std(work - ratio * seconds, ddof=1)) / (math.sqrt(n) * float(seconds.mean()))
    half = rate * normal_quantile(confidence) * error / ratio if ratio else rate
    return Measured(
        Interval(value=rate, low=max(0.0, rate - half), high=rate + half), f"ratio estimate over {n} requests"
    )
