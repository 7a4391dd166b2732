"""A report's scores, differences and answers, before they are text or a picture.

Pure: everything comes from the Build record, so that every renderer says the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.artifacts import Build, Evaluation, Interval, Item
from pipeline.config import methods
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
    """A paired difference between two systems: the step's name and its gain or loss."""

    step: str
    metric: str
    change: Interval


@dataclass(frozen=True)
class Answer:
    """One system's answer to an item, and its score."""

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
    """The confidence that the build's policy asks for."""
    return float(build.config.get("gate", {}).get("confidence", 0.95))


def cluster_by(build: Build) -> str | None:
    """The column whose values count as one draw, by the build's policy, where the items have it."""
    column = build.config.get("gate", {}).get("cluster_by")
    rows = [row for evaluation in build.evaluations.values() for row in evaluation.items]
    return column if column and all(column in row.columns for row in rows) else None


def evaluated(build: Build) -> dict[str, Evaluation]:
    """The evaluations in the order in which a model comes to be."""
    return {role: build.evaluations[role] for role in ROLES if role in build.evaluations}


def method_label(build: Build) -> str | None:
    """METHOD, TOOL as the quantizer recorded it, such as `AWQ, llm-compressor`; None for a build without a quantized model.

    A build of version 0.1 recorded none: then the config's method tells it.
    """
    artifact = build.artifacts.get("quantize")
    if artifact is None:
        return None
    if label := artifact.detail.get("label"):
        return str(label)
    section = build.config.get("quantize", {})
    method = methods.of(section) if "method" in section else None
    return method.label if method else "quantization"


def method_title(build: Build) -> str:
    """The quantization method without its tool, such as `AWQ`."""
    return (method_label(build) or "quantization").partition(",")[0]


def system_label(build: Build, role: str) -> str:
    """A system's name with its kind: a base from quantized weights says so in every table."""
    base, artifact = build.artifacts.get("base"), build.artifacts.get("quantize")
    title, group_size = method_title(build), artifact.detail.get("group_size") if artifact else None
    kind = {
        "base": base.detail.get("quantized_from") if base else None,
        "merged": f"before {title}" if artifact else None,
        "candidate": (f"{title}, groups of {group_size}" if group_size else title) if artifact else "bf16",
        "incumbent": "champion",
    }[role]
    return f"{role} ({kind})" if kind else role


def metric_names(build: Build) -> list[str]:
    """Every metric with a score in some system, in the scorers' order, a metric's parts behind it."""
    order = [scorer["metric"] for scorer in build.config.get("evaluate", {}).get("scorers", ())]
    places = {name: place for place, name in enumerate(order)}
    metrics = dict.fromkeys(name for evaluation in evaluated(build).values() for name in evaluation.metrics)
    return sorted(metrics, key=lambda name: places.get(name.partition("/")[0], len(order)))


def headline(build: Build) -> str | None:
    """The metric to speak of first: the first that the policy compares, else its first, else any."""
    checks = build.config.get("gate", {}).get("metrics", ())
    comparisons = [check["metric"] for check in checks if check.get("against")]
    candidates, names = [*comparisons, *(check["metric"] for check in checks)], metric_names(build)
    return next((name for name in candidates if name in names), names[0] if names else None)


def short(figure: float) -> str:
    """A score or a figure as a person reads it: three digits, no exponent."""
    return f"{figure:.3f}" if abs(figure) < 10 else f"{figure:,.1f}" if abs(figure) < 1000 else f"{figure:,.0f}"


def with_interval(interval: Interval | None, *, sign: bool = False) -> str:
    """`0.910 (0.873 to 0.937)`, with a sign where it is a difference."""
    if interval is None:
        return "-"
    form = "+.3f" if sign else ""
    figures = (interval.value, interval.low, interval.high)
    return "{} ({} to {})".format(*(format(figure, form) if form else short(figure) for figure in figures))


def deltas(build: Build) -> list[Delta]:
    """Each step's paired change of the headline metric: training, quantization, since the incumbent.

    Steps whose two ends weren't scored on the same items are left out.
    """
    name, systems = headline(build), evaluated(build)
    steps = [
        ("fine-tuning", "merged" if "merged" in systems else "candidate", "base"),
        (method_title(build), "candidate", "merged"),
        ("against the incumbent", "candidate", "incumbent"),
    ]
    level, group = confidence(build), cluster_by(build)
    changes = []
    for step, after, before in steps:
        ours, theirs = systems.get(after), systems.get(before)
        if name and ours and theirs and same_items(ours, theirs):
            change = scoring.difference(ours.items, theirs.items, name, level, group)
            changes.append(Delta(f"{step}: {after} - {before}", name, change))
    return changes


