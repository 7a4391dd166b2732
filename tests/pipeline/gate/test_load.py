from __future__ import annotations

import pytest

from pipeline.artifacts import LoadLevel, LoadTest
from pipeline.config.gate import GateConfig, LoadCheck
from pipeline.gate import load

OBJECTIVE = GateConfig(load=(LoadCheck(metric="p50_e2el_ms", max_concurrency=4, max=120),))


def loadtests(values: tuple[float, ...], *, failures: int = 0, completed: int = 30) -> dict[str, LoadTest]:
    """A candidate's load test of one level with these medians, a value a run."""
    samples = {"e2el_ms": tuple((value,) * 10 for value in values)}
    level = LoadLevel(
        max_concurrency=4, completed=completed, failed=failures, metrics={"p50_e2el_ms": values}, samples=samples
    )
    return {"candidate": LoadTest(system="candidate", unit_digest="u", levels=(level,))}


@pytest.mark.parametrize(
    ("values", "outcome", "words"),
    [
        ((100.0, 101.0, 102.0), "pass", "t interval over 3 repeats"),
        ((200.0, 201.0, 202.0), "fail", "t interval over 3 repeats"),
        ((100.0, 120.0, 140.0), "inconclusive", "more requests or repeats would narrow it"),
        ((100.0,), "inconclusive", "set loadtest.repeats to 3 or more"),
    ],
)
def test_an_objective_says_how_it_was_decided(values, outcome, words):
    """Three like runs decide, three unlike ones and a single one don't, and `why` says what would."""
    (check,) = load.objectives(loadtests(values), OBJECTIVE)
    assert (check.name, check.outcome) == ("p50_e2el_ms at 4", outcome)
    assert words in check.why


def test_a_level_without_a_finished_request_fails():
    """There is no figure to bound, and the reason is told."""
    (check,) = load.objectives(loadtests((0.0,), failures=9, completed=0), OBJECTIVE)
    assert (check.outcome, check.why) == ("fail", "no request finished")


@pytest.mark.parametrize(
    ("failures", "requests", "outcome"), [(0, 50, "pass"), (1, 50, "fail"), (0, 0, "inconclusive")]
)
def test_failed_requests_are_decided_as_counted(failures, requests, outcome):
    """One of fifty is over a limit of 0; no request at all proves nothing."""
    check = load.errors_check("load test", failures, requests, GateConfig())
    assert (check.outcome, check.why) == (outcome, f"{failures} of {requests} requests failed")


def test_without_a_load_test_there_is_no_check():
    """Neither of errors nor of objectives."""
    assert [*load.errors({}, OBJECTIVE), *load.objectives({}, OBJECTIVE)] == []
    assert [check.name for check in load.errors(loadtests((1.0,)), OBJECTIVE)] == ["errors in load test"]
