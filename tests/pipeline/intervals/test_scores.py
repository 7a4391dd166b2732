from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from pipeline.artifacts import Interval
from pipeline.intervals import scores as statistics

Z = norm.ppf(0.975)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (1, 50), (81, 263), (20, 20), (500, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_scipys(successes, n, confidence):
    """Wilson's interval equals scipy's, at the edges too."""
    found = statistics.wilson(successes, n, confidence)
    reference = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert found.value == successes / n


def test_wilson_gives_the_published_example():
    """Newcombe (1998) gives 0.2553 to 0.3662 for 81 of 263."""
    found = statistics.wilson(81, 263, 0.95)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def tango_by_quartic(b: int, c: int, n: int) -> tuple[float, float]:
    """Tango's limits as roots of the quartic of Yang, Sun and Hardin (Statistics in Medicine 32, 2013)."""
    g = Z**2
    gap, both = b - c, b + c
    roots = np.roots(
        [
            n**2 * (n / g + 1) ** 2,
            -n * gap * (n / g + 1) * (4 * n / g + 1),
            2 * n * gap**2 * (3 * n / g + 2) / g - n**2 * (both / g + 1),
            n * gap * (2 * both / g + 1) - gap**3 * (4 * n / g + 1) / g,
            gap**2 * (gap**2 / g - both) / g,
        ]
    )
    real = sorted(root.real for root in roots if abs(root.imag) < 1e-7)
    return real[0], real[-1]


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (6, 16, 161), (40, 20, 160), (12, 2, 200), (3, 9, 32)])
def test_tango_agrees_with_its_closed_form(b, c, n):
    """The limits found by bisection are the roots of the published non-iterative solution."""
    found = statistics.tango(b, c, n, 0.95)
    assert (found.low, found.high) == pytest.approx(tango_by_quartic(b, c, n), abs=1e-6)
    assert found.value == (b - c) / n


def test_tango_excludes_zero_exactly_when_mcnemar_rejects():
    """At no difference the score statistic is McNemar's (b - c) / sqrt(b + c)."""
    for b in range(15):
        for c in range(15):
            if b + c and abs(abs(b - c) / math.sqrt(b + c) - Z) > 1e-9:
                found = statistics.tango(b, c, 60, 0.95)
                assert (found.low > 0 or found.high < 0) == (abs(b - c) / math.sqrt(b + c) > Z), (b, c)


def test_tango_is_antisymmetric_and_stays_within_one():
    """Swapping the systems mirrors the interval, and no limit leaves -1 to 1, even where one wins all."""
    for b, c, n in [(0, 0, 1), (5, 0, 5), (0, 5, 5), (3, 1, 50), (0, 1, 30)]:
        one, other = statistics.tango(b, c, n, 0.95), statistics.tango(c, b, n, 0.95)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
        assert -1 <= one.low <= one.value <= one.high <= 1


def test_systems_that_agree_on_every_item_are_not_proved_equal():
    """Without a discordant pair the interval is ±z²/(n+z²), for binary and for graded scores."""
    reach = Z**2 / (100 + Z**2)
    for scores in ([1.0, 0.0] * 50, [0.25, 0.75] * 50):
        found = statistics.difference_interval(scores, scores, 0.95)
        assert (found.low, found.high) == pytest.approx((-reach, reach))


def test_few_items_that_differ_by_the_same_prove_little():
    """Three items half a point worse are no proof of half a point; three hundred nearly are."""
    few, many = (statistics.difference_interval([0.5] * n, [1.0] * n, 0.95) for n in (3, 300))
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
    grouped, once = statistics.mean_interval(copies, 0.95, names), statistics.mean_interval(one_each, 0.95)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high), abs=0.002)
    mixed = rng.permutation(copies)
    plain = statistics.mean_interval(mixed, 0.95)
    spread = statistics.mean_interval(mixed, 0.95, names)
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
        found = statistics.difference_interval(1.0 - lost, np.ones(groups * size), 0.95, names)
        proved += found.low >= -0.03
    assert proved <= 12


