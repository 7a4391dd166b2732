"""Rows of any format as conversations: messages, prompt_completion, text, alpaca, sharegpt, columns.

A conversation is a list of {"role", "content"}; rows of `text` stay text. Prompt and completion become a user
and an assistant message, because the tuned model is served as a chat. Columns that a format doesn't know are
ignored and named in the report, unless data.columns names them. Whether a conversation makes sense is `data/checks.py`'s question.
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
Findings = list[Defect]

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant"}
# {column}, but no JSON object: a name holds no quotes, colons, commas or braces and begins with no space.
PLACE = re.compile(r"\{([^{}\"':,\s][^{}\"':,]*)\}")


@dataclass(frozen=True)
class Format:
    """A row format: the columns it needs and how a row that has them becomes a conversation or a text.

    `convert` adds what is wrong to its list, and its return value counts only when nothing was added.
    """

    name: str
    needs: tuple[str, ...]
    knows: tuple[str, ...]
    convert: Callable[[Values, Findings], Body]


def detect(values: Values) -> Format | None:
    """The format that a row's columns tell; `text` only where it is alone, else it may be a question."""
    for known in FORMATS.values():
        if set(known.needs) <= set(values) and (known.name != "text" or len(values) == 1):
            return known
    return None


def named(kind: str, template: Mapping[str, str | None] | None) -> Format:
    """The format of that name; `columns` goes with its template."""
    if kind != "columns" or template is None:
        return FORMATS[kind]
    used = tuple(dict.fromkeys(name for text in template.values() if text for name in PLACE.findall(text)))
    return Format("columns", used, used, lambda values, found: _columns(values, template, found))


def not_this_format(values: Values, wanted: Format) -> Defect:
    """Why a row that lacks some of the wanted columns is defective."""
    missing = [name for name in wanted.needs if name not in values]
    other = detect(values)
    if other and other.name not in (wanted.name, "text"):
        return Defect("mixed_format", f"is in {other.name} format among rows in {wanted.name} format")
    return Defect("missing_field", "is missing", key=", ".join(missing), allowed=", ".join(wanted.needs))


def further(values: Values, names: Sequence[str], found: Findings) -> dict[str, str]:
    """Columns that go along with a row, as text: strings as they are, numbers and truth values as JSON."""
    kept = {}
    for name in names:
        value = values.get(name)
        if name not in values:
            found.append(Defect("missing_field", "is missing", key=name, allowed=f"data.columns: {', '.join(names)}"))
        elif value is None or isinstance(value, list | dict | bytes):
            found.append(_not_text(name, value))
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(Defect("not_text", f"is {value}, not text", key=name))
        else:
            kept[name] = json.dumps(value) if isinstance(value, bool | int | float) else str(value)
    return kept


def _messages(values: Values, found: Findings) -> Body:
    return _conversation(values["messages"], "messages", ("role", "content"), ROLES, found)


def _sharegpt(values: Values, found: Findings) -> Body:
    turns = _conversation(values["conversations"], "conversations", ("from", "value"), SHAREGPT_ROLES, found)
    system = values.get("system")
    return [*_text_message("system", "system", system, found), *turns] if system else turns


def _prompt_completion(values: Values, found: Findings) -> Body:
    """TRL's prompt and completion, each a text or a list of messages."""
    turns: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(values[name], str):
            turns += _text_message(role, name, values[name], found)
        else:
            turns += _conversation(values[name], name, ("role", "content"), ROLES, found)
    return turns


def _alpaca(values: Values, found: Findings) -> Body:
    """Instruction and input are joined by an empty line; an optional system comes first."""
    system, question = values.get("system"), values["instruction"]
    extra = values.get("input") or ""
    if extra and isinstance(question, str) and isinstance(extra, str):
        question = f"{question}\n\n{extra}"
    elif extra:
        found.append(_not_text("input", extra))
    return [
        *(_text_message("system", "system", system, found) if system else ()),
        *_text_message("user", "instruction", question, found),
        *_text_message("assistant", "output", values["output"], found),
    ]


def _text(values: Values, found: Findings) -> Body:
    text = values["text"]
    if isinstance(text, str):
        return text
    found.append(_not_text("text", text))
    return ""


def _columns(values: Values, template: Mapping[str, str | None], found: Findings) -> Body:
    def fill(place: re.Match[str]) -> str:
        value = values[place[1]]
        if value is None or isinstance(value, list | dict | bytes):
            found.append(_not_text(place[1], value))
        elif role == "assistant" and not str(value).strip():
            found.append(Defect("empty_answer", "the answer's column is empty", key=place[1]))
        return str(value)

    turns = []
    for role in ROLES:
        text = template.get(role)
        if text:
            turns.append({"role": role, "content": PLACE.sub(fill, text)})
    return turns


def _conversation(
    turns: Any, column: str, names: tuple[str, str], roles: Mapping[str, str], found: Findings
) -> list[Message]:
    """A list of turns whose role and content have these names."""
    if not isinstance(turns, list) or not turns:
        what = "is an empty list" if turns == [] else f"is {_kind(turns)}, not a list of messages"
        found.append(Defect("not_text", what, key=column))
        return []
    return [
        message
        for place, turn in enumerate(turns)
        for message in _turn(turn, f"{column}[{place}]", names, roles, found)
    ]


def _turn(turn: Any, key: str, names: tuple[str, str], roles: Mapping[str, str], found: Findings) -> Sequence[Message]:
    role_name, content_name = names
    if not isinstance(turn, dict) or turn.get(role_name) is None:
        what = f"has no {role_name}" if isinstance(turn, dict) else f"is {_kind(turn)}, not a message"
        found.append(Defect("missing_role", what, key=key, allowed=f"{role_name} and {content_name}"))
        return []
    role = turn[role_name]
    if role not in roles:
        found.append(Defect("unknown_role", f"has the {role_name} {role!r}", key=key, allowed=", ".join(roles)))
        return []
    if content_name not in turn:
        found.append(
            Defect("missing_role", f"has no {content_name}", key=key, allowed=f"{role_name} and {content_name}")
        )
        return []
    return _text_message(roles[role], f"{key}.{content_name}", turn[content_name], found)


def _text_message(role: str, key: str, content: Any, found: Findings) -> list[Message]:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    found.append(_not_text(key, content))
    return []


def _not_text(key: str, value: Any) -> Defect:
    return Defect("not_text", f"is {_kind(value)}, not text", key=key)


def _kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        str: "text",
    }
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


FORMATS = {
    known.name: known
    for known in (
        Format("messages", ("messages",), ("messages",), _messages),
        Format("sharegpt", ("conversations",), ("conversations", "system"), _sharegpt),
        Format("prompt_completion", ("prompt", "completion"), ("prompt", "completion"), _prompt_completion),
        Format("alpaca", ("instruction", "output"), ("instruction", "input", "output", "system"), _alpaca),
        Format("text", ("text",), ("text",), _text),
    )
}