def same_items(ours: Evaluation, theirs: Evaluation) -> bool:
    """Whether two evaluations can be compared item by item."""
    return len(ours.items) == len(theirs.items) and all(
        a.id == b.id and a.scores.keys() == b.scores.keys() for a, b in zip(ours.items, theirs.items, strict=True)
    )


def examples(build: Build, most: int) -> list[Example]:
    """At most `most` items side by side: flips first, those against the champion before the rest, then in holdout order.

    Half are items that the candidate lost, a quarter items that it won, the rest didn't flip; unused room goes to the next
    kind. Scored by `item_metric`.
    """
    systems = evaluated(build)
    if "candidate" not in systems:
        return []
    candidate = systems["candidate"]
    name, head = item_metric(build), len(shared_prompt(build))
    systems = {role: evaluation for role, evaluation in systems.items() if same_items(candidate, evaluation)}
    rows = sorted((_example(index, systems, name, head) for index in range(len(candidate.items))), key=_not_since)
    of_kind = {kind: [example for example in rows if example.kind == kind] for kind in EXAMPLE_ORDER}
    room = dict(zip(EXAMPLE_ORDER, (-(-most // 2), most // 4, most // 8, most // 8), strict=True))
    counts = {kind: min(room[kind], len(of_kind[kind])) for kind in EXAMPLE_ORDER}
    for kind in EXAMPLE_ORDER:
        counts[kind] = min(len(of_kind[kind]), counts[kind] + most - sum(counts.values()))
    return [example for kind in EXAMPLE_ORDER for example in of_kind[kind][: counts[kind]]]


def item_metric(build: Build) -> str:
    """The headline metric as single items have it: accuracy where that is macro-F1."""
    return scorers.scored_by(headline(build) or "")


def _not_since(example: Example) -> bool:
    """False, which sorts first, where candidate and champion differ."""
    scores = {answer.role: answer.score for answer in example.answers}
    return scores.get("incumbent", scores["candidate"]) == scores["candidate"]


def shared_prompt(build: Build) -> str:
    """The beginning that all prompts share, up to the user's own words: most often a system message."""
    prompts = [row.prompt for row in build.evaluations["candidate"].items] if build.evaluations else []
    head, turn, _ = prompts[0].partition(USER_TURN) if prompts else ("", "", "")
    beginning = head + turn
    return beginning if turn and all(prompt.startswith(beginning) for prompt in prompts) else ""


def _example(index: int, systems: Mapping[str, Evaluation], metric: str, head: int) -> Example:
    """The item at `index` by every system, its prompt without the first `head` characters."""
    rows: dict[str, Item] = {role: evaluation.items[index] for role, evaluation in systems.items()}
    ours = rows["candidate"]
    scores = {role: row.scores.get(metric, 0.0) for role, row in rows.items()}
    score, theirs = scores["candidate"], [scores[role] for role in scores if role != "candidate"]
    kind: Kind = "right" if score == 1 else "wrong"
    if max(theirs, default=score) > score:
        kind = "lost"
    elif min(theirs, default=score) < score:
        kind = "won"
    answers = tuple(Answer(role, row.answer, scores[role], row.finish_reason) for role, row in rows.items())
    return Example(ours.id, kind, ours.prompt[head:], ours.expected, answers)


def summary(build: Build) -> str:
    """The candidate's score in one sentence."""
    name, systems = headline(build), evaluated(build)
    if not name or "candidate" not in systems:
        return "Nothing was evaluated."
    candidate = systems["candidate"]
    score = with_interval(candidate.metrics.get(name))
    sentence = f"{name} {score} on {len(candidate.items)} held-out items as served by vLLM"
    theirs = [
        f"{system_label(build, role)} {short(systems[role].metrics[name].value)}"
        for role in ("base", "merged", "incumbent")
        if role in systems and name in systems[role].metrics
    ]
    return f"{sentence}; {', '.join(theirs)}." if theirs else f"{sentence}."
