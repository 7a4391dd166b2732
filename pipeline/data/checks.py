"""Whether a row can be trained on: turns in order, texts that aren't empty and don't break the chat template.

The checks report every defect and repair none. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from pipeline.data.defects import Defect
from pipeline.data.formats import Body, Message

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
SURROGATE = re.compile("[\ud800-\udfff]")


def special_tokens_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of a tokenizer's special tokens, the longest first."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def check(body: Body, special: re.Pattern[str]) -> list[Defect]:
    """Every defect of a row's conversation or text."""
    if isinstance(body, str):
        empty = [] if body.strip() else [Defect("empty_message", "the text is empty", key="text")]
        return [*empty, *_characters(body, "text", special)]
    in_messages = (
        defect
        for place, message in enumerate(body)
        for defect in _characters(message["content"], _name(place, message), special)
    )
    return [*_order(body), *_empty(body), *in_messages]


def _order(messages: Sequence[Message]) -> Iterator[Defect]:
    roles = [message["role"] for message in messages]
    late = [place for place, role in enumerate(roles) if role == "system" and place]
    if late:
        yield Defect("system_in_middle", f"message {late[0] + 1} is a system message")
    turns = [role for role in roles if role != "system"]
    wrong = [n for n, role in enumerate(turns) if role != ("user", "assistant")[n % 2]]
    if wrong:
        first = wrong[0]
        mistake = f"two {turns[first]} messages in a row" if first else f"the {turns[first]} speaks first"
        yield Defect("wrong_role_order", mistake, allowed="system (optional), user, assistant, user, assistant …")
    if not turns or turns[-1] != "assistant":
        yield Defect("no_answer", "the conversation does not end with the assistant")


def _empty(messages: Sequence[Message]) -> Iterator[Defect]:
    for place, message in enumerate(messages):
        if not message["content"].strip():
            answer = place == len(messages) - 1 and message["role"] == "assistant"
            kind, mistake = ("empty_answer", "the answer is empty") if answer else ("empty_message", "is empty")
            yield Defect(kind, mistake, key=_name(place, message))


def _characters(text: str, key: str, special: re.Pattern[str]) -> Iterator[Defect]:
    if token := special.search(text):
        yield Defect("special_token", f"the text holds the special token {token[0]}", key=key)
    if control := CONTROL.search(text):
        yield Defect("control_character", f"the text holds the control character U+{ord(control[0]):04X}", key=key)
    yield from half_characters(text, key)


def half_characters(text: str, key: str) -> Iterator[Defect]:
    """Half a surrogate pair: text that no file can hold."""
    if half := SURROGATE.search(text):
        yield Defect("lone_surrogate", f"the text holds half a character, U+{ord(half[0]):04X}", key=key)


def _name(place: int, message: Message) -> str:
    return f"message {place + 1} ({message['role']})"
