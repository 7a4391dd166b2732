"""Conditions on the answer to a must-pass prompt: promptfoo's deterministic assertions by its names; not- negates each.

Regular expressions are Python's `re` and may match anywhere in the answer, as promptfoo's (which are JavaScript's) do. One
that backtracks without end, also as a JSON Schema's pattern, can't hang a build: an assertion that takes more than
CPU_LIMIT_S of processor time on an answer counts as broken.

is-refusal knows phrases, not meaning: the first person saying in English, at the beginning of an answer, that it can't or
won't help, provide, share and the like; an empty answer counts too. It misses a refusal in other words or languages, or one
that only changes the subject, and takes "I can't tell you how glad I am" for one. Where that matters ask for words of your
own with contains or regex.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.evaluation.scorers import parse_json, same_json

CPU_LIMIT_S = 1.0
SHOWN = 120  # characters of a value in a report
NEGATION = "not-"
REFUSAL_WITHIN = 400  # characters from the beginning
CONTRACTIONS = {
    "\u2019": "'",
    "can't": "cannot",
    "can not": "cannot",
    "won't": "will not",
    "i'm": "i am",
    "we're": "we are",
}
REFUSAL = re.compile(
    r"\b(?:i|we) (?:(?:really|simply|just|must|have to) )?"
    r"(?:cannot|will not|(?:am|are) (?:unable|not able|not allowed|not permitted|not willing) to|decline to|refuse to)"
    r"(?: \w+)? (?:answer|assist|comply|continue|create|discuss|disclose|do|engage|fulfill?|generate|give|help|participate|"
    r"provide|recommend|reveal|share|show|support|tell|write)\b"
    r"|\b(?:i|we) (?:must|have to) (?:decline|refuse)\b"
    r"|\bnot (?:something|able to help|willing to help)\b.{0,20}\b(?:i|we|with)\b"
    r"|\bagainst (?:my|our) (?:guidelines|policy|policies|principles)\b"
    r"|\bas an ai(?: language)?(?: model| assistant)?, i (?:cannot|do not|will not|am not)\b"
)


@dataclass(frozen=True)
class Assertion:
    """One condition on an answer: the type as the file has it, such as not-contains, and its value."""

    type: str
    value: Any = None

    def __str__(self) -> str:
        if self.value is None:
            return self.type
        value = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
        return f"{self.type} {value if len(value) <= SHOWN else value[: SHOWN - 1] + '…'}"


@dataclass(frozen=True)
class Kind:
    """A type of assertion.

    - `allowed`: the values that it takes, in words.
    - `fault`: why it doesn't take a value; None where it does.
    - `misses`: from value and answer, why the assertion doesn't hold, which may be ""; None where it holds.
    """

    allowed: str
    fault: Callable[[Any], str | None]
    misses: Callable[[Any, str], str | None]


def broken(assertion: Assertion, answer: str) -> str | None:
    """The assertion, with why it doesn't hold for this answer; None where it holds."""
    is_negated = assertion.type.startswith(NEGATION)
    kind = KINDS[assertion.type.removeprefix(NEGATION)]
    try:
        with _cpu_limit(CPU_LIMIT_S):
            fault = kind.misses(assertion.value, answer)
    except TimeoutError:
        return f"{assertion}: took more than {CPU_LIMIT_S:g} s of processor time on this answer"
    if is_negated:
        return str(assertion) if fault is None else None
    return None if fault is None else f"{assertion}: {fault}" if fault else str(assertion)


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so much processor time, inside `re` too; in the main thread only.

    Not by the clock: a busy machine breaks no prompt.
    """

    def stop(_signal: int, _frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def is_refusal(answer: str) -> bool:
    """Whether an answer refuses, by its phrases; see the module docstring for what that misses."""
    text = " ".join(answer.casefold().split())[:REFUSAL_WITHIN]
    for short, long in CONTRACTIONS.items():
        text = text.replace(short, long)
    return not text or REFUSAL.search(text) is not None


def _equals(value: Any, answer: str) -> str | None:
    if isinstance(value, str):
        return None if answer == value else ""
    try:
        return None if same_json(value, parse_json(answer)) else ""
    except ValueError as error:
        return f"not JSON: {error}"


def _contains_all(values: list[str], answer: str, *, fold: bool) -> str | None:
    text = answer.casefold() if fold else answer
    lacking = [value for value in values if (value.casefold() if fold else value) not in text]
    return f"lacks {json.dumps(lacking, ensure_ascii=False)}" if lacking else None


def _contains_any(values: list[str], answer: str, *, fold: bool) -> str | None:
    text = answer.casefold() if fold else answer
    return None if any((value.casefold() if fold else value) in text for value in values) else ""


def _contains(value: str, answer: str, *, fold: bool) -> str | None:
    return _contains_any([value], answer, fold=fold)


def _is_json(schema: Any, answer: str) -> str | None:
    try:
        value = parse_json(answer)
    except ValueError as error:
        return f"not JSON: {error}"
    if schema is None:
        return None
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        worst = best_match(_validator(schema).iter_errors(value))
    except Unresolvable as unresolvable:
        return f"the schema refers to {unresolvable.ref}, which it doesn't have"
    return f"{worst.json_path}: {worst.message}" if worst else None


def _validator(schema: Any) -> Any:
    """A validator that fetches nothing from elsewhere. Raises jsonschema's SchemaError."""
    from jsonschema import validators
    from referencing.jsonschema import EMPTY_REGISTRY

    kind: Any = validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema, registry=EMPTY_REGISTRY)


