"""Rows of any format as conversations: messages, prompt_completion, text, alpaca, sharegpt, columns.

A conversation is a list of {"role", "content"}; rows of `text` stay text. Prompt and completion become a user
and an assistant message, because the tuned model is served as a chat. Columns that a format doesn't know are
ignored and named in the report, unless data.columns names them. `data/checks.py` checks whether a conversation makes sense.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.defects import Defect

Values = Mapping[str, Any]
Message = dict[str, str]
Body = list[Message] | str
Defects = list[Defect]

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant"}
# {column}, not a JSON object: a name must not begin with a space or contain quotes, colons, commas or braces.
PLACE = re.compile(r"\{([^{}\"':,\s][^{}\"':,]*)\}")


@dataclass(frozen=True)
class Format:
    """A row format: the columns it needs and how a row that has them becomes a conversation or a text.

    `convert` adds defects to its list; its return value counts only when it added none.
    """

    name: str
    needs: tuple[str, ...]
    knows: tuple[str, ...]
    convert: Callable[[Values, Defects], Body]


def detect(values: Values) -> Format | None:
    """The format that a row's columns belong to; `text` must be the only column, else it may be a question."""
    for row_format in FORMATS.values():
        if set(row_format.needs) <= set(values) and (row_format.name != "text" or len(values) == 1):
            return row_format
    return None


def named(kind: str, template: Mapping[str, str | None] | None) -> Format:
    """The format of that name; `columns` goes with its template."""
    if kind != "columns" or template is None:
        return FORMATS[kind]
    names = tuple(dict.fromkeys(name for text in template.values() if text for name in PLACE.findall(text)))
    return Format("columns", names, names, lambda values, defects: _columns(values, template, defects))


def not_this_format(values: Values, file_format: Format) -> Defect:
    """The defect of a row that lacks columns of its file's format."""
    missing = [name for name in file_format.needs if name not in values]
    row_format = detect(values)
    if row_format and row_format.name not in (file_format.name, "text"):
        return Defect("mixed_format", f"is in {row_format.name} format among rows in {file_format.name} format")
    return Defect("missing_field", "is missing", key=", ".join(missing), allowed=", ".join(file_format.needs))


def further(values: Values, names: Sequence[str], defects: Defects) -> dict[str, str]:
    """Columns that stay with a row, as text: strings as they are, numbers and booleans as JSON."""
    texts = {}
    for name in names:
        value = values.get(name)
        if name not in values:
            defects.append(Defect("missing_field", "is missing", key=name, allowed=f"data.columns: {', '.join(names)}"))
        elif value is None or isinstance(value, list | dict | bytes):
            defects.append(_not_text(name, value))
        elif isinstance(value, float) and not math.isfinite(value):
            defects.append(Defect("not_text", f"is {value}, not text", key=name))
        else:
            texts[name] = json.dumps(value) if isinstance(value, bool | int | float) else str(value)
    return texts


def _messages(values: Values, defects: Defects) -> Body:
    return _conversation(values["messages"], "messages", ("role", "content"), ROLES, defects)


def _sharegpt(values: Values, defects: Defects) -> Body:
    turns = _conversation(values["conversations"], "conversations", ("from", "value"), SHAREGPT_ROLES, defects)
    system = values.get("system")
    return [*_text_message("system", "system", system, defects), *turns] if system else turns


def _prompt_completion(values: Values, defects: Defects) -> Body:
    """TRL's prompt and completion, each a text or a list of messages."""
    turns: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(values[name], str):
            turns += _text_message(role, name, values[name], defects)
        else:
            turns += _conversation(values[name], name, ("role", "content"), ROLES, defects)
    return turns


def _alpaca(values: Values, defects: Defects) -> Body:
    """Instruction and input are joined by an empty line; an optional system comes first."""
    system, question = values.get("system"), values["instruction"]
    extra = values.get("input") or ""
    if extra and isinstance(question, str) and isinstance(extra, str):
        question = f"{question}\n\n{extra}"
    elif extra:
        defects.append(_not_text("input", extra))
    return [
        *(_text_message("system", "system", system, defects) if system else ()),
        *_text_message("user", "instruction", question, defects),
        *_text_message("assistant", "output", values["output"], defects),
    ]


def _text(values: Values, defects: Defects) -> Body:
    text = values["text"]
    if isinstance(text, str):
        return text
    defects.append(_not_text("text", text))
    return ""


def _columns(values: Values, template: Mapping[str, str | None], defects: Defects) -> Body:
    def fill(place: re.Match[str]) -> str:
        value = values[place[1]]
        if value is None or isinstance(value, list | dict | bytes):
            defects.append(_not_text(place[1], value))
        elif role == "assistant" and not str(value).strip():
            defects.append(Defect("empty_answer", "the answer's column is empty", key=place[1]))
        return str(value)

    turns = []
    for role in ROLES:
        text = template.get(role)
        if text:
            turns.append({"role": role, "content": PLACE.sub(fill, text)})
    return turns


def _conversation(
    turns: Any, column: str, names: tuple[str, str], roles: Mapping[str, str], defects: Defects
) -> list[Message]:
    """A list of turns whose role and content have these names."""
    if not isinstance(turns, list) or not turns:
        mistake = "is an empty list" if turns == [] else f"is {_kind(turns)}, not a list of messages"
        defects.append(Defect("not_text", mistake, key=column))
        return []
    return [
        message
        for place, turn in enumerate(turns)
        for message in _turn(turn, f"{column}[{place}]", names, roles, defects)
    ]


def _turn(turn: Any, key: str, names: tuple[str, str], roles: Mapping[str, str], defects: Defects) -> Sequence[Message]:
    role_name, content_name = names
    if not isinstance(turn, dict) or turn.get(role_name) is None:
        mistake = f"lacks a {role_name}" if isinstance(turn, dict) else f"is {_kind(turn)}, not a message"
        defects.append(Defect("missing_role", mistake, key=key, allowed=f"{role_name} and {content_name}"))
        return []
    role = turn[role_name]
    if role not in roles:
        defects.append(Defect("unknown_role", f"has the {role_name} {role!r}", key=key, allowed=", ".join(roles)))
        return []
    if content_name not in turn:
        defects.append(
            Defect("missing_role", f"lacks a {content_name}", key=key, allowed=f"{role_name} and {content_name}")
        )
        return []
    return _text_message(roles[role], f"{key}.{content_name}", turn[content_name], defects)


def _text_message(role: str, key: str, content: Any, defects: Defects) -> list[Message]:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    defects.append(_not_text(key, content))
    return []


def _not_text(key: str, value: Any) -> Defect:
    return Defect("not_text", f"is {_kind(value)}, not text", key=key)


def _kind(value: Any) -> str:
    """A value's type in JSON's words."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        str: "text",
    }
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


FORMATS = {
    row_format.name: row_format
    for row_format in (
        Format("messages", ("messages",), ("messages",), _messages),
        Format("sharegpt", ("conversations",), ("conversations", "system"), _sharegpt),
        Format("prompt_completion", ("prompt", "completion"), ("prompt", "completion"), _prompt_completion),
        Format("alpaca", ("instruction", "output"), ("instruction", "input", "output", "system"), _alpaca),
        Format("text", ("text",), ("text",), _text),
    )
}
