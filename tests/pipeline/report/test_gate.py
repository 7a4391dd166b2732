"""The verdict in one sentence, and the distances that the forest plot shows."""

from __future__ import annotations

import pytest
from support.sample_build import sample_build

from pipeline.artifacts import Build, Check, Interval, Verdict
from pipeline.report import gate


def check(outcome: str, rule: str = "a >= 0.8", threshold: float = 0.8, waived: str = "", **of: float) -> Check:
    estimate = Interval(**of) if of else None
    return Check(
        name="a", outcome=outcome, estimate=estimate, threshold=threshold, rule=rule, why="so it is", waived=waived
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return sample_build(tmp_path_factory.mktemp("store"), count=100)


def judged(build: Build, outcome: str, *checks: Check) -> Build:
    verdict = Verdict(outcome=outcome, unit_digest="u", policy_digest="p", checks=checks)
    return build.model_copy(update={"verdict": verdict})


def test_the_sentence_names_what_decides(build):
    """The first check with the verdict's outcome that isn't waived, and how many more there are."""
    passed, failed, open_ = check("pass"), check("fail"), check("inconclusive", rule="b >= 1")
    waived = check("fail", rule="c >= 1", waived="known")
    assert gate.why(judged(build, "pass", passed, passed)) == "Passes: all 2 checks hold."
    assert gate.why(judged(build, "pass", passed, waived)) == "Passes: all 1 checks hold (1 more not counted)."
    said = gate.why(judged(build, "fail", passed, waived, failed, failed, open_))
    assert said == "Fails: a >= 0.8: so it is; so with 1 more check (1 more not counted)."
    assert gate.why(judged(build, "inconclusive", passed, open_)) == "Undecided: b >= 1: so it is."
    assert gate.why(build.model_copy(update={"verdict": None})) == "Not judged."


def test_checks_come_by_what_stands_in_the_way(build):
    """Fail, inconclusive, pass; what is waived last, whatever its outcome."""
    checks = [check("pass"), check("fail", waived="known"), check("inconclusive"), check("fail")]
    found = gate.checks(judged(build, "fail", *checks).verdict)
    assert [(one.outcome, bool(one.waived)) for one in found] == [
        ("fail", False), ("inconclusive", False), ("pass", False), ("fail", True),
    ]  # fmt: skip


def test_the_allowed_side_is_above_zero():
    """A floor's and a ceiling's distance; scores in their unit, times and rates as a share of the threshold."""
    floor = check("pass", value=0.9, low=0.85, high=0.95)
    assert gate.distance(floor).model_dump() == pytest.approx({"value": 0.1, "low": 0.05, "high": 0.15})
    slow = check("fail", rule="p50_ttft_ms <= 500 at concurrency 1", threshold=500, value=750, low=700, high=800)
    assert gate.distance(slow).model_dump() == pytest.approx({"value": -0.5, "low": -0.6, "high": -0.4})
    fast = check("pass", rule="output_throughput >= 20 at concurrency 8", threshold=20, value=30, low=25, high=40)
    assert gate.distance(fast).model_dump() == pytest.approx({"value": 0.5, "low": 0.25, "high": 1.0})
    assert gate.distance(check("pass")) is None
