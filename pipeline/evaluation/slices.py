"""Parts of a holdout: items by a column, by their label, or by a field of their expected JSON answer."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.artifacts import Item
from pipeline.evaluation import scorers

EXPECTED = "expected"
OTHER = "(other)"


def value_of(item: Item, by: str) -> str | None:
    """The part that an item belongs to; None where the item lacks the column or field."""
    if by == EXPECTED:
        return scorers.label(item.expected)
    head, _, field = by.partition(".")
    if head != EXPECTED:
        return item.columns.get(by)
    try:
        reference = scorers.parse_json(item.expected)
    except ValueError:
        return None
    part = reference.get(field) if isinstance(reference, dict) else None
    return part if part is None or isinstance(part, str) else str(part)


def split(items: Sequence[Item], by: str, min_items: int) -> dict[str, list[int]]:
    """Indices of the items of each part, largest part first; parts of fewer than `min_items` come together as (other)."""
    parts: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        name = value_of(item, by)
        parts.setdefault(OTHER if name is None else name, []).append(index)
    large = {name: indices for name, indices in parts.items() if len(indices) >= min_items and name != OTHER}
    rest = sorted(index for name, indices in parts.items() if name not in large for index in indices)
    by_size = dict(sorted(large.items(), key=lambda part: (-len(part[1]), part[0])))
    return {**by_size, OTHER: rest} if rest else by_size
