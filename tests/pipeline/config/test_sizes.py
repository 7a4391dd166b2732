"""Sizes in bytes."""

from __future__ import annotations

import pytest

from pipeline.config.sizes import size_in_bytes


@pytest.mark.parametrize(("size", "number"), [("1GiB", 2**30), ("1.5 MiB", 3 * 2**19), ("10B", 10)])
def test_sizes_are_bytes(size: str, number: int) -> None:
    """Sizes carry binary units."""
    assert size_in_bytes(size) == number
