"""Which models a CUDA graph can hold; loading and preparing them is tested by test_finetune.py and test_finetune_lora.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.finetune import model


@pytest.mark.parametrize(
    ("rope", "by_length"),
    [
        (None, False),
        ({"rope_type": "default", "rope_theta": 10000.0}, False),
        ({"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}, False),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, True),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, True),
    ],
)
def test_frequencies_that_depend_on_the_length_are_seen(rope: dict | None, by_length: bool) -> None:
    """Transformers' dynamic and longrope, for all layers or for those of one kind."""
    assert model.rotates_by_length(SimpleNamespace(rope_parameters=rope)) is by_length
