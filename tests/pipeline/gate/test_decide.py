"""Questions with intervals into checks, several at once."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

from pipeline.artifacts import Interval
from pipeline.gate.decide import Question, decide


def normal(value: float, error: float):
    """The estimate of a normal quantity with a known standard error."""

    def estimate(confidence: float) -> Interval:
        half = float(norm.ppf(0.5 + confidence / 2)) * error
        return Interval(value=value, low=value - half, high=value + half)

    return estimate


def question(z: float, *, reach: float = -3.0, waived: str = "") -> Question:
    """A difference of `z` standard errors."""
    return Question(
        name=f"z={z}", kind="reach", rule="", estimate=normal(z, 1.0), threshold=reach, fails_below=0.0, items=100,
        waived=waived,
    )  # fmt: skip


def part(z: float) -> Question:
    """A part of a slice check, `z` standard errors from no difference."""
    return Question(
        name=f"z={z}", kind="no_loss", rule="", estimate=normal(z, 1.0), threshold=0.0, fails_below=0.0, items=100
    )


@pytest.mark.parametrize(
    ("z", "outcome"), [(0.0, "pass"), (-1.0, "pass"), (-1.5, "inconclusive"), (-2.5, "fail"), (-9.0, "fail")]
)
def test_one_question_has_three_answers(z, outcome):
    """With a margin of three errors: not worse by that much, neither shown, or shown to be worse."""
    (check,) = decide([question(z)], 0.95)
    assert check.outcome == outcome


def test_worse_within_the_margin_is_a_pass():
    """Shown to be worse, and shown to be worse by less than is allowed."""
    (check,) = decide([question(-3.0, reach=-6.0)], 0.95)
    assert (check.outcome, check.estimate.high < 0) == ("pass", True)


def holm(pvalues: list[float], alpha: float) -> list[bool]:
    """Holm's procedure on p-values, as a textbook has it."""
    order = sorted(range(len(pvalues)), key=pvalues.__getitem__)
    rejected = [False] * len(pvalues)
    for rank, index in enumerate(order):
        if pvalues[index] > alpha / (len(pvalues) - rank):
            break
        rejected[index] = True
    return rejected


@pytest.mark.parametrize(
    "zs",
    [[-2.1, -2.3, -2.6], [-2.1, 0.5, 0.4, 0.3], [-2.5, -2.3, -2.0], [-3.5, -2.7, -2.4, -2.2, -1.9, 1.0], [-2.2, -2.2]],
)
def test_failures_are_those_of_holms_procedure(zs):
    """By p-values of the two-sided test at 5 %, for those on the losing side."""
    checks = decide([part(z) for z in zs], 0.95)
    expected = holm([2 * float(norm.sf(abs(z))) if z < 0 else 1.0 for z in zs], 0.05)
    assert [check.outcome == "fail" for check in checks] == expected


def test_what_fails_alone_and_not_among_many_is_open_and_says_so():
    """Two errors below, asked with nine others."""
    alone, *_ = decide([question(-2.1)], 0.95)
    among, *_ = decide([question(-2.1), *(question(0.5) for _ in range(9))], 0.95)
    assert (alone.outcome, among.outcome) == ("fail", "inconclusive")
    assert "10 questions are asked at once" in among.why
    more = int(among.why.split("about ")[1].split()[0])
    assert more == math.ceil(100 * (norm.ppf(1 - 0.025 / 10) / 2.1) ** 2) - 100


def test_a_part_that_fails_alone_and_not_among_many_passes_and_says_so():
    """Of many parts some lie below by chance; the check doesn't claim that nothing was seen."""
    among, *_ = decide([part(-2.1), *(part(0.5) for _ in range(9))], 0.95)
    assert among.outcome == "pass"
    assert "of 10 parts looked at some do by chance" in among.why
    assert "would miss a loss" in decide([part(0.5)], 0.95)[0].why


def test_nothing_passes_on_fewer_items_than_are_wanted():
    """However good they are; a failure stays one."""
    good, bad = decide([question(5.0), question(-9.0)], 0.95, min_items=101)
    assert (good.outcome, good.why) == ("inconclusive", "rests on 100 items, 1 more are needed")
    assert bad.outcome == "fail"
    assert decide([question(5.0)], 0.95, min_items=100)[0].outcome == "pass"


def test_a_waived_question_is_decided_alone_and_does_not_crowd_the_others():
    """It keeps its own outcome, and the rest are decided as if it weren't asked."""
    checks = decide([question(-2.1), *(question(-2.1, waived="advisory") for _ in range(9))], 0.95)
    assert {check.outcome for check in checks} == {"fail"}
    assert [check.waived for check in checks] == ["", *["advisory"] * 9]


def test_an_open_question_names_the_items_that_would_decide():
    """At half an error above -2 errors: (1.96 / 0.5)^2 times as many items as there are."""
    (check,) = decide([question(-1.5, reach=-2.0)], 0.95)
    more = int(check.why.split("about ")[1].split()[0])
    assert more == math.ceil(100 * (norm.ppf(0.975) / 1.5) ** 2) - 100
