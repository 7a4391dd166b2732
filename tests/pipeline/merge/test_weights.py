"""An adapter matched with its base, from files' headers alone; the merged weights themselves are test_merge's."""

from __future__ import annotations

import json

import pytest
from support import model_folder

from pipeline.errors import ModelError
from pipeline.merge import weights


@pytest.fixture
def adapter(tmp_path):
    """An adapter folder of bytes alone, and the shapes of its base."""
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"})
    )
    model_folder.safetensors(
        tmp_path / "adapter_model.safetensors",
        {f"{prefix}.lora_A.weight": ("F32", [2, 8]), f"{prefix}.lora_B.weight": ("F32", [6, 2])},
    )
    return tmp_path, {"model.layers.0.self_attn.q_proj.weight": (6, 8)}


def test_pairs_are_matched_by_name_and_shape(adapter):
    """A and B belong to the base tensor of their module."""
    found = weights.read_adapter(*adapter)
    assert list(found.pairs) == ["model.layers.0.self_attn.q_proj.weight"]
    assert found.scaling == 2.0


def test_all_that_keeps_an_adapter_from_merging_is_told_at_once(adapter):
    """Settings with other arithmetic and layers that fit nothing come in one error."""
    folder, _ = adapter
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "all", "modules_to_save": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as error:
        weights.read_adapter(folder, {"model.layers.0.self_attn.q_proj.weight": (8, 8)})
    assert [problem.key for problem in error.value.problems] == [
        "bias", "modules_to_save", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    ]  # fmt: skip


def test_a_tied_head_cannot_be_adapted(adapter):
    """An adapter for lm_head has no tensor to go to when the head is the embedding."""
    folder, shapes = adapter
    model_folder.safetensors(
        folder / "adapter_model.safetensors",
        {
            "base_model.model.lm_head.lora_A.weight": ("F32", [2, 8]),
            "base_model.model.lm_head.lora_B.weight": ("F32", [6, 2]),
        },
    )
    with pytest.raises(ModelError, match="fits no layer"):
        weights.read_adapter(folder, shapes)


def test_an_adapter_cut_short_is_refused(adapter):
    """Its header is checked as a base's is."""
    folder, shapes = adapter
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="the file holds"):
        weights.read_adapter(folder, shapes)
