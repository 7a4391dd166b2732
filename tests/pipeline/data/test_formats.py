from __future__ import annotations

import json

import pytest

from pipeline.data import formats

ASKED = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
BRIEFED = [{"role": "system", "content": "Be brief."}, *ASKED]


def converted(values: dict, kind: str | None = None, template: dict | None = None):
    chosen = formats.named(kind, template) if kind else formats.detect(values)
    assert chosen is not None
    found: list = []
    body = chosen.convert(values, found)
    return [defect.kind for defect in found] or body


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": BRIEFED, "source": "x"}, BRIEFED),
        ({"messages": [{**message, "name": None} for message in ASKED]}, ASKED),
        ({"prompt": "Where?", "completion": "Here."}, ASKED),
        ({"prompt": BRIEFED[:2], "completion": BRIEFED[2:]}, BRIEFED),
        ({"instruction": "Where?", "input": "", "output": "Here."}, ASKED),
        ({"instruction": "Where?", "input": None, "output": "Here.", "system": "Be brief."}, BRIEFED),
        ({"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]}, ASKED),
        ({"conversations": [{"from": "user", "value": "Where?"}, {"from": "assistant", "value": "Here."}],
          "system": "Be brief."}, BRIEFED),
        ({"text": "Where? Here."}, "Where? Here."),
    ],
)  # fmt: skip
def test_every_format_is_detected_and_becomes_the_same_conversation(values: dict, expected: object) -> None:
    """A row's format follows from its columns, and its conversation doesn't depend on the format."""
    assert converted(values) == expected


def test_an_input_follows_its_instruction() -> None:
    """Alpaca's input is put below the instruction, an empty line between."""
    row = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    assert converted(row)[0]["content"] == "Translate.\n\nHaus"


def test_a_text_beside_other_columns_is_not_guessed_to_be_the_training_text() -> None:
    """A text and a label may be a question and its answer: the type has to be named."""
    assert formats.detect({"text": "Where?", "label": 3}) is None
    assert converted({"text": "Where?", "label": 3}, "text") == "Where?"


def test_a_template_fills_columns_and_leaves_json_alone() -> None:
    """{column} is a place only where it names one; quotes and braces of JSON need no escaping."""
    template = {"system": None, "user": "{customer text}?", "assistant": '{"category":"{category}","n":{n}}'}
    chosen = formats.named("columns", template)
    assert chosen.needs == ("customer text", "category", "n")
    turns = converted({"customer text": "Where", "category": "card", "n": 3}, "columns", template)
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert json.loads(turns[1]["content"]) == {"category": "card", "n": 3}


def test_an_empty_answer_column_is_a_defect_even_inside_a_template() -> None:
    """An answer's template never hides that its column is empty; null and lists are no text."""
    template = {"system": None, "user": "{q}", "assistant": "Label: {a}"}
    assert converted({"q": "Where?", "a": " "}, "columns", template) == ["empty_answer"]
    assert converted({"q": None, "a": "x"}, "columns", template) == ["not_text"]
    assert converted({"q": "Where?", "a": ["x"]}, "columns", template) == ["not_text"]


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({"messages": "Where?"}, ["not_text"]),
        ({"messages": []}, ["not_text"]),
        ({"messages": ["Where?", {"role": "assistant"}]}, ["missing_role", "missing_role"]),
        ({"messages": [{"role": "tool", "content": ""}, {"role": "user", "content": 3}]},
         ["unknown_role", "not_text"]),
        ({"conversations": [{"from": "bot", "value": "x"}]}, ["unknown_role"]),
        ({"prompt": 3, "completion": None}, ["not_text", "not_text"]),
        ({"instruction": "x", "input": 3, "output": "y"}, ["not_text"]),
        ({"text": None}, ["not_text"]),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(values: dict, kinds: list[str]) -> None:
    """Every wrong part of a row is named, not only the first."""
    assert converted(values) == kinds


def test_a_row_of_another_format_is_told_from_a_row_that_lacks_a_column() -> None:
    """The defect names the other format, or else the missing column."""
    wanted = formats.FORMATS["messages"]
    assert formats.not_this_format({"prompt": "a", "completion": "b"}, wanted).kind == "mixed_format"
    lacking = formats.not_this_format({"message": []}, wanted)
    assert (lacking.kind, lacking.key) == ("missing_field", "messages")
