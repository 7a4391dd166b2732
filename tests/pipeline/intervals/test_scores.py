from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from pipeline.intervals.macro_f1 import f1_macro_interval
from pipeline.intervals.proportions import wilson
from pipeline.intervals.scores import difference_interval, mean_interval

Z = norm.ppf(0.975)


def test_systems_that_agree_on_every_item_are_not_proved_equal():
    """Without a discordant pair the interval is ±z²/(n+z²), for binary and for graded scores."""
    reach = Z**2 / (100 + Z**2)
    for scores in ([1.0, 0.0] * 50, [0.25, 0.75] * 50):
        interval = difference_interval(scores, scores, 0.95)
        assert (interval.low, interval.high) == pytest.approx((-reach, reach))


def test_few_items_that_differ_by_the_same_prove_little():
    """Three items half a point worse are no proof of half a point; three hundred nearly are."""
    few, many = (difference_interval([0.5] * n, [1.0] * n, 0.95) for n in (3, 300))
    assert (few.value, many.value) == (-0.5, -0.5)
    assert few.low < -0.8
    assert few.high > 0
    assert -0.6 < many.low < many.high < -0.39


@pytest.mark.parametrize("size", [2, 5])
def test_grouped_items_widen_intervals_as_their_groups_tell(size):
    """Groups of identical items count as one item each, whatever the scores; items in mixed groups lose little."""
    rng = np.random.default_rng(7)
    one_each = rng.choice([0.0, 1.0], p=[0.3, 0.7], size=200)
    copies, names = np.repeat(one_each, size), [str(n // size) for n in range(200 * size)]
    grouped, once = mean_interval(copies, 0.95, names), mean_interval(one_each, 0.95)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high), abs=0.002)
    mixed = rng.permutation(copies)
    plain = mean_interval(mixed, 0.95)
    spread = mean_interval(mixed, 0.95, names)
    assert 1 <= (spread.high - spread.low) / (plain.high - plain.low) < 1.15


