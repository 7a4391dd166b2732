"""pydantic's findings in words: the mistake, and the allowed values, with an example where the field has one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from pipeline.config.schema import Config
from pipeline.config.section import Section
from pipeline.config.yaml_lines import KeyPath

# By pydantic's type of error: the mistake, and the allowed kind where that doesn't follow from the field.
WORDS = {
    "int_type": ("is not a whole number", "a whole number"),
    "int_parsing": ("is not a whole number", "a whole number"),
    "int_from_float": ("is not a whole number", "a whole number"),
    "float_type": ("is not a number", "a number"),
    "float_parsing": ("is not a number", "a number"),
    "bool_type": ("is neither true nor false", "true or false"),
    "bool_parsing": ("is neither true nor false", "true or false"),
    "string_type": ("is not text", "text, in quotes where YAML reads it as something else"),
    "tuple_type": ("is not a list", "a list"),
    "dict_type": ("must hold keys", "a mapping of keys"),
    "model_type": ("must hold keys", "a mapping of keys"),
    "literal_error": ("is not one of the choices", None),
    "greater_than": ("is too small", None),
    "greater_than_equal": ("is too small", None),
    "less_than": ("is too large", None),
    "less_than_equal": ("is too large", None),
    "string_pattern_mismatch": ("doesn't have the allowed form", None),
}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "at least"}
NUMBERS = {int, float}


def what(detail: Mapping[str, Any]) -> str:
    """The mistake, after the value where that is short."""
    if detail["type"] == "extra_forbidden":
        return "unknown key"
    if detail["type"] == "missing":
        return "is required but missing"
    input_value, message = detail.get("input"), str(detail["msg"]).removeprefix("Value error, ")
    message = WORDS.get(detail["type"], (message, None))[0]
    return (
        message
        if isinstance(input_value, dict | list | Section)
        else f"{input_value!r}: {message[0].lower()}{message[1:]}"
    )


def allowed(detail: Mapping[str, Any], at: KeyPath, aliases: Collection[str], flat: Collection[str]) -> str | None:
    """The allowed values; for an unknown key the one that was probably meant, also by another tool's name."""
    if detail["type"] == "extra_forbidden":
        return _meant(at, aliases, flat)
    context, field = detail.get("ctx", {}), _field(at)
    if "expected" in context:
        return str(context["expected"])
    if "pattern" in context:
        return _form(field) or f"text matching {context['pattern']}"
    kind = WORDS.get(detail["type"], (None, None))[1]
    if detail["type"] == "tuple_type" and field and isinstance(field.default, tuple) and field.default:
        return f"{kind}, such as {json.dumps(field.default, default=_plain)}"
    return (
        kind
        or ", ".join(f"{sign} {_number(context[name])}" for name, sign in BOUNDS.items() if name in context)
        or None
    )


def _form(field: FieldInfo | None) -> str | None:
    """How a text that has to fit a pattern looks, in words or by example."""
    if field is None:
        return None
    return f"such as {' or '.join(field.examples)}" if field.examples else field.description


def truths(value: Any, model: type[Section] = Config, at: KeyPath = ()) -> Iterator[KeyPath]:
    """The places of booleans where a number belongs: YAML reads no, off, yes and on as one, and pydantic would take 0 and 1."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        field = model.model_fields.get(str(key))
        if field is None:
            continue
        section = section_in(field.annotation)
        for place, leaf in _each(inner, (*at, key)):
            if isinstance(leaf, bool) and _wants_number(field.annotation):
                yield place
            elif section is not None:
                yield from truths(leaf, section, place)


def known_keys(at: KeyPath, flat: Collection[str]) -> set[str]:
    """The keys allowed at a place of the config."""
    model = _model(at)
    names = set(model.model_fields) if model else set()
    return names | set(flat) if model is Config else names


def section_in(annotation: Any) -> Any:
    """The section that an annotation holds, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((section for part in getattr(annotation, "__args__", ()) if (section := section_in(part))), None)


def _meant(at: KeyPath, aliases: Collection[str], flat: Collection[str]) -> str:
    names = known_keys(at[:-1], flat)
    close = difflib.get_close_matches(str(at[-1]), [*names, *(aliases if len(at) <= 2 else ())], n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "one of " + ", ".join(sorted(names))


def _model(at: KeyPath) -> type[Section] | None:
    """The section at a place of the config."""
    model: Any = Config
    for part in at:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        model = section_in(field.annotation) if field is not None else None
        if model is None:
            return None
    return model  # type: ignore[no-any-return]


def _field(at: KeyPath) -> FieldInfo | None:
    """The field at a place of the config; of a list's item the list's."""
    names = [part for part in at if isinstance(part, str)]
    model = _model(tuple(names[:-1]))
    return model.model_fields.get(names[-1]) if model and names else None


def _each(value: Any, at: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, list):
        yield from (((*at, n), item) for n, item in enumerate(value))
    else:
        yield at, value


def _parts(annotation: Any) -> set[Any]:
    inner = getattr(annotation, "__args__", ())
    return {annotation}.union(*(_parts(part) for part in inner)) if inner else {annotation}


def _wants_number(annotation: Any) -> bool:
    parts = {part for part in _parts(annotation) if isinstance(part, type)}
    return bool(parts & NUMBERS) and bool not in parts


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_defaults=True) if isinstance(value, Section) else str(value)
