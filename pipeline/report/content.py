"""What a report says of a build's scores and answers, before it is text or a picture.

Pure: everything comes from the Build record, so that every renderer says the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.artifacts import Build, Evaluation, Interval, Item
from pipeline.evaluation import scorers, scoring

Kind = Literal["lost", "won", "wrong", "right"]

USER_TURN = "\nuser: "  # as evaluate shows a prompt of several messages
ROLES = ("base", "merged", "candidate", "incumbent")
EXAMPLE_ORDER: dict[Kind, str] = {
    "lost": "Lost: another system was better",
    "won": "Won: better than another system, and no worse than any",
    "wrong": "Wrong for every system",
    "right": "Right for every system",
}


@dataclass(frozen=True)
class Delta:
    """A paired difference between two systems: the name of the step and what it gained or lost."""

    step: str
    metric: str
    change: Interval


@dataclass(frozen=True)
class Answer:
    """What one system said to an item, and its score."""

    role: str
    text: str
    score: float
    finish_reason: str


@dataclass(frozen=True)
class Example:
    """One item with every system's answer."""

    id: str
    kind: Kind
    prompt: str
    expected: str
    answers: tuple[Answer, ...]


def confidence(build: Build) -> float:
    """How sure the build's policy wants to be."""
    return float(build.config.get("gate", {}).get("confidence", 0.95))


def cluster_by(build: Build) -> str | None:
    """The column whose values count as one draw, by the build's policy, where the items have it."""
    column = build.config.get("gate", {}).get("cluster_by")
    items = [item for found in build.evaluations.values() for item in found.items]
    return column if column and all(column in item.columns for item in items) else None


def evaluated(build: Build) -> dict[str, Evaluation]:
    """The evaluations in the order in which a model comes to be."""
    return {role: build.evaluations[role] for role in ROLES if role in build.evaluations}


def system_label(build: Build, role: str) -> str:
    """A system's name with what it really is: a base that was quantized before says so in every table."""
    base = build.artifacts.get("base")
    from_gguf = base.detail.get("quantized_from") if base else None
    quantized = build.artifacts.get("quantize")
    kind = {
        "base": from_gguf,
        "merged": "before AWQ" if quantized else None,
        "candidate": f"AWQ, groups of {quantized.detail.get('group_size')}" if quantized else "bf16",
        "incumbent": "champion",
    }[role]
    return f"{role} ({kind})" if kind else role


def metric_names(build: Build) -> list[str]:
    """Every metric that some system was scored by, in the scorers' order, a metric's parts behind it."""
    order = [scorer["metric"] for scorer in build.config.get("evaluate", {}).get("scorers", ())]
    places = {name: place for place, name in enumerate(order)}
    found = dict.fromkeys(name for evaluation in evaluated(build).values() for name in evaluation.metrics)
    return sorted(found, key=lambda name: places.get(name.partition("/")[0], len(order)))


def headline(build: Build) -> str | None:
    """The metric to speak of first: the first that the policy compares, else its first, else any."""
    checks = build.config.get("gate", {}).get("metrics", ())
    compared = [check["metric"] for check in checks if check.get("against")]
    wanted, names = [*compared, *(check["metric"] for check in checks)], metric_names(build)
    return next((name for name in wanted if name in names), names[0] if names else None)


