from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from pipeline.intervals.likelihood import likelihood
from pipeline.intervals.proportions import tango, wilson

Z = norm.ppf(0.975)


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_likelihood_is_no_surer_of_right_and_wrong_than_wilson_and_tango(n, level):
    """It is as wide where all are right, so that graded scores come to 0/1 ones without a jump."""
    for ones in range(0, n + 1, n // 10):
        interval = likelihood(np.arange(n) < ones, (0.0, 1.0), 1.0, level)
        known = wilson(ones, n, level)
        assert interval.low <= known.low + 1e-9
        assert interval.high >= known.high - 1e-9
        for worse in range(0, n - ones + 1, n // 5):
            gaps = np.repeat([1.0, -1.0, 0.0], [ones, worse, n - ones - worse])
            assert likelihood(gaps, (-1.0, 1.0), 1.0, level).low <= tango(ones, worse, n, level).low + 1e-9
    assert likelihood(np.ones(400), (0.0, 1.0), 1.0, 0.95).low == pytest.approx(400 / (400 + Z**2), abs=1e-4)
