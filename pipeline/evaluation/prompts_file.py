"""A file of must-pass prompts, in promptfoo's test format as far as that is plain data, read with every mistake at once.

YAML or JSON: a list of tests, or `tests:` with such a list. A test has an `id` or a `description` (both may be left out),
`prompt`, a text, or `messages`, and under `assert` conditions on the answer that must all hold: `type`, one of
assertions.KINDS, and `value`. Anything that promptfoo would run or fetch (templates, providers, scripts, file://) is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import yaml_lines
from pipeline.config.yaml_lines import KeyPath
from pipeline.errors import ConfigError, Problem
from pipeline.evaluation.assertions import KINDS, NEGATION, Assertion
from pipeline.file_digests import remembered

KEYS = ("id", "description", "prompt", "messages", "assert")
ROLES = ("system", "user", "assistant")
TYPES = (*KINDS, *(NEGATION + name for name in KINDS))
# Of promptfoo's keys those that a pasted file most likely has: it gets told why they are none here.
NOT_HERE = {
    "vars": "no templates: write the whole prompt into the test",
    "prompts": "no templates: write the whole prompt into each test",
    "providers": "the candidate and the champion are asked",
    "provider": "the candidate and the champion are asked",
    "defaultTest": "write the assertions into each test",
    "threshold": "every assertion must hold",
    "weight": "every assertion must hold",
    "transform": "no code: the answer is judged as it is",
}


@dataclass(frozen=True)
class Prompt:
    """A must-pass prompt: the conversation, and conditions on the answer."""

    id: str
    messages: tuple[dict[str, str], ...]
    assertions: tuple[Assertion, ...]


@dataclass
class _Reading:
    """A file's mistakes so far, each with the line of its place."""

    file: str
    lines: dict[KeyPath, int]
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, at: KeyPath, fault: str, choices: str | None = None) -> None:
        """Note a mistake at this place, or at the nearest above that stands in the file."""
        places = (at[:n] for n in range(len(at), -1, -1))
        line = next((self.lines[place] for place in places if place in self.lines), None)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(".")
        self.problems.append(
            Problem(fault, self.file, line, key or None, choices, "correct it, then: tunegate check CONFIG")
        )

    def unknown_keys(self, value: dict[str, Any], at: KeyPath, names: Collection[str]) -> None:
        """Note each key that isn't one of these names."""
        for key in value:
            if key not in names:
                self.wrong((*at, key), "unknown key", NOT_HERE.get(key) or choices(key, names))


def sources_digest(path: str) -> str:
    """The file's SHA-256, after a look for mistakes. Raises ConfigError as `read` does."""
    read(Path(path))
    return remembered(Path(path))


def read(path: Path) -> tuple[Prompt, ...]:
    """The file's prompts in its order.

    Raises ConfigError with all that is wrong: its line, its place such as tests[2].assert[0].type, and what is allowed.
    """
    try:
        value, lines = yaml_lines.read(path)
    except OSError as error:
        near = sorted(file.name for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"can't be read: {error.strerror}", file=str(path), key="evaluate.prompts",
            allowed=", ".join(near[:10]) or None, remedy="name a YAML or JSON file of must-pass prompts",
        ) from None  # fmt: skip
    reading = _Reading(str(path), lines)
    prompts = [
        _prompt(test, (*at, number), number + 1, reading)
        for at, tests in _tests(value, reading)
        for number, test in enumerate(tests)
    ]
    if not prompts and not reading.problems:
        reading.wrong((), "must hold at least one prompt", "a list of {prompt: …, assert: [{type: …, value: …}]}")
    _say_doubles(prompts, reading)
    if reading.problems:
        raise ConfigError(sorted(reading.problems, key=lambda problem: problem.line or 0))
    return tuple(prompt for _, prompt in prompts)


def _tests(value: Any, reading: _Reading) -> list[tuple[KeyPath, list[Any]]]:
    """The list of tests and its place, where there is one."""
    at: KeyPath = ()
    if isinstance(value, dict):
        reading.unknown_keys(value, (), ("tests", "description"))
        at, value = ("tests",), value.get("tests")
    if isinstance(value, list):
        return [(at, value)]
    if value is not None:
        reading.wrong(at, "is not a list of tests", "a list of {prompt: …, assert: [{type: …, value: …}]}")
    return []


