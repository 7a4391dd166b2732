"""Which steps the ledger asks; loading each model is tested by test_compare.py, on a chain that was made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.artifacts import Artifact
from pipeline.config.schema import FinetuneConfig
from pipeline.ledger import models

PLAIN = {"adapter": "lora", "load_in_4bit": False}


def artifacts(way: str, *further: str) -> dict[str, Artifact]:
    return {
        name: Artifact(
            stage=name, key="k", path=Path(name), digest="0", parents={}, made_by={}, detail={"merge_base": way}
        )
        for name in ("base", "prepare", "finetune", "merge", *further)
    }


@pytest.mark.parametrize(
    ("way", "settings", "further", "steps"),
    [
        ("original", {}, ("quantize",), ("merged_dequantized", "merged_original", "quantized")),
        ("dequantized", {}, ("quantize",), ("merged_original", "merged_dequantized", "quantized")),
        ("original", {}, (), ("merged_dequantized", "merged_original")),
        ("original", PLAIN, ("quantize",), ("merged_original", "quantized")),
    ],
)
def test_the_merge_of_this_model_stands_last_of_the_two(way: str, settings: dict, further: tuple, steps: tuple) -> None:
    """Its successor comes from it. After training in 16 bits there is one way, and without quantizing no such step."""
    assert models.steps(artifacts(way, *further), FinetuneConfig(**settings)) == ("base", "adapter", *steps)


def test_the_remedy_for_a_broken_folder_names_the_artefact(tmp_path: Path) -> None:
    """Its payload alone could not be made again."""
    assert f"delete {tmp_path} " in models._again(tmp_path / "payload")
