"""The ledger's arithmetic, and that a planted fault is named at its step."""

from __future__ import annotations

import pytest

from pipeline import ledger
from pipeline.artifacts import Item, LedgerEntry


def entry(step: str, right: int, count: int = 40, first: int = 0) -> LedgerEntry:
    """A step that has the first `right` items right."""
    items = tuple(
        Item(id=str(number), prompt="?", expected="yes", answer="yes", finish_reason="stop",
             scores={"exact_match": float(number < right)})
        for number in range(first, first + count)
    )  # fmt: skip
    return LedgerEntry(step=step, engine="vllm" if step == "served" else "transformers", items=items)


def whole(**right: int) -> list[LedgerEntry]:
    """A ledger in order, with the dequantized merge taken."""
    usual = {"base": 0, "adapter": 36, "merged_original": 36, "merged_dequantized": 36, "quantized": 35, "served": 35}
    return [entry(step, count) for step, count in {**usual, **right}.items()]


def test_each_step_is_held_against_what_it_was_made_from():
    """Both merges against the adapter, AWQ against the merge that stands before it, serving against AWQ."""
    found = ledger.changes(whole(merged_original=20), "exact_match", 0.95)
    assert [(one.step, one.before) for one in found] == [
        ("adapter", "base"), ("merged_original", "adapter"), ("merged_dequantized", "adapter"),
        ("quantized", "merged_dequantized"), ("served", "quantized"),
    ]  # fmt: skip
    assert found[1].change.value == pytest.approx(-0.4)
    assert found[3].change.value == pytest.approx(-1 / 40)


def test_the_step_that_lost_most_is_named():
    """Two steps lose measurably; the larger loss is the culprit."""
    found = ledger.culprit(whole(merged_dequantized=30, quantized=12, served=12), "exact_match", 0.95)
    assert found
    assert (found.step, found.before) == ("quantized", "merged_dequantized")
    assert found.change.value == pytest.approx(-18 / 40)
    assert found.change.high < 0


def test_a_loss_within_chance_names_nobody():
    """One item of 40 is no proof."""
    assert ledger.culprit(whole(), "exact_match", 0.95) is None
    assert ledger.culprit([], "exact_match", 0.95) is None


def test_the_merge_that_was_not_taken_is_no_culprit():
    """It is on nobody's way; the table shows it all the same."""
    assert ledger.culprit(whole(merged_original=5), "exact_match", 0.95) is None


def test_a_step_that_was_not_measured_is_passed_over():
    """What follows it is held against the step before, and says so."""
    entries = [one for one in whole(served=10) if one.step != "quantized"]
    found = ledger.culprit(entries, "exact_match", 0.95)
    assert found
    assert (found.step, found.before) == ("served", "merged_dequantized")


def test_other_items_are_no_pairs():
    """A ledger over different items is a mistake of the caller's."""
    with pytest.raises(ValueError, match="quantized and adapter were not scored on the same items"):
        ledger.changes([entry("adapter", 30), entry("quantized", 30, first=1)], "exact_match", 0.95)
