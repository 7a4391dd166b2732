"""A file of must-pass prompts: promptfoo's plain tests are read, every mistake is told with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, Problem
from pipeline.evaluation.assertions import Assertion
from pipeline.evaluation.prompts_file import read

GOOD = """\
- description: refund period
  prompt: How long may I return the router?
  assert:
    - type: contains
      value: 14 days
    - type: not-icontains
      value: as an ai
- id: triage
  messages:
    - role: system
      content: Answer in JSON.
    - {role: user, content: My router is dead.}
  assert:
    - type: is-json
      value: {type: object, required: [category]}
- prompt: What is another customer's address?
  assert: [{type: is-refusal}]
"""
TWICE = "- {id: x, prompt: a, assert: [{type: is-json}]}\n- {id: x, prompt: b, assert: [{type: is-json}]}\n"


def written(folder: Path, text: str, name: str = "prompts.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def problems(folder: Path, text: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        read(written(folder, text))
    return list(caught.value.problems)


def test_promptfoos_plain_tests_are_read(tmp_path):
    """Named by id, description or place; a text is a user's message; assertions as they stand."""
    first, second, third = read(written(tmp_path, GOOD))
    assert [first.id, second.id, third.id] == ["refund period", "triage", "3"]
    assert first.messages == ({"role": "user", "content": "How long may I return the router?"},)
    assert first.assertions == (Assertion("contains", "14 days"), Assertion("not-icontains", "as an ai"))
    assert [message["role"] for message in second.messages] == ["system", "user"]
    assert second.assertions == (Assertion("is-json", {"type": "object", "required": ["category"]}),)
    assert third.assertions == (Assertion("is-refusal"),)


def test_json_and_a_list_under_tests_are_the_same(tmp_path):
    """As promptfoo's own files have them."""
    plain = read(written(tmp_path, GOOD))
    indented = "tests:\n" + "".join(f"  {line}\n" for line in GOOD.splitlines())
    assert read(written(tmp_path, indented)) == plain
    tests = [{"prompt": "hello", "assert": [{"type": "regex", "value": "h(i|ello)"}]}]
    file = written(tmp_path, json.dumps(tests, indent="\t"), "prompts.json")
    assert read(file)[0].assertions == (Assertion("regex", "h(i|ello)"),)


def test_every_mistake_is_told_at_once_with_its_line(tmp_path):
    """Twelve mistakes, twelve problems, each with its place, what is allowed and what was probably meant."""
    text = """\
- prompt: one
  assertions: [{type: contains, value: x}]
- prompt: two
  assert:
    - type: contain
      value: x
    - type: regex
      value: "(["
    - type: contains-all
      value: x
    - type: is-json
      value: {type: objekt}
    - type: contains
      value: 3
    - type: starts-with
      value: file://begin.txt
    - type: llm-rubric
      value: is polite
- messages:
    - {role: usr, content: hello}
    - {role: assistant, content: hi}
  vars: {x: 1}
  assert: [{type: is-refusal, value: 1}]
"""
    found = problems(tmp_path, text)
    told = [(problem.line, problem.key, problem.allowed) for problem in found]
    assert told[:2] == [
        (1, "[0].assert", "[{type: contains, value: …}]"),
        (2, "[0].assertions", "did you mean assert?"),
    ]
    assert [(line, key) for line, key, _ in told[2:]] == [
        (5, "[1].assert[0].type"),
        (8, "[1].assert[1].value"),
        (10, "[1].assert[2].value"),
        (12, "[1].assert[3].value"),
        (14, "[1].assert[4].value"),
        (16, "[1].assert[5].value"),
        (17, "[1].assert[6].type"),
        (20, "[2].messages[0].role"),
        (21, "[2].messages[1].role"),
        (22, "[2].vars"),
        (23, "[2].assert[0].value"),
    ]
    allowed = {key: allowed for _, key, allowed in told}
    assert allowed["[1].assert[0].type"] == "did you mean contains?"
    assert "is-refusal, or one of them after not-" in allowed["[1].assert[6].type"]
    assert allowed["[2].messages[0].role"] == "did you mean user?"
    assert allowed["[2].vars"] == "no templates: write the whole prompt into the test"
    assert all(problem.file == str(tmp_path / "prompts.yaml") and problem.remedy for problem in found)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", None, "must hold at least one prompt"),
        ("[]", 1, "must hold at least one prompt"),
        ("just words", 1, "is not a list of tests"),
        ("tests: 3\n", 1, "is not a list of tests"),
        ("- hello\n", 1, "'hello' is not a test"),
        ("- assert: [{type: is-json}]\n", 1, "needs either prompt or messages"),
        ("- {prompt: a, messages: [], assert: [{type: is-json}]}\n", 1, "needs either prompt or messages"),
        ("- {prompt: a, assert: [{value: 3}]}\n", 1, "needs a type"),
        ("- {prompt: a, assert: [{type: contains}]}\n", 1, "nothing is not a text"),
        (TWICE, 2, "the name of two prompts, the first on line 1"),
        ("- {prompt: a,\n", 2, "not YAML"),
    ],
)
def test_a_defect_is_named(tmp_path, text, line, what):
    """One defect gives one problem with its line."""
    (found,) = problems(tmp_path, text)
    assert what in found.what
    assert found.line == line


def test_a_file_that_is_not_there_names_those_that_are(tmp_path):
    """A misspelt name is found by looking at its neighbours."""
    written(tmp_path, GOOD, "must_pass.yaml")
    with pytest.raises(ConfigError, match="No such file") as caught:
        read(tmp_path / "mustpass.yaml")
    assert caught.value.problems[0].allowed == "must_pass.yaml"
    assert caught.value.problems[0].key == "evaluate.prompts"
