"""pipeline.report.page: a build as its reviewer reads it."""

from __future__ import annotations

import dataclasses

import pytest
from support.sample_build import full_build, sample_build

from pipeline.artifacts import Build
from pipeline.report import facts
from pipeline.report.page import EXAMPLES, SLICES, Page, page


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return sample_build(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Build:
    return full_build(tmp_path_factory.mktemp("full"))


def with_prompts(build: Build, beginning: str) -> Build:
    """The build whose candidate was asked everything behind the same words."""
    candidate = build.evaluations["candidate"]
    rows = tuple(row.model_copy(update={"prompt": beginning + row.prompt}) for row in candidate.items)
    return build.model_copy(
        update={"evaluations": {**build.evaluations, "candidate": candidate.model_copy(update={"items": rows})}}
    )


def empty_parts(report: Page) -> set[str]:
    """The page's fields that hold nothing."""
    return {field.name for field in dataclasses.fields(report) if not getattr(report, field.name)}


def test_a_whole_build_fills_the_page(full):
    """Every part that a reviewer can see comes from a build that has everything; only no words are shared by its prompts."""
    assert empty_parts(page(full)) == {"shared_prompt"}


def test_a_build_leaves_out_what_it_has_not(build):
    """Without champion, ledger, prompts, tasks, judge and price those parts are empty, and no other."""
    absent = {"prompts", "ledger", "tasks", "judged", "costs", "shared_prompt"}
    assert empty_parts(page(build)) == absent


def test_an_unjudged_build_is_not_judged(build):
    """No verdict: no outcome, no checks, and the next command isn't an approval; scores are shown all the same."""
    report = page(build.model_copy(update={"verdict": None}))
    assert (report.outcome, report.why, report.checks) == ("not judged", "Not judged.", [])
    assert [command for command, _ in report.next] == ["tunegate run CONFIG"]
    assert report.scores == page(build).scores


def test_the_page_names_what_is_approved(full):
    """Name, the gate's outcome, the served unit's digest, and the limits of what was measured."""
    report = page(full)
    assert (report.name, report.outcome, report.unit) == ("tickets", "fail", full.unit.digest)
    assert ("served unit", report.unit) in report.serving
    assert report.notes == facts.NOTES


def test_scores_stand_in_the_order_in_which_a_model_comes_to_be(full):
    """Whatever order the record holds them in, and with every metric as the evaluation has it."""
    backwards = full.model_copy(update={"evaluations": dict(reversed(full.evaluations.items()))})
    scores = page(backwards).scores
    assert list(scores) == ["base", "merged", "candidate", "incumbent"]
    assert scores["candidate"] == full.evaluations["candidate"].metrics


def test_long_lists_are_cut_to_what_a_person_reads(full):
    """Twenty examples, and the nine slices that lie furthest apart."""
    report = page(full)
    assert len(report.examples) == EXAMPLES
    assert 0 < len(report.slices.shown) <= SLICES
    few = page(full.model_copy(update={"evaluations": {
        role: evaluation.model_copy(update={"items": evaluation.items[:7]})
        for role, evaluation in full.evaluations.items()
    }}))  # fmt: skip
    assert len(few.examples) == 7


def test_the_policys_confidence_holds_for_the_whole_page(build):
    """A policy that asks for more has wider intervals for every difference, and the page says which."""
    surer = build.model_copy(update={"config": {**build.config, "gate": {**build.config["gate"], "confidence": 0.99}}})
    usual_page, surer_page = page(build), page(surer)
    assert (usual_page.confidence, surer_page.confidence) == (0.95, 0.99)
    for usual, wide in zip(usual_page.deltas, surer_page.deltas, strict=True):
        assert wide.change.value == usual.change.value
        assert wide.change.low < usual.change.low < usual.change.high < wide.change.high


def test_a_shared_prompt_stands_apart_without_the_users_turn(build):
    """The words that all prompts begin with are on the page once, the examples begin behind them."""
    report = page(with_prompts(build, "system: Triage the ticket.\nBe brief.\nuser: "))
    assert report.shared_prompt == "system: Triage the ticket.\nBe brief."
    assert [example.prompt for example in report.examples] == [example.prompt for example in page(build).examples]


def test_blocking_checks_come_first(full):
    """What made it fail is above what holds."""
    outcomes = [check.outcome for check in page(full).checks]
    assert outcomes[0] == "fail"
    assert outcomes == sorted(outcomes, key=["fail", "inconclusive", "pass"].index)


def test_costs_are_those_of_the_load_on_the_page(full):
    """One line for each of the candidate's levels, at the throughput that the load table shows."""
    report = page(full)
    rates = {
        level.users: level.metrics["output_throughput"].interval for level in report.load if level.system == "candidate"
    }
    assert {cost.users: cost.tokens_per_second for cost in report.costs} == rates


def test_a_record_read_back_gives_the_same_page(full):
    """The registry's copy of a build shows a reviewer what the run's own page showed."""
    assert page(Build.model_validate_json(full.model_dump_json())) == page(full)
