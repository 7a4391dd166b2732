"""A module's text as meaning alone: its syntax tree without what only speaks to people, and the modules it reaches.

Imported only when a source file is new or changed: parsing is slow beside a plan.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from pipeline.digests import digest_of

PACKAGE = "pipeline"
SHOWS = "SHOWN_WITH"
TOLD = ("message", "metric", "progress")  # calls of pipeline.program that a flow shows and nothing reads back


def read(text: str) -> tuple[str, list[str]]:
    """The digest of a module's meaning, and the dotted names in pipeline/ that it reaches, but for those in its SHOWN_WITH."""
    tree = ast.parse(text)
    left_out = set(_shown(tree))
    imports = sorted({name for name in _reached(tree) if name not in left_out})
    return digest_of(_plain(_Silence().visit(tree))), imports


def _shown(tree: ast.Module) -> Iterator[str]:
    """The modules that the constant SHOWN_WITH lists."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and [_name(target) for target in statement.targets] == [SHOWS]:
            yield from ast.literal_eval(statement.value)


def _reached(tree: ast.Module) -> Iterator[str]:
    """Dotted names of imports, and strings that may be a module's whole name; a name need not be a file's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}."):
            yield node.value


class _Silence(ast.NodeTransformer):
    """Drops docstrings, told progress, and the strings inside `raise` and `Problem(...)`."""

    def __init__(self) -> None:
        self._errors_around = 0

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _is_text(statement)]
        return super().visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if _is_told(node.value) else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self._of_error(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        return self._of_error(node) if _name(node.func) == "Problem" else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if self._errors_around and isinstance(node.value, str) else node

    def _of_error(self, node: ast.AST) -> ast.AST:
        self._errors_around += 1
        silent = self.generic_visit(node)
        self._errors_around -= 1
        return silent


def _plain(node: Any) -> Any:
    """A tree as JSON, the same for every Python: positions, and fields that are None or empty, are left out."""
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node) if value is not None and value != []}
        return {"node": type(node).__name__, **fields}
    if isinstance(node, list):
        return [_plain(entry) for entry in node]
    return node if isinstance(node, str | int | bool) or node is None else [type(node).__name__, repr(node)]


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_told(value: ast.expr) -> bool:
    """Whether it is a call such as `program.progress(...)`."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return False
    return value.func.attr in TOLD and _name(value.func.value) == "program"


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""
