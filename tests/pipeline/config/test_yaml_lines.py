"""YAML and JSON as values with the lines of their places."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.config import yaml_lines
from pipeline.errors import ConfigError


def written(folder: Path, text: str, name: str = "some.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_every_key_and_item_has_its_line(tmp_path):
    """Also inside lists of mappings, after comments and over folded text."""
    text = "# a comment\na:\n  - b: 1\n    c: >\n      folded\n      text\n  - 2\nd: x\n"
    value, lines = yaml_lines.read(written(tmp_path, text))
    assert value == {"a": [{"b": 1, "c": "folded text\n"}, 2], "d": "x"}
    places = {("a",): 2, ("a", 0): 3, ("a", 0, "b"): 3, ("a", 0, "c"): 4, ("a", 1): 7, ("d",): 8}
    assert {place: lines[place] for place in places} == places


def test_json_as_programs_write_it_is_read(tmp_path):
    """With tabs between the values, and pairs of surrogates for what is beyond the first plane."""
    value = [{"a": "\U0001f600 über \\u", "b": "tab\tin text"}]
    for indent in (None, "\t"):
        assert yaml_lines.read(written(tmp_path, json.dumps(value, indent=indent), "some.json"))[0] == value


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\na: 2\n", 2, "given twice, first on line 1"),
        ("x: 1\na: [1,\n", 3, "not YAML"),
        ("x: 1\nday: 2026-13-45\n", 2, "month must be in"),
        ("a:\n  b: 8\n\tc: 3\n  d: 4\n", 3, "a tab stands in the indentation$"),
        ("a: 8\n \tand so\n \ton\nb: c: 3\n", 2, "a tab stands in the indentation, and in that of 1 more lines"),
        ("a:\n\tb: 3\n", 2, "a tab stands in the indentation"),
        ("d:\n  -\tpath: x\n    type: y\n", 2, "a tab stands in the indentation"),
        ("b: {x: 1,\n\ty: 2}\nz: 3\nc: [1,\n", 5, "not YAML: (?!a tab)"),
    ],
)
def test_what_cannot_be_read_has_its_line(tmp_path, text, line, what):
    """Doubled keys, broken YAML, a date that no calendar has, and tabs, which YAML stumbles over further down."""
    with pytest.raises(ConfigError) as caught:
        yaml_lines.read(written(tmp_path, text))
    assert caught.value.problems[0].line == line
    assert re.search(what, caught.value.problems[0].what)


def test_a_tab_where_yaml_takes_one_is_none(tmp_path):
    """In a value that goes on, in brackets, in a block of text."""
    text = "a: one\n \ttwo\nb: {\n \tc: 3}\nd: |\n  x\n  \ty\n"
    assert yaml_lines.read(written(tmp_path, text))[0] == {"a": "one two", "b": {"c": 3}, "d": "x\n\ty\n"}
