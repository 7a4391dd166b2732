from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from pipeline.intervals.macro_f1 import f1_macro_difference_interval, f1_macro_interval
from pipeline.intervals.proportions import tango


def test_a_perfect_macro_f1_is_not_proved_by_six_answers():
    """Nor are two systems shown to be equal whose wrong answers are wrong in other words."""
    labels = ["a", "b", "c"] * 2
    perfect = f1_macro_interval(labels, labels, 0.95)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low < 0.7
    same = f1_macro_difference_interval(["a", "b"] * 60, ["x"] * 120, ["y"] * 120, 0.95)
    assert same.low == pytest.approx(-same.high)
    assert same.low < -0.02


def sklearn_f1_macro(expected: list[str], answered: list[str]) -> float:
    """Averaged over the labels that are expected somewhere."""
    labels = sorted(set(expected))
    return float(f1_score(expected, answered, labels=labels, average="macro", zero_division=0.0))


def random_labels(seed: int, n: int = 120) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    expected = rng.choice(["a", "b", "c", "d"], p=[0.5, 0.3, 0.15, 0.05], size=n)
    answered = np.where(rng.random(n) < 0.7, expected, rng.choice(["a", "b", "nonsense"], size=n))
    return expected.tolist(), answered.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_sklearns(seed):
    """The counts of classes give sklearn's value."""
    expected, answered = random_labels(seed)
    interval = f1_macro_interval(expected, answered, 0.95)
    assert interval.value == pytest.approx(sklearn_f1_macro(expected, answered), abs=1e-12)
    assert interval.low < interval.value < interval.high


def test_a_made_up_label_counts_as_a_miss():
    """Two classes, one answered by nonsense: (1 + 0) / 2, not a third class in the mean."""
    assert f1_macro_interval(["a", "b"], ["a", "zzz"], 0.95).value == 0.5


def test_a_better_labeller_is_seen_by_the_paired_macro_f1():
    """Thirty corrected answers lift macro-F1 by an interval above zero; none give one around it."""
    expected, answered = random_labels(7, 300)
    wrong = [index for index, pair in enumerate(zip(expected, answered, strict=True)) if pair[0] != pair[1]]
    better = list(answered)
    for index in wrong[:30]:
        better[index] = expected[index]
    assert f1_macro_difference_interval(expected, better, answered, 0.95).low > 0
    same = f1_macro_difference_interval(expected, answered, answered, 0.95)
    assert same.low < 0 < same.high


def test_a_better_f1_by_a_few_answers_of_a_small_holdout_is_not_proved():
    """Four of a hundred answers lost between two equal classes are no proof of a loss below eight points."""
    expected = ["a", "b"] * 50
    ours = ["b", "a", "b", "a", *expected[4:]]
    interval = f1_macro_difference_interval(expected, ours, expected, 0.95)
    assert interval.low == pytest.approx(tango(0, 4, 100, 0.95).low, abs=0.01)
