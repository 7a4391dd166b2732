"""The base of a config's sections and the types that they share: what is taken, what is refused."""

from __future__ import annotations

import math

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from pipeline.config.section import Bytes, Fraction, PositiveInt, Section, ShareOrRows


class Shelf(Section):
    """A section as the config's own are made."""

    width: PositiveInt = 3
    labels: dict[str, str] = Field(default_factory=dict)


def test_a_section_does_not_change():
    """A setting that changed after the check would be in no digest."""
    shelf = Shelf()
    with pytest.raises(ValidationError, match="frozen"):
        shelf.width = 4
    with pytest.raises(ValidationError, match="frozen"):
        del shelf.width


def test_an_unknown_key_is_refused_by_its_name():
    """A typo isn't passed over, nor does the schema that editors read allow it."""
    with pytest.raises(ValidationError) as error:
        Shelf(widht=4)
    assert [(problem["loc"], problem["type"]) for problem in error.value.errors()] == [(("widht",), "extra_forbidden")]
    assert Shelf.model_json_schema()["additionalProperties"] is False


def test_sections_share_no_default():
    """A mapping that is filled in one of them stays empty in the next."""
    Shelf().labels["a"] = "b"
    assert Shelf().labels == {}


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (PositiveInt, 1), (Fraction, 0.0), (Fraction, 1.0), (ShareOrRows, 0.25), (ShareOrRows, 1.0), (ShareOrRows, 200),
        (Bytes, "1GiB"), (Bytes, "1.5 MiB"), (Bytes, "0B"), (Bytes, "512KiB"),
    ],
)  # fmt: skip
def test_what_lies_on_a_bound_is_taken_as_it_is(kind, setting):
    """The least count, both ends of a share, one row, each unit."""
    assert TypeAdapter(kind).validate_python(setting) == setting


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (PositiveInt, 0), (PositiveInt, -1), (PositiveInt, 1.5),
        (Fraction, -0.01), (Fraction, 1.01), (Fraction, math.nan), (Fraction, math.inf),
        (ShareOrRows, 1.5), (ShareOrRows, math.inf),
        (Bytes, "1GB"), (Bytes, "GiB"), (Bytes, "-1GiB"), (Bytes, "1.GiB"), (Bytes, "1GiB\n"), (Bytes, "x 1GiB"), (Bytes, "1024"),
    ],
)  # fmt: skip
def test_what_lies_past_a_bound_is_refused(kind, setting):
    """No count of none, no share past one or without a number, no half row, no decimal unit."""
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(setting)


def test_a_half_row_is_told_what_it_may_be():
    """A number past one isn't a percentage."""
    with pytest.raises(ValidationError, match="a share below 1, or a whole number of rows"):
        TypeAdapter(ShareOrRows).validate_python(12.5)


def test_a_size_explains_itself_with_examples_that_are_sizes():
    """An editor shows them, and one may copy them."""
    schema = TypeAdapter(Bytes).json_schema()
    assert schema["description"]
    assert [TypeAdapter(Bytes).validate_python(size) for size in schema["examples"]] == schema["examples"]