def _prompt(test: Any, at: KeyPath, number: int, reading: _Reading) -> tuple[KeyPath, Prompt]:
    """One test; a mistake in it is noted, and the prompt is then of no use."""
    if not isinstance(test, dict):
        reading.wrong(at, f"{test!r} is not a test", "{prompt: …, assert: [{type: …, value: …}]}")
        return at, Prompt(str(number), (), ())
    reading.unknown_keys(test, at, KEYS)
    for key in ("id", "description"):
        if not isinstance(test.get(key, ""), str | int):
            reading.wrong((*at, key), f"{test[key]!r} is not a text", "a short name")
    name = test.get("id", test.get("description", number))
    return at, Prompt(str(name), _messages(test, at, reading), _assertions(test, at, reading))


def _messages(test: dict[str, Any], at: KeyPath, reading: _Reading) -> tuple[dict[str, str], ...]:
    if ("prompt" in test) == ("messages" in test):
        reading.wrong(at, "needs either prompt or messages", "prompt: a text, or messages: [{role: user, content: …}]")
        return ()
    if "prompt" in test:
        if not isinstance(test["prompt"], str) or not test["prompt"]:
            reading.wrong((*at, "prompt"), f"{test['prompt']!r} is not a text", "the user's words")
        return ({"role": "user", "content": str(test["prompt"])},)
    at, messages = (*at, "messages"), test["messages"]
    if not isinstance(messages, list) or not messages:
        reading.wrong(at, "is not a list of messages", "[{role: user, content: …}]")
        return ()
    for number, message in enumerate(messages):
        _check_message(message, (*at, number), reading)
    if isinstance(messages[-1], dict) and messages[-1].get("role") in ("system", "assistant"):
        reading.wrong((*at, len(messages) - 1, "role"), "the last message isn't the user's", "user")
    return tuple(messages)


def _check_message(message: Any, at: KeyPath, reading: _Reading) -> None:
    if not isinstance(message, dict):
        reading.wrong(at, f"{message!r} is not a message", "{role: user, content: …}")
        return
    reading.unknown_keys(message, at, ("role", "content"))
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        reading.wrong((*at, "role"), f"{role!r} is not a role", choices(str(role), ROLES))
    if not isinstance(content, str) or not content:
        reading.wrong((*at, "content"), f"{content!r} is not a text", "the message's words")


def _assertions(test: dict[str, Any], at: KeyPath, reading: _Reading) -> tuple[Assertion, ...]:
    at, conditions = (*at, "assert"), test.get("assert")
    if not isinstance(conditions, list) or not conditions:
        reading.wrong(at, "needs at least one assertion", "[{type: contains, value: …}]")
        return ()
    return tuple(_assertion(condition, (*at, number), reading) for number, condition in enumerate(conditions))


def _assertion(condition: Any, at: KeyPath, reading: _Reading) -> Assertion:
    if not isinstance(condition, dict):
        reading.wrong(at, f"{condition!r} is not an assertion", "{type: contains, value: …}")
        return Assertion("")
    reading.unknown_keys(condition, at, ("type", "value"))
    name, value = condition.get("type"), condition.get("value")
    if name not in TYPES:
        problem = f"{name!r} is not a type of assertion" if "type" in condition else "needs a type"
        reading.wrong((*at, "type"), problem, choices(str(name), TYPES, KINDS))
        return Assertion("")
    kind = KINDS[str(name).removeprefix(NEGATION)]
    if isinstance(value, str) and value.startswith("file://"):
        reading.wrong((*at, "value"), f"{value}: no other files are read", "the value itself")
    elif fault := kind.fault(value):
        reading.wrong((*at, "value"), fault, kind.allowed)
    return Assertion(str(name), value)


def _say_doubles(prompts: list[tuple[KeyPath, Prompt]], reading: _Reading) -> None:
    """Note ids that an earlier prompt has: results are told apart by them."""
    first: dict[str, KeyPath] = {}
    for at, prompt in prompts:
        if prompt.id in first:
            line = reading.lines.get(first[prompt.id])
            fault = f"{prompt.id!r} is the name of two prompts, the first on line {line}"
            reading.wrong(at, fault, "an id of its own for each")
        first.setdefault(prompt.id, at)


def choices(name: str, names: Collection[str], shortlist: Collection[str] | None = None) -> str:
    """The name that was probably meant, else all names (or the `shortlist`, with word of the negated)."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    tail = f", or one of them after {NEGATION}" if shortlist else ""
    return "one of " + ", ".join(shortlist or names) + tail