@pytest.mark.parametrize(("groups", "size"), [(20, 50), (40, 10), (100, 10)])
def test_few_large_groups_that_differ_do_not_look_like_many_items(groups, size):
    """A candidate three points worse, half of whose groups go one way, is hardly ever shown to be within three points."""
    rng, proved = np.random.default_rng(9), 0
    names = [str(n // size) for n in range(groups * size)]
    for _ in range(150):
        lost = np.where(
            np.repeat(rng.random(groups) < 0.5, size),
            np.repeat(rng.random(groups) < 0.03, size),
            rng.random(groups * size) < 0.03,
        )
        interval = difference_interval(1.0 - lost, np.ones(groups * size), 0.95, names)
        proved += interval.low >= -0.03
    assert proved <= 12


def test_a_tie_is_no_weaker_evidence_than_a_small_loss():
    """Of a hundred graded items, one that lost a quarter of a point doesn't narrow the interval."""
    theirs = [0.5] * 100
    tie, loss = (difference_interval(ours, theirs, 0.95) for ours in (theirs, [0.25] + [0.5] * 99))
    assert loss.low < tie.low
    assert loss.high - loss.low > tie.high - tie.low


def test_one_group_is_one_draw():
    """Whatever many items it has."""
    scores, names = [0.5, 0.25, 1.0, 0.0] * 10, ["only"] * 40
    assert mean_interval(scores, 0.95, names).low < 0.1
    interval = difference_interval(scores, [0.5] * 40, 0.95, names)
    assert interval.low < -0.98
    assert interval.high > 0.98
    assert f1_macro_interval(["a", "b"] * 20, ["a", "b"] * 20, 0.95, names).low < 0.3


def test_grouped_intervals_cover_the_truth():
    """In 400 simulated holdouts of 60 groups of four that share half their fate, graded and binary alike."""
    rng, inside = np.random.default_rng(8), {"binary": 0, "graded": 0}
    names = [str(n // 4) for n in range(240)]
    for _ in range(400):
        own, shared = rng.random(240), np.repeat(rng.random(60), 4)
        score = np.where(rng.random(240) < 0.5, own, shared)
        binary = mean_interval((score < 0.7).astype(float), 0.95, names)
        inside["binary"] += binary.low <= 0.7 <= binary.high
    for _ in range(60):
        own, shared = rng.random(240), np.repeat(rng.random(60), 4)
        score = np.round(np.where(rng.random(240) < 0.5, own, shared), 1)
        graded = mean_interval(score, 0.95, names)
        inside["graded"] += graded.low <= 0.5 <= graded.high
    assert 0.92 <= inside["binary"] / 400 <= 0.98
    assert inside["graded"] >= 52


def test_the_interval_covers_the_mean_of_skewed_scores():
    """Over 150 simulated holdouts the 95 % interval mostly holds the true mean."""
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(150):
        scores = rng.choice([0.0, 0.25, 0.5, 1.0], p=[0.05, 0.05, 0.2, 0.7], size=80)
        interval = mean_interval(scores.tolist(), 0.95)
        inside += interval.low <= 0.8125 <= interval.high
    assert 0.88 <= inside / 150 <= 1.0


def test_intervals_are_the_same_every_time():
    """Nothing is drawn."""
    scores = [0.1, 0.5, 0.9, 1.0] * 20
    assert mean_interval(scores, 0.95) == mean_interval(scores, 0.95)


def test_equal_graded_scores_get_a_wide_interval_instead_of_none():
    """All items scoring 0.75 is no proof that every item will: as many may be 0, or 1, as may be wrong where all are right."""
    interval, seen = mean_interval([0.75] * 40, 0.95), wilson(40, 40, 0.95).low
    assert (interval.low, interval.high) == pytest.approx((0.75 * seen, 1 - 0.25 * seen), abs=0.01)


def test_paired_differences_are_narrower_than_unpaired_ones():
    """Pairing takes the items' own difficulty out of a graded comparison; what 200 items can't show, z²/(n+z²), stays."""
    rng = np.random.default_rng(3)
    theirs = rng.uniform(0.1, 0.9, 200)
    ours = theirs + rng.normal(0.02, 0.02, 200)
    interval = difference_interval(ours.tolist(), theirs.tolist(), 0.95)
    assert 0 < interval.low < 0.02 < interval.high
    assert interval.high - interval.low < 0.04


def test_unpaired_scores_are_refused():
    """Two lists of different length can't be paired."""
    with pytest.raises(ValueError, match="one length, not 2 and 1"):
        difference_interval([1.0, 0.0], [1.0], 0.95)


@pytest.mark.parametrize("tail", [[0.99], [0.5], [0.0, 0.99]])
def test_a_worse_answer_never_lifts_a_limit(tail):
    """Not one of 0.99 among a hundred full marks either, for means and for differences alike."""
    worse, right = [1.0] * (100 - len(tail)) + tail, [1.0] * 100
    for interval in (mean_interval, lambda ours, level: difference_interval(ours, right, level)):
        before, after = interval(right, 0.95), interval(worse, 0.95)
        assert after.low <= before.low
        assert after.high <= before.high


@pytest.mark.parametrize("seed", range(2))
def test_limits_fall_step_by_step_as_graded_scores_do(seed):
    """From all right to all wrong, an item lowered at a time, through graded and 0/1 samples and the edges between them."""
    rng = np.random.default_rng(seed)
    theirs, ours, before = rng.choice([0.0, 0.4, 1.0], size=60), np.ones(60), np.ones(4)
    for _ in range(120):
        item = int(rng.integers(60))
        ours[item] = rng.choice([0.0, ours[item] * 0.5, ours[item] * 0.99])
        mean, gap = mean_interval(ours, 0.95), difference_interval(ours, theirs, 0.95)
        limits = np.array([mean.low, mean.high, gap.low, gap.high])
        assert (limits <= before + 1e-8).all()
        before = limits


def test_total_losses_too_rare_to_be_seen_are_reckoned_with():
    """Two in a hundred answers are lost wholly, a fifth lose a little: at the true mean or gap hardly one build passes."""
    rng, passes, proved = np.random.default_rng(4), 0, 0
    for _ in range(200):
        scores = rng.choice([1.0, 0.99, 0.0], p=[0.78, 0.2, 0.02], size=100)
        passes += mean_interval(scores, 0.95).low > 0.978
        proved += difference_interval(scores, np.ones(100), 0.95).low > -0.022
    assert max(passes, proved) <= 8


def test_graded_scores_are_known_nearly_as_well_as_their_spread_allows():
    """240 scores of mean 0.8 and standard deviation 0.25: the interval is at most a tenth wider than the normal one."""
    scores = np.random.default_rng(6).beta(1.248, 0.312, size=240)
    interval = mean_interval(scores, 0.95)
    assert interval.value - interval.low < 1.15 * Z * scores.std() / np.sqrt(240)