def test_a_tie_is_no_weaker_evidence_than_a_small_loss():
    """Of a hundred graded items, one that lost a quarter of a point doesn't narrow the interval."""
    theirs = [0.5] * 100
    tie, loss = (statistics.difference_interval(ours, theirs, 0.95) for ours in (theirs, [0.25] + [0.5] * 99))
    assert loss.low < tie.low
    assert loss.high - loss.low > tie.high - tie.low


def test_a_perfect_macro_f1_is_not_proved_by_six_answers():
    """Nor are two systems shown to be equal whose wrong answers are wrong in other words."""
    labels = ["a", "b", "c"] * 2
    perfect = statistics.f1_macro_interval(labels, labels, 0.95)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low < 0.7
    same = statistics.f1_macro_difference_interval(["a", "b"] * 60, ["x"] * 120, ["y"] * 120, 0.95)
    assert same.low == pytest.approx(-same.high)
    assert same.low < -0.02


def test_one_group_is_one_draw():
    """Whatever many items it has."""
    scores, names = [0.5, 0.25, 1.0, 0.0] * 10, ["only"] * 40
    assert statistics.mean_interval(scores, 0.95, names).low < 0.1
    found = statistics.difference_interval(scores, [0.5] * 40, 0.95, names)
    assert found.low < -0.98
    assert found.high > 0.98
    assert statistics.f1_macro_interval(["a", "b"] * 20, ["a", "b"] * 20, 0.95, names).low < 0.3


