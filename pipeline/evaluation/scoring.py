"""How an answer is scored against the expected one, and how items become metrics; names as in lm-eval.

Every score lies between 0 and 1. Item scores are pure functions of (expected, answer); `metrics` aggregates
them, with an interval each. An item whose request failed scores 0 everywhere. sklearn, scipy and rouge-score
load when first used, and so do scorers of a user's own (scoring_plugins).
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol

from pipeline.artifacts import Interval, Item
from pipeline.config.schema import Scorer
from pipeline.errors import ConfigError, Problem
from pipeline.evaluation import plugins as scoring_plugins
from pipeline.evaluation.plugins import BUILT_IN
from pipeline.intervals.macro_f1 import f1_macro_difference_interval, f1_macro_interval
from pipeline.intervals.scores import difference_interval, mean_interval

F1_MACRO = "f1_macro"
FIELDS = "json_field_match"
LABEL_WRAPPING = " .,;:!\"'`*"
_MISSING = object()


def exact_match(expected: str, answer: str) -> float:
    """1 where the answer is the expected text, white space at both ends aside."""
    return float(answer.strip() == expected.strip())


def label(text: str) -> str:
    """A label as `accuracy` compares it: case, runs of white space and what chat models wrap a label in."""
    return " ".join(text.casefold().split()).strip(LABEL_WRAPPING)


def accuracy(expected: str, answer: str) -> float:
    """1 where both name the same label, see `label`."""
    return float(label(answer) == label(expected))


def token_f1(expected: str, answer: str) -> float:
    """Word overlap as SQuAD's evaluation has it: case, punctuation and English articles folded away."""
    truth, guess = _squad_words(expected), _squad_words(answer)
    shared = sum((Counter(truth) & Counter(guess)).values())
    if not truth or not guess:
        return float(truth == guess)
    return 2 * shared / (len(truth) + len(guess))


