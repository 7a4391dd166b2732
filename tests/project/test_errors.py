"""Every error that the source makes tells the way out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import errors

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for name in ("flows", "pipeline") for path in (ROOT / name).rglob("*.py"))
KINDS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.TunegateError)
}
REMEDY_AT = 4  # Problem's fields: what, file, line, key, allowed, remedy


def without_remedy(text: str) -> Iterator[int]:
    """Lines that make a Problem, or an error of one text, with no remedy."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        is_text = isinstance(node.args[0], ast.JoinedStr | ast.Constant | ast.BinOp | ast.IfExp)
        if name != "Problem" and not (name in KINDS and is_text):
            continue
        remedies = [keyword.value for keyword in node.keywords if keyword.arg in ("remedy", None)] + node.args[
            REMEDY_AT + 1 :
        ]
        if not remedies or any(isinstance(remedy, ast.Constant) and not remedy.value for remedy in remedies):
            yield node.lineno


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_error_has_a_remedy(file: Path) -> None:
    """The thing, "must" or "is not", and what to do: the last is what a reader at two in the morning needs."""
    lines = list(without_remedy(file.read_text(encoding="utf-8")))
    assert not lines, f"{file.relative_to(ROOT)}: no remedy in lines {lines}"


def test_the_walk_sees_what_lacks_a_remedy() -> None:
    """A Problem by name or through an error, with keywords and without."""
    text = "Problem('x', key='k')\nraise ConfigError(f'{x}')\nProblem('x', remedy='y')\nConfigError(problems)\nProblem('x', remedy='')\n"
    assert list(without_remedy(text)) == [1, 2, 5]
