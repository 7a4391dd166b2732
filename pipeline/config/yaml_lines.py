"""A YAML or JSON file as plain values, with the line of every key and item: what an error needs to point at its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]
TABBED = re.compile(r"[ -]*\t")
SURROGATES = re.compile(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}", re.IGNORECASE)


def read(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """The file's value (None when it is empty), and the 1-based line of every key and item in it, () being the whole.

    Raises OSError as the file system has it, and ConfigError with what is not UTF-8, not YAML, or given twice.
    """
    text = _text(path)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    try:
        node = loader.get_single_node()
        value = None if node is None else _construct(loader, node, (), lines, problems, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise ConfigError(_tab(text, line, path) or Problem(
            f"not YAML: {error.problem or error.context}", str(path), line, None,
            "spaces for indentation, `key: value` with a space after the colon", f"tunegate check {path}",
        )) from None  # fmt: skip
    finally:
        loader.dispose()
    if problems:
        raise ConfigError(problems)
    return value, lines


def _tab(text: str, at: int | None, path: Path) -> Problem | None:
    """Tabs in the indentation of the line that YAML stumbled over, or of those just before; elsewhere they may be right."""
    lines = [number for number, line in enumerate(text.splitlines(), 1) if TABBED.match(line)]
    first = next((near for near in (at, (at or 0) - 1) if near in lines), None)
    if first is None:
        return None
    while first - 1 in lines:
        first -= 1
    more = f", and in that of {len(lines) - 1} more lines" if len(lines) > 1 else ""
    return Problem(
        f"not YAML: a tab stands in the indentation{more}", str(path), first, None,
        "spaces", f"put spaces there, then: tunegate check {path}",
    )  # fmt: skip


def _text(path: Path) -> str:
    """The file's text; JSON as YAML reads it, which knows neither tabs between values nor pairs of surrogates."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"not UTF-8 (byte 0x{error.object[error.start]:02x})",
            file=str(path),
            line=line,
            remedy="save the file as UTF-8",
        ) from None
    if path.suffix == ".json":
        text = SURROGATES.sub(lambda pair: str(json.loads(f'"{pair[0]}"')), text.replace("\t", " "))
    return text


def _construct(
    loader: Any, node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], problems: list[Problem], path: Path
) -> Any:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in result:
                first = lines[(*at, key)]
                problems.append(
                    Problem(f"given twice, first on line {first}", str(path), line, key, "one value", "delete one")
                )
                continue
            lines[(*at, key)] = line
            result[key] = _construct(loader, value_node, (*at, key), lines, problems, path)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*at, n), lines, problems, path) for n, item in enumerate(node.value)]
    try:
        return loader.construct_object(node, deep=True)
    except ValueError as error:  # a date that no calendar has
        where = str(at[-1]) if at else None
        problems.append(
            Problem(str(error), str(path), node.start_mark.line + 1, where, "the same in quotes", "quote it")
        )
        return None
