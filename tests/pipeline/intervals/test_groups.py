from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, t

from pipeline.intervals.groups import confidence_over_groups, design_effect, effective_groups, group_codes


def test_effective_groups_are_those_of_one_size():
    """Three of one size count in full; thirty of which one holds most of the items count as less than two."""
    names = [*["large"] * 800, *(str(number % 29) for number in range(232))]
    assert effective_groups(["a", "b", "c"] * 40) == pytest.approx(3)
    assert effective_groups(names) == pytest.approx(1032**2 / (800**2 + 29 * 64))


def test_groups_of_identical_items_are_worth_one_item_each():
    """Forty groups of five that agree inside: five items for one. Independent items: one for one."""
    scores = np.repeat(np.arange(40) % 2, 5).astype(float)
    assert design_effect(scores, group_codes([str(n // 5) for n in range(200)])) == pytest.approx(5, rel=0.05)
    assert design_effect(scores, None) == 1.0


def test_a_variance_from_few_groups_takes_more_confidence():
    """The normal quantile at the returned confidence is Student's t at the given one, with one degree less than groups."""
    codes = group_codes([str(n % 10) for n in range(100)])
    level = confidence_over_groups(0.95, codes)
    assert norm.ppf(0.5 + level / 2) == pytest.approx(t.ppf(0.975, 9))
    assert confidence_over_groups(0.95, None) == 0.95
