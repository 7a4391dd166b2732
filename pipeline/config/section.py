"""The base of every section of a config: frozen, closed to unknown keys, with a few shared types."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _a_share_or_rows(size: float) -> float:
    if size >= 1 and not size.is_integer():
        raise ValueError("must be a share below 1, or a whole number of rows")
    return size


PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
ShareOrRows = Annotated[float, AfterValidator(_a_share_or_rows)]
Bytes = Annotated[
    str,
    Field(
        pattern=r"^\d+(\.\d+)?\s*(B|KiB|MiB|GiB)$",
        description="a size such as 1GiB",
        examples=["512MiB", "1.5GiB"],
    ),
]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
