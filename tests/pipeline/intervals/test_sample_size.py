"""How many items a comparison needs."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.artifacts import Interval
from pipeline.intervals.proportions import tango, wilson
from pipeline.intervals.sample_size import items_for_margin, items_to_decide
from pipeline.intervals.scores import mean_interval


def test_the_size_is_that_of_the_formula():
    """Worked by hand: (1.95996 + 1.28155)² · 0.1 / 0.03² = 1167.5."""
    assert items_for_margin(0.03, 0.1, 0.95) == 1168


@pytest.mark.parametrize(("margin", "discordance", "power"), [(0.05, 0.1, 0.9), (0.04, 0.2, 0.8)])
def test_so_many_items_prove_it_so_often(margin, discordance, power):
    """In 1,500 simulated holdouts of that size the interval of an equal candidate reaches -margin about that often."""
    size = items_for_margin(margin, discordance, 0.95, power)
    shares = [discordance / 2, discordance / 2, 1 - discordance]
    drawn = np.random.default_rng(5).multinomial(size, shares, size=1500)
    proved = sum(tango(int(b), int(c), size, 0.95).low >= -margin for b, c, _ in drawn)
    assert power - 0.05 < proved / 1500 < power + 0.05


def test_the_items_said_to_decide_do_decide():
    """With a tenth more items than named the threshold lies outside, with a quarter fewer inside."""
    for successes, n, threshold in [(85, 100, 0.8), (150, 200, 0.8), (45, 60, 0.7)]:
        interval = wilson(successes, n, 0.95)
        needed = items_to_decide(interval, interval, n, threshold, threshold)
        share = successes / n
        enough = wilson(share * needed * 1.1, int(needed * 1.1), 0.95)
        short = wilson(share * needed * 0.75, int(needed * 0.75), 0.95)
        assert not enough.low < threshold <= enough.high
        assert short.low < threshold <= short.high


def test_the_items_said_to_decide_do_decide_graded_scores():
    """As many as are said to be enough for a floor a point below are; a quarter of them isn't."""
    scores = np.random.default_rng(6).beta(1.248, 0.312, size=100)
    interval = mean_interval(scores, 0.95)
    threshold = interval.value - 0.01
    needed = items_to_decide(interval, interval, 100, threshold, threshold) or 0
    assert mean_interval(np.tile(scores, -(-needed // 100)), 0.95).low >= threshold
    assert mean_interval(np.tile(scores, needed // 400), 0.95).low < threshold


def test_an_estimate_on_the_threshold_is_never_decided():
    """No number of items is named where none would help."""
    on_it = Interval(value=0.8, low=0.7, high=0.9)
    assert items_to_decide(on_it, on_it, 100, 0.8, 0.8) is None
