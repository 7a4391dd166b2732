"""Each type of assertion holds and breaks as promptfoo's does, and says why it broke."""

from __future__ import annotations

import signal

import pytest

from pipeline.evaluation import assertions
from pipeline.evaluation.assertions import KINDS, Assertion, broken, is_refusal

SCHEMA = {"type": "object", "required": ["city"], "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}}
# type, value, an answer that holds it, one that breaks it
CASES = [
    ("equals", "Yes.", "Yes.", "Yes"),
    ("equals", {"a": [1, 2]}, '{"a": [1, 2.0]}', '{"a": [2, 1]}'),
    ("equals", {"a": True}, '{"a": true}', '{"a": 1}'),
    ("equals", ["a"], '["a"]', "a"),
    ("contains", "14 days", "within 14 days.", "within 14 DAYS."),
    ("icontains", "straße", "In der STRASSE", "in der Gasse"),
    ("contains-all", ["a", "b"], "b a", "a A"),
    ("contains-any", ["x", "y"], "so y", "so Y"),
    ("icontains-all", ["A", "b"], "B a", "a"),
    ("icontains-any", ["X", "q"], "x", "z"),
    ("starts-with", "Dear", "Dear John", "dear John"),
    ("regex", r"\b\d{4}\b", "order 1234 is here", "order 12345"),
    ("is-json", None, '{"a": 1}', "```json\n{}\n```"),
    ("is-json", SCHEMA, '{"city": "Bonn", "zip": "53111"}', '{"city": "Bonn", "zip": "5311"}'),
    (
        "is-refusal",
        None,
        "I'm sorry, but I can't help with that.",
        "I'm sorry to hear that. Open Settings and tap Reset.",
    ),
]


@pytest.mark.parametrize(("name", "value", "held", "missed"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_a_type_holds_breaks_and_negates(name, value, held, missed):
    """What holds a type breaks its not- and the other way round; what is said begins with the assertion as written."""
    assertion, negated = Assertion(name, value), Assertion(f"not-{name}", value)
    assert broken(assertion, held) is None
    assert str(broken(assertion, missed)).startswith(str(assertion))
    assert broken(negated, missed) is None
    assert broken(negated, held) == str(negated)


def test_each_type_has_a_case():
    """A new type of assertion is not left untested."""
    assert {case[0] for case in CASES} == set(KINDS)


def test_what_is_said_names_the_fault():
    """Which words are lacking, and where in the JSON the schema is broken."""
    assert broken(Assertion("contains-all", ["a", "b", "c"]), "b") == 'contains-all ["a", "b", "c"]: lacks ["a", "c"]'
    said = broken(Assertion("is-json", SCHEMA), '{"city": "Bonn", "zip": "x"}')
    assert said is not None
    assert said.endswith("$.zip: 'x' does not match '^[0-9]{5}$'")


@pytest.mark.parametrize("assertion", [Assertion("regex", "(a+)+$"), Assertion("is-json", {"pattern": "(a+)+$"})])
def test_a_pattern_without_end_breaks_and_does_not_hang(assertion, monkeypatch):
    """Also inside a JSON Schema; and the clock that stopped it is off again."""
    monkeypatch.setattr(assertions, "CPU_LIMIT_S", 0.2)
    answer = f'"{"a" * 40}b"'
    assert "processor time" in str(broken(assertion, answer))
    assert "processor time" in str(broken(Assertion(f"not-{assertion.type}", assertion.value), answer))
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_schema_fetches_nothing():
    """A reference to elsewhere breaks the assertion and names the address, instead of going there."""
    said = broken(Assertion("is-json", {"$ref": "http://127.0.0.1:9/schema.json"}), "{}")
    assert "http://127.0.0.1:9/schema.json" in str(said)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I can\u2019t assist with that request.",
        "Unfortunately I am not able to share other customers' data.",
        "As an AI language model, I do not have opinions.",
        "That is not something I can do.",
        "I must decline.",
        "We will not provide that.",
        "Sorry, it is against our policy to talk about this.",
    ],
)
def test_what_refuses_in_common_words_is_a_refusal(answer):
    """The phrases that chat models refuse with."""
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot find order A-1 in your account; please check its number.",
        "Sorry for the wait! Your refund is on its way.",
        "You can't share a voucher with others.",
        '{"category": "billing"}',
        "x " * 300 + "I can't help with that.",
    ],
)
def test_what_helps_is_no_refusal(answer):
    """A regret, another's inability, JSON, and a refusal that stands late in a long answer."""
    assert not is_refusal(answer)
