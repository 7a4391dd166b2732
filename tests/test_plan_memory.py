"""What a build takes of a machine's memory, and what can't fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import plan_memory
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.hardware import Device

GIB = 2**30
SHAPE = {"hidden_size": 576, "num_hidden_layers": 30, "max_position_embeddings": 2048}


@pytest.fixture
def record(tmp_path):
    """The record of a small base model's artefact; `further` goes into its config.json."""

    def made(**further):
        (tmp_path / "payload").mkdir(exist_ok=True)
        (tmp_path / "payload" / "config.json").write_text(json.dumps({**SHAPE, **further}))
        return {"path": str(tmp_path), "detail": {"parameters": 135_000_000}}

    return made


def device(memory, kind="cpu"):
    return Device(kind, "one", "cpu-x86_64-avx512_bf16", int(memory), 2, int(kind == "cuda"), bf16=True)


def config(**sections):
    data = {"datasets": [{"path": "train.jsonl"}], **sections.pop("data", {})}
    return Config.model_validate({"name": "t", "data": data, **sections}).model_dump(mode="json")


def warned(made, record, there):
    found = plan_memory.estimates(made, record, there)
    return [(one.key, str(one.what)) for one in plan_memory.too_large(made, found, there, Path("use.yaml"))]


@pytest.mark.parametrize(
    ("method", "dtype", "device_class", "bytes_a_parameter"),
    [
        ("none", "auto", "cpu-x86_64-avx512_bf16", 2),
        ("llmcompressor", "auto", "cpu-x86_64-avx512_bf16", 0.6),
        ("llmcompressor", "auto", "cpu-x86_64-avx2", 4),
        ("llmcompressor", "bfloat16", "cpu-x86_64-avx2", 2),
        ("none", "float32", "cpu-x86_64-amx_bf16", 4),
    ],
)
def test_served_weights_are_estimated_as_they_will_lie_in_memory(method, dtype, device_class, bytes_a_parameter):
    """Four bits where the device has kernels for them; an old CPU unpacks them, into float32 by default."""
    device = Device("cpu", "a CPU", device_class, 2**34, 2, 0, bf16="bf16" in device_class)
    config = {"serve": {"dtype": dtype}, "quantize": {"method": method}}
    assert plan_memory.served_weights(config, 1000, device) == 1000 * bytes_a_parameter


@pytest.mark.parametrize(
    ("kind", "bf16", "bytes_a_parameter"), [("cpu", True, 2), ("cpu", False, 4), ("cuda", True, 2), ("cuda", False, 2)]
)
def test_awq_takes_twice_the_weights_on_a_cpu_without_bf16(record, kind, bf16, bytes_a_parameter):
    """There it computes in float32; beside them lie the activations of all calibration tokens."""
    settings = config(quantize={"num_calibration_samples": 2, "max_calibration_tokens": 64})
    there = Device(kind, "one", "one", 2**34, 2, int(kind == "cuda"), bf16=bf16)
    estimate = plan_memory.estimates(settings, record(), there)["quantize"]
    assert estimate == 135_000_000 * bytes_a_parameter + 2 * 64 * 576 * 4


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({}, []),
        ({"serve": {"kv_cache_memory": "900GiB"}}, ["serve.kv_cache_memory"]),
        ({"serve": {"kv_cache_memory": "16GiB"}}, ["serve.kv_cache_memory"]),
        ({"data": {"sequence_len": 100_000}}, ["data.sequence_len"]),
        ({"quantize": {"num_calibration_samples": 10**6}}, ["quantize.num_calibration_samples"]),
    ],
)
def test_what_cannot_fit_is_told_with_its_key(record, sections, keys):
    """Once each: a server that doesn't fit isn't told again as an old and a new one."""
    found = warned(config(**sections), record(), device(24 * GIB))
    assert [key for key, _ in found] == keys
    assert all("this machine has 24.0 GiB" in what for _, what in found)


def test_the_cache_alone_is_told_before_the_base_is_known():
    """And nothing where the machine doesn't tell its memory."""
    made = config(serve={"kv_cache_memory": "900GiB"})
    assert warned(made, None, device(24 * GIB)) == [
        ("serve.kv_cache_memory", "serve would take about 900.0 GiB, and this machine has 24.0 GiB")
    ]
    assert warned(made, None, device(0)) == []


def test_a_gpu_too_small_without_checkpointing_is_estimated_with_it(record):
    """As `auto` does it; a CPU never checkpoints by itself."""
    made = config(data={"sequence_len": 16_000})
    assert plan_memory.estimates(made, record(), device(8 * GIB, "cuda"))["finetune"] < 2 * GIB
    assert plan_memory.estimates(made, record(), device(8 * GIB))["finetune"] > 8 * GIB


@pytest.mark.parametrize(
    ("serve", "further", "refused"),
    [
        ({"max_model_len": 2048}, {}, False),
        ({"max_model_len": 4096}, {}, True),
        ({"max_model_len": 4096}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, False),
        ({"max_model_len": 4096}, {"rope_scaling": None}, True),
        ({"max_model_len": 4096, "env": {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}}, {}, False),
    ],
)
def test_more_positions_than_the_base_has_are_refused_where_it_is_at_hand(record, tmp_path, serve, further, refused):
    """In the store or as a folder; a model that isn't here, or stretches its positions, is vLLM's to judge."""
    made, base = config(serve=serve), record(**further)
    for known in ((made, base), ({**made, "base_model": str(tmp_path / "payload")}, None)):
        if refused:
            with pytest.raises(ConfigError) as caught:
                plan_memory.raise_for_too_long(*known)
            (problem,) = caught.value.problems
            assert (problem.key, problem.allowed) == ("serve.max_model_len", "1 to 2048")
        else:
            plan_memory.raise_for_too_long(*known)
    plan_memory.raise_for_too_long(made, None)