def short(value: float) -> str:
    """A score or a figure as a person reads it: three digits, no exponent."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def with_interval(interval: Interval | None, *, sign: bool = False) -> str:
    """`0.910 (0.873 to 0.937)`, with a sign where it is a difference."""
    if interval is None:
        return "-"
    form = "+.3f" if sign else ""
    values = [format(value, form) if form else short(value) for value in (interval.value, interval.low, interval.high)]
    return "{} ({} to {})".format(*values)


def deltas(build: Build) -> list[Delta]:
    """What each step did to the headline metric on the same items: training, AWQ, since the incumbent.

    Steps whose two ends weren't scored on the same items are left out.
    """
    name, found = headline(build), evaluated(build)
    tuned = "merged" if "merged" in found else "candidate"
    steps = [
        ("fine-tuning", tuned, "base"),
        ("AWQ", "candidate", "merged"),
        ("against the incumbent", "candidate", "incumbent"),
    ]
    made = []
    for step, ours, theirs in steps:
        if name and ours in found and theirs in found and same_items(found[ours], found[theirs]):
            gap = scoring.difference(found[ours].items, found[theirs].items, name, confidence(build), cluster_by(build))
            made.append(Delta(f"{step}: {ours} - {theirs}", name, gap))
    return made


def same_items(one: Evaluation, other: Evaluation) -> bool:
    """Whether two evaluations can be compared item by item."""
    return len(one.items) == len(other.items) and all(
        a.id == b.id and a.scores.keys() == b.scores.keys() for a, b in zip(one.items, other.items, strict=True)
    )


def examples(build: Build, most: int) -> list[Example]:
    """At most `most` items side by side, flips first, those against the champion before the others, then in holdout order.

    Half are items that the candidate lost, so far as there are, a quarter that it won, the rest those that didn't flip.
    Scored by the headline metric (by accuracy where that is macro-F1, which no single item has).
    """
    found = evaluated(build)
    if "candidate" not in found:
        return []
    candidate = found["candidate"]
    name = item_metric(build)
    systems = {role: other for role, other in found.items() if same_items(candidate, other)}
    shared = len(shared_prompt(build))
    made = sorted((_example(index, systems, name, shared) for index in range(len(candidate.items))), key=_not_since)
    of_kind = {kind: [one for one in made if one.kind == kind] for kind in EXAMPLE_ORDER}
    room = dict(zip(EXAMPLE_ORDER, (-(-most // 2), most // 4, most // 8, most // 8), strict=True))
    taken = {kind: min(room[kind], len(of_kind[kind])) for kind in EXAMPLE_ORDER}
    for kind in EXAMPLE_ORDER:
        taken[kind] = min(len(of_kind[kind]), taken[kind] + most - sum(taken.values()))
    return [one for kind in EXAMPLE_ORDER for one in of_kind[kind][: taken[kind]]]


def item_metric(build: Build) -> str:
    """The headline metric as single items have it: accuracy where that is macro-F1."""
    return scorers.scored_by(headline(build) or "")


def _not_since(example: Example) -> bool:
    """False, which sorts first, where candidate and champion differ."""
    scores = {answer.role: answer.score for answer in example.answers}
    return scores.get("incumbent", scores["candidate"]) == scores["candidate"]


def shared_prompt(build: Build) -> str:
    """What every prompt begins with, up to the user's own words: most often a system message."""
    prompts = [item.prompt for item in build.evaluations["candidate"].items] if build.evaluations else []
    head, turn, _ = prompts[0].partition(USER_TURN) if prompts else ("", "", "")
    shared = head + turn
    return shared if turn and all(prompt.startswith(shared) for prompt in prompts) else ""


def _example(index: int, systems: Mapping[str, Evaluation], metric: str, shared: int) -> Example:
    items: dict[str, Item] = {role: found.items[index] for role, found in systems.items()}
    ours = items["candidate"]
    scores = {role: item.scores.get(metric, 0.0) for role, item in items.items()}
    others = [score for role, score in scores.items() if role != "candidate"]
    score = scores["candidate"]
    kind: Kind = "right" if score == 1 else "wrong"
    if any(other > score for other in others):
        kind = "lost"
    elif any(other < score for other in others):
        kind = "won"
    answers = tuple(Answer(role, item.answer, scores[role], item.finish_reason) for role, item in items.items())
    return Example(ours.id, kind, ours.prompt[shared:], ours.expected, answers)


def summary(build: Build) -> str:
    """What the candidate scores, in one sentence."""
    name, found = headline(build), evaluated(build)
    if not name or "candidate" not in found:
        return "Nothing was evaluated."
    candidate = found["candidate"]
    score = with_interval(candidate.metrics.get(name))
    said = f"{name} {score} on {len(candidate.items)} held-out items as served by vLLM"
    others = [
        f"{system_label(build, role)} {short(found[role].metrics[name].value)}"
        for role in ("base", "merged", "incumbent")
        if role in found and name in found[role].metrics
    ]
    return f"{said}; {', '.join(others)}." if others else f"{said}."
