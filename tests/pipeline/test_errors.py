"""The error tree, as a reader and the wire between stage and flow see it."""

from __future__ import annotations

import json
import re

import pytest

from pipeline import errors
from pipeline.errors import ConfigError, DataError, Problem, StageFailed, TunegateError, from_json

KINDS = TunegateError.__subclasses__()


def test_the_docstrings_tree_is_the_code() -> None:
    """Every kind with its exit code, in order."""
    lines = re.findall(r"── (\w+) .*\(exit (\d)\)", errors.__doc__ or "")
    assert lines == [(kind.__name__, str(kind.exit_code)) for kind in KINDS]


def test_a_problem_reads_from_its_place_to_its_remedy() -> None:
    """File and line, key, what is wrong; then what would be right, and what to do."""
    problem = Problem("must be a number", "use.yaml", 3, "serve.max_num_seqs", "1 or more", "write a number")
    assert str(problem).splitlines() == [
        "use.yaml:3: serve.max_num_seqs: must be a number",
        "  allowed: 1 or more",
        "  remedy:  write a number",
    ]
    assert str(Problem("is gone", file="a.log")) == "a.log: is gone"


def test_an_error_holds_one_text_one_problem_or_many() -> None:
    """All are told at once, in order."""
    assert ConfigError("is wrong", key="name", remedy="correct it").problems == (
        Problem("is wrong", key="name", remedy="correct it"),
    )
    assert ConfigError(Problem("is wrong")).problems == (Problem("is wrong"),)
    many = DataError(Problem(f"row {number}") for number in (1, 2))
    assert str(many) == "row 1\nrow 2"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_the_same_behind_the_wire(kind: type[TunegateError]) -> None:
    """A stage program writes JSON, the flow raises the same kind with the same problems."""
    error = kind([Problem("is wrong", "f", 1, "k", "a", "r"), Problem("too")])
    copy = from_json(json.loads(json.dumps(error.to_json())))
    assert (type(copy), copy.problems, copy.exit_code) == (kind, error.problems, kind.exit_code)


def test_an_error_of_an_unknown_kind_is_a_failed_stage() -> None:
    """As of a stage of another version."""
    error = from_json({"type": "FromTheFuture", "problems": [{"what": "is wrong"}]})
    assert (type(error), str(error)) == (StageFailed, "is wrong")
