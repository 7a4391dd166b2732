"""The ledger in a report: the step that lost most in words, or that none did."""

from __future__ import annotations

import pytest
from support.sample_build import ledger, sample_build

from pipeline.artifacts import Build
from pipeline.report import ledger as report_ledger
from pipeline.report import render


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return sample_build(tmp_path_factory.mktemp("store"), count=100).model_copy(update={"ledger": ledger()})


def test_the_step_that_lost_most_is_named(build):
    """With its paired change; every step has its score, and the way to merge that wasn't taken says so."""
    found = report_ledger.ledger(build)
    assert found.said.startswith("AWQ lost most: json_field_match -0.0")
    assert [step.taken for step in found.steps] == [True, True, False, True, True, True]
    awq = found.steps[4]
    assert (awq.step, awq.before) == ("quantized", "merged_dequantized")
    assert awq.change.high < 0
    head, *rows = render.ledger_table(found)
    assert head == ["step", "engine", "json_field_match", "change to the step before"]
    assert rows[0][3] == "-"
    assert rows[2][0] == "merged into the original base (not taken)"


def test_a_loss_within_chance_is_no_loss(build):
    """AWQ that answers as the merge did: no step is named."""
    entries = list(build.ledger)
    same = [entries[n].model_copy(update={"items": entries[3].items}) for n in (4, 5)]
    even = build.model_copy(update={"ledger": (*entries[:4], *same)})
    assert report_ledger.ledger(even).said == "No step lost measurably."


def test_steps_on_other_items_are_shown_and_not_compared(build):
    """The scores stay, the changes go, and the sentence says why."""
    entries = list(build.ledger)
    entries[4] = entries[4].model_copy(update={"items": entries[4].items[1:]})
    found = report_ledger.ledger(build.model_copy(update={"ledger": tuple(entries)}))
    assert "not scored on the same items" in found.said
    assert all(step.change is None for step in found.steps)


def test_no_ledger_is_none(build):
    """Nor is one without items."""
    empty = tuple(entry.model_copy(update={"items": ()}) for entry in build.ledger)
    assert report_ledger.ledger(build.model_copy(update={"ledger": ()})) is None
    assert report_ledger.ledger(build.model_copy(update={"ledger": empty})) is None