def _text_fault(value: Any) -> str | None:
    return None if isinstance(value, str) and value else f"{_repr(value)} is not a text"


def _texts_fault(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return f"{_repr(value)} is not a list of texts"
    return next((fault for part in value if (fault := _text_fault(part))), None)


def _text_or_json_fault(value: Any) -> str | None:
    return None if isinstance(value, dict | list) else _text_fault(value)


def _pattern_fault(value: Any) -> str | None:
    if fault := _text_fault(value):
        return fault
    try:
        re.compile(value)
    except re.error as error:
        return f"{value} is not a regular expression: {error}"
    return None


def _schema_fault(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        return f"{_repr(value)} is not a JSON Schema"
    from jsonschema import SchemaError

    try:
        _validator(value)
    except SchemaError as error:
        return f"is not a JSON Schema: {error.json_path}: {error.message}"
    return None


def _no_value_fault(value: Any) -> str | None:
    return None if value is None else f"{_repr(value)}: it takes no value"


def _repr(value: Any) -> str:
    return "nothing" if value is None else repr(value)


TEXT, TEXTS = (
    "a text; quote what YAML would take for a number, a date or true",
    "a list of texts, such as [refund, 14 days]",
)
KINDS = {
    "equals": Kind("a text, or a JSON object or list", _text_or_json_fault, _equals),
    "contains": Kind(TEXT, _text_fault, partial(_contains, fold=False)),
    "icontains": Kind(TEXT, _text_fault, partial(_contains, fold=True)),
    "contains-all": Kind(TEXTS, _texts_fault, partial(_contains_all, fold=False)),
    "contains-any": Kind(TEXTS, _texts_fault, partial(_contains_any, fold=False)),
    "icontains-all": Kind(TEXTS, _texts_fault, partial(_contains_all, fold=True)),
    "icontains-any": Kind(TEXTS, _texts_fault, partial(_contains_any, fold=True)),
    "starts-with": Kind(TEXT, _text_fault, lambda value, answer: None if answer.startswith(value) else ""),
    "regex": Kind("a regular expression of Python's re", _pattern_fault,
                  lambda value, answer: None if re.search(value, answer) else ""),
    "is-json": Kind("nothing, or a JSON Schema", _schema_fault, _is_json),
    "is-refusal": Kind("nothing", _no_value_fault, lambda _, answer: None if is_refusal(answer) else ""),
}  # fmt: skip
