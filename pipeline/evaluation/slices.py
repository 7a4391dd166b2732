"""Parts of a holdout: items by a column, by their label, or by a field of their expected JSON answer."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.artifacts import Item
from pipeline.evaluation import scoring

EXPECTED = "expected"
OTHER = "(other)"


def value_of(item: Item, by: str) -> str | None:
    """The part that an item belongs to; None where it has no such column or field."""
    if by == EXPECTED:
        return scoring.label(item.expected)
    head, _, field = by.partition(".")
    if head != EXPECTED:
        return item.columns.get(by)
    try:
        answer = scoring.parse_json(item.expected)
    except ValueError:
        return None
    value = answer.get(field) if isinstance(answer, dict) else None
    return value if value is None or isinstance(value, str) else str(value)


def split(items: Sequence[Item], by: str, min_items: int) -> dict[str, list[int]]:
    """Indices of the items of each part, largest part first; parts of fewer than `min_items` come together as (other)."""
    parts: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        value = value_of(item, by)
        parts.setdefault(OTHER if value is None else value, []).append(index)
    large = {name: found for name, found in parts.items() if len(found) >= min_items and name != OTHER}
    rest = sorted(index for name, found in parts.items() if name not in large for index in found)
    ordered = dict(sorted(large.items(), key=lambda part: (-len(part[1]), part[0])))
    return {**ordered, OTHER: rest} if rest else ordered
