"""How many items a comparison needs."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.intervals import sample_size, scores


def test_the_size_is_that_of_the_formula():
    """Worked by hand: (1.95996 + 1.28155)² · 0.1 / 0.03² = 1167.5."""
    assert sample_size.items_for_margin(0.03, 0.1, 0.95) == 1168


@pytest.mark.parametrize(("margin", "discordance", "power"), [(0.05, 0.1, 0.9), (0.04, 0.2, 0.8)])
def test_so_many_items_prove_it_so_often(margin, discordance, power):
    """In 1,500 simulated holdouts of that size the interval of an equal candidate reaches -margin about that often."""
    size = sample_size.items_for_margin(margin, discordance, 0.95, power)
    shares = [discordance / 2, discordance / 2, 1 - discordance]
    drawn = np.random.default_rng(5).multinomial(size, shares, size=1500)
    proved = sum(scores.tango(int(b), int(c), size, 0.95).low >= -margin for b, c, _ in drawn)
    assert power - 0.05 < proved / 1500 < power + 0.05
