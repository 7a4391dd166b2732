"""Sizes as a config spells them, in bytes. Standard library only: `tunegate check` reads them without pydantic."""

from __future__ import annotations

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def size_in_bytes(size: str) -> int:
    """The number of bytes of a size such as "1.5GiB"."""
    number = size.rstrip("BKMGi ")
    return int(float(number) * UNITS[size[len(number) :].strip()])