def _squad_words(text: str) -> list[str]:
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def rouge_l(expected: str, answer: str) -> float:
    """ROUGE-L's F-measure by the rouge-score package, without stemming."""
    return float(_rouge_scorer().score(expected, answer)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def parse_json(text: str) -> Any:
    """JSON as a strict client reads it: alone, no NaN or Infinity, no key twice. Raises ValueError."""

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=no_key_twice, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_valid(answer: str, schema: Any | None) -> float:
    """1 where the answer is strict JSON and, with a validator of a JSON Schema, holds it."""
    try:
        value = parse_json(answer)
    except ValueError:
        return 0.0
    return float(schema is None or schema.is_valid(value))


def json_field_match(expected: str, answer: str, fields: Sequence[str]) -> dict[str, float]:
    """For each field 1 where both JSON objects have the same value in it or both lack it, and the mean.

    `fields` empty means the expected object's own. Keys that the answer has beyond them aren't punished here:
    a JSON Schema for json_valid does that. Lists are compared in order, numbers by value, and true isn't 1.
    """
    truth = parse_json(expected)
    names = list(fields) or list(truth)
    try:
        guess = parse_json(answer)
    except ValueError:
        guess = None
    found = guess if isinstance(guess, dict) else None
    each = {
        name: float(found is not None and same_json(truth.get(name, _MISSING), found.get(name, _MISSING)))
        for name in names
    }
    mean = sum(each.values()) / len(each) if each else float(found is not None)
    return {"json_field_match": mean, **{f"json_field_match/{name}": score for name, score in each.items()}}


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal, booleans apart from numbers."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return bool(one == other)


class Score(Protocol):
    """Scores an answer by all scorers of an evaluation."""

    def __call__(self, expected: str, answer: str | None, prompt: scoring_plugins.Prompt = ()) -> dict[str, float]:
        """Scores by metric; an answer of None, a failed request, scores 0. `prompt` is what a user's own scorer is shown."""


def item_scorer(scorers: Iterable[Scorer]) -> Score:
    """One function that scores an item by all scorers.

    Raises ConfigError when a JSON Schema isn't one; the function raises ScorerBroken where a user's own scorer fails.
    """
    chosen = list(scorers)
    functions = [_scorer(scorer) for scorer in chosen if scorer.metric in BUILT_IN]
    plugins = [scoring_plugins.scorer(scorer.metric) for scorer in chosen if scorer.metric not in BUILT_IN]

    def score(expected: str, answer: str | None, prompt: scoring_plugins.Prompt = ()) -> dict[str, float]:
        scores = {name: value for function in functions for name, value in function(expected, answer or "").items()}
        scores = scores if answer is not None else dict.fromkeys(scores, 0.0)
        return scores | {name: value for plugin in plugins for name, value in plugin(prompt, expected, answer).items()}

    return score


def _scorer(scorer: Scorer) -> Callable[[str, str], dict[str, float]]:
    if scorer.metric == FIELDS:
        return lambda expected, answer: json_field_match(expected, answer, scorer.fields)
    if scorer.metric == "json_valid":
        schema = _validator(scorer.json_schema) if scorer.json_schema is not None else None
        return lambda _, answer: {"json_valid": json_valid(answer, schema)}
    function = {"exact_match": exact_match, "accuracy": accuracy, "token_f1": token_f1, "rougeL": rouge_l}[
        scorer.metric
    ]
    return lambda expected, answer: {scorer.metric: function(expected, answer)}


def _validator(schema: dict[str, Any]) -> Any:
    from jsonschema import SchemaError, validators

    kind = validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(
            f"json_schema is not a JSON Schema: {error.message}",
            key="evaluate.scorers.json_schema",
            remedy="correct it",
        ) from None
    return kind(schema)


def unfit(scorers: Iterable[Scorer], rows: Iterable[tuple[str, str]]) -> list[Problem]:
    """What is wrong with expected answers for these scorers: `rows` are (id, expected)."""
    if not any(scorer.metric == FIELDS for scorer in scorers):
        return []
    problems = []
    for identity, expected in rows:
        try:
            wrong = None if isinstance(parse_json(expected), dict) else "no JSON object"
        except ValueError as error:
            wrong = f"no JSON: {error}"
        if wrong:
            problems.append(
                Problem(
                    f"holdout row {identity}: its expected answer is {wrong}",
                    key="evaluate.scorers.json_field_match",
                    allowed="a JSON object in every holdout row",
                    remedy="correct the row, or score with exact_match or token_f1",
                )
            )
    return problems


def names_measured(scorers: Sequence[Scorer]) -> list[str]:
    """The metrics that these scorers are sure to give, sorted; a field is sure where `fields` names it.

    A user's own scorer is sure to give its name, as a number or as a mean.
    """
    names = {scorer.metric for scorer in scorers} | {
        f"{scorer.metric}/{name}" for scorer in scorers for name in scorer.fields if scorer.metric == FIELDS
    }
    return sorted(names | ({F1_MACRO} if "accuracy" in names else set()))


def is_measured(metric: str, scorers: Sequence[Scorer]) -> bool:
    """Whether these scorers can give the metric: without `fields` any field may turn out to be in the holdout.

    Likewise may a user's own scorer return any key; it isn't asked before there is an answer.
    """
    open_ended = [
        scorer.metric
        for scorer in scorers
        if scorer.metric not in BUILT_IN or (scorer.metric == FIELDS and not scorer.fields)
    ]
    return metric in names_measured(scorers) or metric.startswith(tuple(f"{name}/" for name in open_ended))


def metric_names(items: Sequence[Item]) -> list[str]:
    """The metrics that items have: their scores, and f1_macro where accuracy is among them."""
    names = list(dict.fromkeys(name for item in items for name in item.scores))
    return [*names, F1_MACRO] if "accuracy" in names else names


def metrics(items: Sequence[Item], confidence: float) -> dict[str, Interval]:
    """Every metric with its interval; a field that only some expected answers have is averaged over those."""
    return {name: metric(items, name, confidence) for name in metric_names(items)} if items else {}


def metric(items: Sequence[Item], name: str, confidence: float, cluster_by: str | None = None) -> Interval:
    """One metric with its interval; see pipeline.intervals.scores for which kind, and for what `cluster_by` changes."""
    if name == F1_MACRO:
        return f1_macro_interval(_labels(items), _answers(items), confidence, groups(items, cluster_by))
    scored = [item for item in items if name in item.scores]
    return mean_interval([item.scores[name] for item in scored], confidence, groups(scored, cluster_by))


def difference(
    ours: Sequence[Item], theirs: Sequence[Item], name: str, confidence: float, cluster_by: str | None = None
) -> Interval:
    """Ours minus theirs on the same items, in the same order, with a paired interval."""
    if name == F1_MACRO:
        clusters = groups(ours, cluster_by)
        return f1_macro_difference_interval(_labels(ours), _answers(ours), _answers(theirs), confidence, clusters)
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=True) if name in one.scores]
    mine, other = [one.scores[name] for one, _ in pairs], [other.scores[name] for _, other in pairs]
    return difference_interval(mine, other, confidence, groups([one for one, _ in pairs], cluster_by))


def groups(items: Sequence[Item], cluster_by: str | None) -> list[str] | None:
    """Each item's value in the column that groups them; None where items are independent."""
    return None if cluster_by is None else [item.columns[cluster_by] for item in items]


def _labels(items: Sequence[Item]) -> list[str]:
    return [label(item.expected) for item in items]


def _answers(items: Sequence[Item]) -> list[str]:
    return [label(item.answer) for item in items]
