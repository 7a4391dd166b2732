"""Slices of the holdout in a report: by the rows' own columns and by what was expected, those that differ most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.artifacts import Build, Interval, Item
from pipeline.evaluation import scorers, scoring, slices
from pipeline.report.content import cluster_by, confidence, evaluated, item_metric, same_items

MIN_ITEMS = 10  # fewer say nothing
LONGEST = 60  # characters: longer values are texts, no names


@dataclass(frozen=True)
class Slice:
    """The items with one value: the candidate's score, and its paired difference to the other system.

    `by` is what they are split by, as gate.slices names it: a column, expected, or expected.FIELD.
    """

    by: str
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


def extremes(build: Build, most: int) -> Slices | None:
    """At most `most` slices of the candidate's items: where it lost most, and a few where it won most.

    Against the champion, else the base; where neither was scored on the same items, by the score itself. They are the extremes
    of all slices: with many, some lie apart by chance. The gate judges those that the policy names.
    """
    found, metric = evaluated(build), item_metric(build)
    if "candidate" not in found or not any(metric in item.scores for item in found["candidate"].items):
        return None
    ours = found["candidate"].items
    against = next(
        (role for role in ("incumbent", "base") if role in found and same_items(found["candidate"], found[role])), None
    )
    theirs = found[against].items if against else ()
    parts = _parts(ours, metric)

    def gap(inside: list[int]) -> float:
        return sum(ours[n].scores[metric] - (theirs[n].scores[metric] if theirs else 0.0) for n in inside) / len(inside)

    order = sorted(parts, key=lambda name: (gap(parts[name]), name))
    best = most // 3 if len(order) > most else 0
    shown = []
    for name in order[: most - best] + order[len(order) - best :]:
        mine, other = [ours[n] for n in parts[name]], [theirs[n] for n in parts[name]] if theirs else []
        level, group = confidence(build), cluster_by(build)
        change = scoring.difference(mine, other, metric, level, group) if other else None
        shown.append(Slice(*name, len(mine), scoring.metric(mine, metric, level, group), change))
    return Slices(metric, against, len(parts), tuple(shown)) if shown else None


def _parts(items: Sequence[Item], metric: str) -> dict[tuple[str, str], list[int]]:
    """The items with the metric by (what they are split by, value); too small parts, whole ones and long values are left out."""
    found = {}
    for by in dict.fromkeys(name for item in items for name in splits(item)):
        for value, inside in slices.split(items, by, MIN_ITEMS).items():
            scored = [n for n in inside if metric in items[n].scores]
            if value != slices.OTHER and len(value) <= LONGEST and MIN_ITEMS <= len(scored) < len(items):
                found[by, value] = scored
    return found


def splits(item: Item) -> Iterator[str]:
    """What an item can be split by, as a policy names it: its columns, its label, the plain fields of an expected JSON object."""
    yield from item.columns
    try:
        expected = scorers.parse_json(item.expected)
    except ValueError:
        expected = None
    if isinstance(expected, dict):
        yield from (
            f"{slices.EXPECTED}.{name}" for name, value in expected.items() if not isinstance(value, dict | list)
        )
    elif item.expected and len(item.expected) <= LONGEST:
        yield slices.EXPECTED