def test_grouped_intervals_cover_the_truth():
    """In 400 simulated holdouts of 60 groups of four that share half their fate, graded and binary alike."""
    rng, inside = np.random.default_rng(8), {"binary": 0, "graded": 0}
    names = [str(n // 4) for n in range(240)]
    for _ in range(400):
        own, shared = rng.random(240), np.repeat(rng.random(60), 4)
        score = np.where(rng.random(240) < 0.5, own, shared)
        binary = statistics.mean_interval((score < 0.7).astype(float), 0.95, names)
        inside["binary"] += binary.low <= 0.7 <= binary.high
    for _ in range(60):
        own, shared = rng.random(240), np.repeat(rng.random(60), 4)
        score = np.round(np.where(rng.random(240) < 0.5, own, shared), 1)
        graded = statistics.mean_interval(score, 0.95, names)
        inside["graded"] += graded.low <= 0.5 <= graded.high
    assert 0.92 <= inside["binary"] / 400 <= 0.98
    assert inside["graded"] >= 52


def test_tango_covers_the_truth():
    """In 2,000 simulated holdouts of 150 items the 95 % interval holds the true difference in about 95 %."""
    rng = np.random.default_rng(1)
    counts = rng.multinomial(150, [0.08, 0.03, 0.89], size=2000)
    inside = 0
    for b, c, _ in counts:
        found = statistics.tango(int(b), int(c), 150, 0.95)
        inside += found.low <= 0.05 <= found.high
    assert 0.935 <= inside / 2000 <= 0.97


def test_the_interval_covers_the_mean_of_skewed_scores():
    """Over 150 simulated holdouts the 95 % interval mostly holds the true mean."""
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(150):
        scores = rng.choice([0.0, 0.25, 0.5, 1.0], p=[0.05, 0.05, 0.2, 0.7], size=80)
        found = statistics.mean_interval(scores.tolist(), 0.95)
        inside += found.low <= 0.8125 <= found.high
    assert 0.88 <= inside / 150 <= 1.0


def test_intervals_are_the_same_every_time():
    """Nothing is drawn."""
    scores = [0.1, 0.5, 0.9, 1.0] * 20
    assert statistics.mean_interval(scores, 0.95) == statistics.mean_interval(scores, 0.95)


def test_equal_graded_scores_get_a_wide_interval_instead_of_none():
    """All items scoring 0.75 is no proof that every item will: as many may be 0, or 1, as may be wrong where all are right."""
    found, seen = statistics.mean_interval([0.75] * 40, 0.95), statistics.wilson(40, 40, 0.95).low
    assert (found.low, found.high) == pytest.approx((0.75 * seen, 1 - 0.25 * seen), abs=0.01)


def test_paired_differences_are_narrower_than_unpaired_ones():
    """Pairing takes the items' own difficulty out of a graded comparison; what 200 items can't show, z²/(n+z²), stays."""
    rng = np.random.default_rng(3)
    theirs = rng.uniform(0.1, 0.9, 200)
    ours = theirs + rng.normal(0.02, 0.02, 200)
    found = statistics.difference_interval(ours.tolist(), theirs.tolist(), 0.95)
    assert 0 < found.low < 0.02 < found.high
    assert found.high - found.low < 0.04


def test_unpaired_scores_are_refused():
    """Two lists of different length can't be paired."""
    with pytest.raises(ValueError, match="one length, not 2 and 1"):
        statistics.difference_interval([1.0, 0.0], [1.0], 0.95)


def random_labels(seed: int, n: int = 120) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    expected = rng.choice(["a", "b", "c", "d"], p=[0.5, 0.3, 0.15, 0.05], size=n)
    answered = np.where(rng.random(n) < 0.7, expected, rng.choice(["a", "b", "nonsense"], size=n))
    return expected.tolist(), answered.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_macro_f1_is_sklearns(seed):
    """The counts used for resampling give sklearn's value on the whole data."""
    expected, answered = random_labels(seed)
    found = statistics.f1_macro_interval(expected, answered, 0.95)
    assert found.value == pytest.approx(statistics.f1_macro(expected, answered), abs=1e-12)
    assert found.low < found.value < found.high


def test_macro_f1_counts_a_made_up_label_as_a_miss():
    """Two classes, one answered by nonsense: (1 + 0) / 2, not a third class in the mean."""
    assert statistics.f1_macro(["a", "b"], ["a", "zzz"]) == 0.5


def test_a_better_labeller_is_seen_by_the_paired_macro_f1():
    """Thirty corrected answers lift macro-F1 by an interval above zero; none give one around it."""
    expected, answered = random_labels(7, 300)
    wrong = [index for index, pair in enumerate(zip(expected, answered, strict=True)) if pair[0] != pair[1]]
    better = list(answered)
    for index in wrong[:30]:
        better[index] = expected[index]
    assert statistics.f1_macro_difference_interval(expected, better, answered, 0.95).low > 0
    same = statistics.f1_macro_difference_interval(expected, answered, answered, 0.95)
    assert same.low < 0 < same.high


@pytest.mark.parametrize("tail", [[0.99], [0.5], [0.0, 0.99]])
def test_a_worse_answer_never_lifts_a_limit(tail):
    """Not one of 0.99 among a hundred full marks either, for means and for differences alike."""
    worse, right = [1.0] * (100 - len(tail)) + tail, [1.0] * 100
    for interval in (statistics.mean_interval, lambda ours, level: statistics.difference_interval(ours, right, level)):
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
        mean, gap = statistics.mean_interval(ours, 0.95), statistics.difference_interval(ours, theirs, 0.95)
        limits = np.array([mean.low, mean.high, gap.low, gap.high])
        assert (limits <= before + 1e-8).all()
        before = limits


def test_total_losses_too_rare_to_be_seen_are_reckoned_with():
    """Two in a hundred answers are lost wholly, a fifth lose a little: at the true mean or gap hardly one build passes."""
    rng, passes, proved = np.random.default_rng(4), 0, 0
    for _ in range(200):
        scores = rng.choice([1.0, 0.99, 0.0], p=[0.78, 0.2, 0.02], size=100)
        passes += statistics.mean_interval(scores, 0.95).low > 0.978
        proved += statistics.difference_interval(scores, np.ones(100), 0.95).low > -0.022
    assert max(passes, proved) <= 8


def test_graded_scores_are_known_nearly_as_well_as_their_spread_allows():
    """240 scores of mean 0.8 and standard deviation 0.25: the interval is at most a tenth wider than the normal one."""
    scores = np.random.default_rng(6).beta(1.248, 0.312, size=240)
    found = statistics.mean_interval(scores, 0.95)
    assert found.value - found.low < 1.15 * Z * scores.std() / np.sqrt(240)


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_likelihood_is_no_surer_of_right_and_wrong_than_wilson_and_tango(n, level):
    """It is as wide where all are right, so that graded scores come to 0/1 ones without a jump."""
    for ones in range(0, n + 1, n // 10):
        found = statistics.likelihood(np.arange(n) < ones, (0.0, 1.0), 1.0, level)
        known = statistics.wilson(ones, n, level)
        assert found.low <= known.low + 1e-9
        assert found.high >= known.high - 1e-9
        for worse in range(0, n - ones + 1, n // 5):
            gaps = np.repeat([1.0, -1.0, 0.0], [ones, worse, n - ones - worse])
            assert (
                statistics.likelihood(gaps, (-1.0, 1.0), 1.0, level).low
                <= statistics.tango(ones, worse, n, level).low + 1e-9
            )
    assert statistics.likelihood(np.ones(400), (0.0, 1.0), 1.0, 0.95).low == pytest.approx(400 / (400 + Z**2), abs=1e-4)


def test_effective_groups_are_those_of_one_size():
    """Three of one size count in full; thirty of which one holds most of the items count as less than two."""
    names = [*["large"] * 800, *(str(number % 29) for number in range(232))]
    assert statistics.effective_groups(["a", "b", "c"] * 40) == pytest.approx(3)
    assert statistics.effective_groups(names) == pytest.approx(1032**2 / (800**2 + 29 * 64))


def test_a_better_f1_by_a_few_answers_of_a_small_holdout_is_not_proved():
    """Four of a hundred answers lost between two equal classes are no proof of a loss below eight points."""
    expected = ["a", "b"] * 50
    ours = ["b", "a", "b", "a", *expected[4:]]
    found = statistics.f1_macro_difference_interval(expected, ours, expected, 0.95)
    assert found.low == pytest.approx(statistics.tango(0, 4, 100, 0.95).low, abs=0.01)


def test_the_items_said_to_decide_do_decide():
    """With a tenth more items than named the threshold lies outside, with a quarter fewer inside."""
    for successes, n, threshold in [(85, 100, 0.8), (150, 200, 0.8), (45, 60, 0.7)]:
        found = statistics.wilson(successes, n, 0.95)
        needed = statistics.items_to_decide(found, found, n, threshold, threshold)
        share = successes / n
        enough = statistics.wilson(share * needed * 1.1, int(needed * 1.1), 0.95)
        short = statistics.wilson(share * needed * 0.75, int(needed * 0.75), 0.95)
        assert not enough.low < threshold <= enough.high
        assert short.low < threshold <= short.high


def test_the_items_said_to_decide_do_decide_graded_scores():
    """As many as are said to be enough for a floor a point below are; a quarter of them isn't."""
    scores = np.random.default_rng(6).beta(1.248, 0.312, size=100)
    found = statistics.mean_interval(scores, 0.95)
    threshold = found.value - 0.01
    needed = statistics.items_to_decide(found, found, 100, threshold, threshold) or 0
    assert statistics.mean_interval(np.tile(scores, -(-needed // 100)), 0.95).low >= threshold
    assert statistics.mean_interval(np.tile(scores, needed // 400), 0.95).low < threshold


def test_an_estimate_on_the_threshold_is_never_decided():
    """No number of items is named where none would help."""
    on_it = Interval(value=0.8, low=0.7, high=0.9)
    assert statistics.items_to_decide(on_it, on_it, 100, 0.8, 0.8) is None
