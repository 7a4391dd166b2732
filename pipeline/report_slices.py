"""Slices of the holdout in a report: by the rows' own columns and by what was expected, those that differ most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import scoring
from pipeline.artifacts import Build, Interval, Item
from pipeline.report_content import confidence, evaluated, item_metric, same_items

MIN_ITEMS = 10  # fewer say nothing
LONGEST = 60  # characters: longer values are texts, no names


@dataclass(frozen=True)
class Slice:
    """The items with one value in one column: the candidate's score, and its paired difference to the other system."""

    column: str
    value: str
    items: int
    score: Interval
    change: Interval | None


@dataclass(frozen=True)
class Slices:
    """The slices shown, the worst first, of all that were `found`; `against` is the system compared with."""

    metric: str
    against: str | None
    found: int
    shown: tuple[Slice, ...]


def slices(build: Build, most: int) -> Slices | None:
    """At most `most` slices of the candidate's items: where it lost most, and a few where it won most.

    Against the champion, else the base; where neither was scored on the same items, by the score itself. They are the extremes
    of all slices: with many, some lie apart by chance.
    """
    found = evaluated(build)
    metric = item_metric(build)
    if "candidate" not in found:
        return None
    ours = found["candidate"]
    against = next((role for role in ("incumbent", "base") if role in found and same_items(ours, found[role])), None)
    theirs = found[against].items if against else ours.items
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, item in enumerate(ours.items):
        if metric in item.scores:
            for name in names(item):
                members[name].append(index)
    kept = {name: inside for name, inside in members.items() if MIN_ITEMS <= len(inside) < len(ours.items)}
    if not kept:
        return None

    def gap(inside: list[int]) -> float:
        given = sum(theirs[index].scores[metric] for index in inside) if against else 0.0
        return (sum(ours.items[index].scores[metric] for index in inside) - given) / len(inside)

    order = sorted(kept, key=lambda name: (gap(kept[name]), name))
    best = most // 3 if len(order) > most else 0
    chosen = order[: most - best] + order[len(order) - best :]
    level = confidence(build)
    shown = [
        _slice(
            name, [ours.items[i] for i in kept[name]], [theirs[i] for i in kept[name]] if against else [], metric, level
        )
        for name in chosen
    ]
    return Slices(metric, against, len(kept), tuple(shown))


def _slice(name: tuple[str, str], ours: list[Item], theirs: list[Item], metric: str, level: float) -> Slice:
    change = scoring.difference(ours, theirs, metric, level) if theirs else None
    return Slice(*name, len(ours), scoring.metric(ours, metric, level), change)


def names(item: Item) -> Iterator[tuple[str, str]]:
    """The slices an item belongs to: its columns, then its expected answer, which of a JSON object is each plain field."""
    yield from ((column, value) for column, value in item.columns.items() if len(value) <= LONGEST)
    try:
        expected = scoring.parse_json(item.expected)
    except ValueError:
        expected = item.expected
    if isinstance(expected, dict):
        plain = ((field, value) for field, value in expected.items() if isinstance(value, str | int | float))
        yield from ((f"expected {field}", str(value)) for field, value in plain if len(str(value)) <= LONGEST)
    elif isinstance(expected, str) and expected and len(expected) <= LONGEST:
        yield "expected", expected
