"""Scorers that come with tunegate, one table of them: how an answer is scored against the expected one. Names as in lm-eval.

Every score lies between 0 and 1. A score is a pure function of (expected, answer). rouge-score and jsonschema load when first used;
pydantic doesn't, because `tunegate check` imports this module. Scorers of a user's own are found by entry point, see `plugins`.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config.schema import Scorer

LABEL_WRAPPING = " .,;:!\"'`*"
_MISSING = object()

Scores = dict[str, float]
ScoreAnswer = Callable[[str, str], Scores]


@dataclass(frozen=True)
class BuiltIn:
    """A scorer.

    - `make`: from the config's entry to a function of (expected, answer) that gives scores by metric.
    - `corpus_metrics`: metrics over all items that it brings beside the mean of its scores.
    - `has_parts`: it also gives scores NAME/PART, with the mean of the parts under its name.
    - `fault`: why an expected answer can't be scored against; None where it can.
    """

    make: Callable[[Scorer], ScoreAnswer]
    corpus_metrics: tuple[str, ...] = ()
    has_parts: bool = False
    fault: Callable[[str], str | None] = lambda _reference: None


def exact_match(reference: str, answer: str) -> float:
    """1 where the answer is the expected text, white space at both ends aside."""
    return float(answer.strip() == reference.strip())


def label(text: str) -> str:
    """A label as `accuracy` compares it: case, runs of white space and what chat models wrap a label in."""
    return " ".join(text.casefold().split()).strip(LABEL_WRAPPING)


def accuracy(reference: str, answer: str) -> float:
    """1 where both name the same label, see `label`."""
    return float(label(answer) == label(reference))


def token_f1(reference: str, answer: str) -> float:
    """Word overlap as SQuAD's evaluation has it: case, punctuation and English articles folded away."""
    truth, guess = _squad_words(reference), _squad_words(answer)
    overlap = sum((Counter(truth) & Counter(guess)).values())
    if not truth or not guess:
        return float(truth == guess)
    return 2 * overlap / (len(truth) + len(guess))


def _squad_words(text: str) -> list[str]:
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L's F-measure by the rouge-score package, without stemming."""
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def parse_json(text: str) -> Any:
    """JSON as a strict client reads it: alone, no NaN or Infinity, no key twice. Raises ValueError."""

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        by_key = dict(pairs)
        if len(by_key) < len(pairs):
            raise ValueError("a key occurs twice")
        return by_key

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=no_key_twice, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_valid(answer: str, schema: Any | None) -> float:
    """1 where the answer is strict JSON and, with a validator of a JSON Schema, holds it."""
    try:
        document = parse_json(answer)
    except ValueError:
        return 0.0
    return float(schema is None or schema.is_valid(document))


def json_field_match(reference: str, answer: str, fields: Sequence[str]) -> dict[str, float]:
    """For each field 1 where both JSON objects have the same value in it or both lack it, and the mean.

    `fields` empty: the expected object's own. Further keys of the answer cost nothing here: a JSON Schema for json_valid checks
    them. Lists are compared in order, numbers by value, and true isn't 1.
    """
    truth = parse_json(reference)
    names = list(fields) or list(truth)
    try:
        guess = parse_json(answer)
    except ValueError:
        guess = None
    fields_of = guess if isinstance(guess, dict) else None
    matches = {
        name: float(fields_of is not None and same_json(truth.get(name, _MISSING), fields_of.get(name, _MISSING)))
        for name in names
    }
    mean = sum(matches.values()) / len(matches) if matches else float(fields_of is not None)
    return {"json_field_match": mean, **{f"json_field_match/{name}": score for name, score in matches.items()}}


def same_json(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal, booleans apart from numbers."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return bool(left == right)


def _validator(schema: dict[str, Any]) -> Any:
    from jsonschema import SchemaError, validators

    kind = validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(
            f"json_schema is not a JSON Schema: {error.message}",
            key="evaluate.scorers.json_schema",
            remedy="correct the schema at the place that the message names",
        ) from None
    return kind(schema)


def _plain(name: str, score: Callable[[str, str], float]) -> Callable[[Scorer], ScoreAnswer]:
    """The `make` of a scorer without options."""
    return lambda _scorer: lambda reference, answer: {name: score(reference, answer)}


def _make_json_valid(scorer: Scorer) -> ScoreAnswer:
    schema = _validator(scorer.json_schema) if scorer.json_schema is not None else None
    return lambda _reference, answer: {"json_valid": json_valid(answer, schema)}


def _make_json_field_match(scorer: Scorer) -> ScoreAnswer:
    return lambda reference, answer: json_field_match(reference, answer, scorer.fields)


def _no_json_object(reference: str) -> str | None:
    try:
        return None if isinstance(parse_json(reference), dict) else "not a JSON object"
    except ValueError as error:
        return f"not JSON: {error}"


F1_MACRO = "f1_macro"
SCORERS = {
    "exact_match": BuiltIn(_plain("exact_match", exact_match)),
    "accuracy": BuiltIn(_plain("accuracy", accuracy), corpus_metrics=(F1_MACRO,)),
    "json_valid": BuiltIn(_make_json_valid),
    "json_field_match": BuiltIn(_make_json_field_match, has_parts=True, fault=_no_json_object),
    "token_f1": BuiltIn(_plain("token_f1", token_f1)),
    "rougeL": BuiltIn(_plain("rougeL", rouge_l)),
}


def has_parts(name: str) -> bool:
    """Whether a scorer may give scores NAME/PART: of a user's own, none is known before there is an answer."""
    return name not in SCORERS or SCORERS[name].has_parts


def scored_by(metric: str) -> str:
    """The score of single items that a metric rests on: accuracy for macro-F1, else its own."""
    return next((name for name, scorer in SCORERS.items() if metric in scorer.corpus_metrics), metric)
