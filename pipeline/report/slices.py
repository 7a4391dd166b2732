"""Slices of the holdout in a report, by the rows' own columns and by the expected answer: those that differ most."""

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

    `by` is the criterion as gate.slices names it: a column, expected, or expected.FIELD.
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

    Compared with the champion, else the base; where neither was scored on the same items, ordered by the score itself. These
    are extremes: among many slices some lie apart by chance. The gate decides on those that the policy names.
    """
    systems, metric = evaluated(build), item_metric(build)
    candidate = systems.get("candidate")
    if candidate is None or not any(metric in row.scores for row in candidate.items):
        return None
    ours = candidate.items
    against = next(
        (role for role in ("incumbent", "base") if role in systems and same_items(candidate, systems[role])), None
    )
    theirs = systems[against].items if against else ()
    parts = _parts(ours, metric)

    def gap(inside: list[int]) -> float:
        return sum(ours[n].scores[metric] - (theirs[n].scores[metric] if theirs else 0.0) for n in inside) / len(inside)

    order = sorted(parts, key=lambda name: (gap(parts[name]), name))
    best = most // 3 if len(order) > most else 0
    rows = []
    for name in order[: most - best] + order[len(order) - best :]:
        after, before = [ours[n] for n in parts[name]], [theirs[n] for n in parts[name]] if theirs else []
        level, group = confidence(build), cluster_by(build)
        change = scoring.difference(after, before, metric, level, group) if before else None
        rows.append(Slice(*name, len(after), scoring.metric(after, metric, level, group), change))
    return Slices(metric, against, len(parts), tuple(rows)) if rows else None


def _parts(items: Sequence[Item], metric: str) -> dict[tuple[str, str], list[int]]:
    """Places of the items with the metric, by (criterion, value); small parts, the whole and long values are left out."""
    parts = {}
    for by in dict.fromkeys(name for row in items for name in splits(row)):
        for label, inside in slices.split(items, by, MIN_ITEMS).items():
            places = [n for n in inside if metric in items[n].scores]
            if label != slices.OTHER and len(label) <= LONGEST and MIN_ITEMS <= len(places) < len(items):
                parts[by, label] = places
    return parts


def splits(row: Item) -> Iterator[str]:
    """An item's criteria as a policy names them: its columns, its label, the plain fields of an expected JSON object."""
    yield from row.columns
    try:
        answer = scorers.parse_json(row.expected)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        yield from (f"{slices.EXPECTED}.{name}" for name, field in answer.items() if not isinstance(field, dict | list))
    elif row.expected and len(row.expected) <= LONGEST:
        yield slices.EXPECTED
