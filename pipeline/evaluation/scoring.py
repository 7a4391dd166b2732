"""Items to metrics: every answer scored by an evaluation's scorers, every metric with its interval.

An item whose request failed scores 0 everywhere. scipy loads when first used, and so do scorers of a user's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from pipeline.artifacts import Interval, Item
from pipeline.config.schema import Scorer
from pipeline.errors import Problem
from pipeline.evaluation import plugins
from pipeline.evaluation.scorers import F1_MACRO, SCORERS, has_parts, label
from pipeline.intervals.macro_f1 import f1_macro_difference_interval, f1_macro_interval
from pipeline.intervals.scores import difference_interval, mean_interval


class Score(Protocol):
    """Scores an answer by all scorers of an evaluation."""

    def __call__(self, reference: str, answer: str | None, prompt: plugins.Prompt = ()) -> dict[str, float]:
        """Scores by metric; an answer of None, a failed request, scores 0. `prompt` is for a user's own scorer."""


def item_scorer(scorers: Iterable[Scorer]) -> Score:
    """One function that scores an item by all scorers.

    Raises ConfigError when a JSON Schema isn't one; the function raises ScorerBroken where a user's own scorer fails.
    """
    entries = list(scorers)
    functions = [SCORERS[entry.metric].make(entry) for entry in entries if entry.metric in SCORERS]
    own = [plugins.scorer(entry.metric) for entry in entries if entry.metric not in SCORERS]

    def score(reference: str, answer: str | None, prompt: plugins.Prompt = ()) -> dict[str, float]:
        scores = {name: score for function in functions for name, score in function(reference, answer or "").items()}
        scores = scores if answer is not None else dict.fromkeys(scores, 0.0)
        return scores | {name: score for plugin in own for name, score in plugin(prompt, reference, answer).items()}

    return score


def unfit(scorers: Iterable[Scorer], rows: Iterable[tuple[str, str]]) -> list[Problem]:
    """Expected answers that a scorer can't use: `rows` are (id, expected answer)."""
    faults = {entry.metric: SCORERS[entry.metric].fault for entry in scorers if entry.metric in SCORERS}
    return [
        Problem(
            f"holdout row {identity}: its expected answer is {fault}",
            key=f"evaluate.scorers.{metric}",
            allowed="a JSON object in every holdout row",
            remedy="correct the row, or score with exact_match or token_f1",
        )
        for identity, reference in rows
        for metric, fault_of in faults.items()
        if (fault := fault_of(reference))
    ]


def names_measured(scorers: Sequence[Scorer]) -> list[str]:
    """The metrics that these scorers are sure to give, sorted; a field is sure where `fields` names it.

    A user's own scorer is sure to give its name, as a number or as a mean.
    """
    names = {scorer.metric for scorer in scorers}
    corpus = {metric for name in names & SCORERS.keys() for metric in SCORERS[name].corpus_metrics}
    parts = {
        f"{scorer.metric}/{field}"
        for scorer in scorers
        if scorer.metric in SCORERS and SCORERS[scorer.metric].has_parts
        for field in scorer.fields
    }
    return sorted(names | corpus | parts)


def is_measured(metric: str, scorers: Sequence[Scorer]) -> bool:
    """Whether these scorers can give the metric.

    Without `fields` the holdout may hold any field. A user's own scorer may return any key: it isn't called before there is an
    answer.
    """
    open_ended = [
        scorer.metric
        for scorer in scorers
        if has_parts(scorer.metric) and not (scorer.metric in SCORERS and scorer.fields)
    ]
    return metric in names_measured(scorers) or metric.startswith(tuple(f"{name}/" for name in open_ended))


def metric_names(items: Sequence[Item]) -> list[str]:
    """The metrics that items have: their scores, and the metrics over all items that their scorers bring."""
    names = list(dict.fromkeys(name for item in items for name in item.scores))
    return [*names, *(metric for name in names if name in SCORERS for metric in SCORERS[name].corpus_metrics)]


def metrics(items: Sequence[Item], confidence: float) -> dict[str, Interval]:
    """Every metric with its interval; a field that only some expected answers have is averaged over those."""
    return {name: metric(items, name, confidence) for name in metric_names(items)} if items else {}


def metric(items: Sequence[Item], name: str, confidence: float, cluster_by: str | None = None) -> Interval:
    """One metric with its interval; see pipeline.intervals.scores for its formula, and for the effect of `cluster_by`."""
    if name == F1_MACRO:
        return f1_macro_interval(_labels(items), _answers(items), confidence, groups(items, cluster_by))
    with_score = [item for item in items if name in item.scores]
    scores = [item.scores[name] for item in with_score]
    return mean_interval(scores, confidence, groups(with_score, cluster_by))


def difference(
    ours: Sequence[Item], theirs: Sequence[Item], name: str, confidence: float, cluster_by: str | None = None
) -> Interval:
    """Ours minus theirs on the same items, in the same order, with a paired interval."""
    if name == F1_MACRO:
        clusters = groups(ours, cluster_by)
        return f1_macro_difference_interval(_labels(ours), _answers(ours), _answers(theirs), confidence, clusters)
    pairs = [(mine, its) for mine, its in zip(ours, theirs, strict=True) if name in mine.scores]
    our_scores, their_scores = [mine.scores[name] for mine, _ in pairs], [its.scores[name] for _, its in pairs]
    return difference_interval(our_scores, their_scores, confidence, groups([mine for mine, _ in pairs], cluster_by))


def groups(items: Sequence[Item], cluster_by: str | None) -> list[str] | None:
    """Each item's value in the column that groups them; None where items are independent."""
    return None if cluster_by is None else [item.columns[cluster_by] for item in items]


def _labels(items: Sequence[Item]) -> list[str]:
    return [label(item.expected) for item in items]


def _answers(items: Sequence[Item]) -> list[str]:
    return [label(item.answer) for item in items]
