"""Parts of a holdout."""

from __future__ import annotations

import json

from pipeline.artifacts import Item
from pipeline.evaluation import slices


def item(expected: str, **columns: str) -> Item:
    return Item(id="", prompt="?", expected=expected, answer="", finish_reason="stop", scores={}, columns=columns)


def test_an_item_belongs_to_its_column_its_label_or_a_field_of_its_answer():
    """What isn't there belongs to no part."""
    ticket = item(json.dumps({"category": "billing", "count": 2}), channel="mail")
    assert slices.value_of(ticket, "channel") == "mail"
    assert slices.value_of(ticket, "expected.category") == "billing"
    assert slices.value_of(ticket, "expected.count") == "2"
    assert slices.value_of(item(" Card_Lost."), "expected") == "card_lost"
    assert [slices.value_of(item("no JSON"), by) for by in ("expected.category", "channel")] == [None, None]


def test_small_parts_come_together():
    """Largest first; parts below the limit and items without one are the others."""
    channels = ["mail"] * 3 + ["chat"] * 4 + ["fax"]
    items = [*(item("", channel=channel) for channel in channels), item("")]
    assert slices.split(items, "channel", 3) == {
        "chat": [3, 4, 5, 6], "mail": [0, 1, 2], slices.OTHER: [7, 8],
    }  # fmt: skip
    assert slices.split(items[:7], "channel", 1) == {"chat": [3, 4, 5, 6], "mail": [0, 1, 2]}
