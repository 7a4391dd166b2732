"""A build's memory, estimated by stage, and warnings of too much."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.schema import Config, FinetuneConfig
from pipeline.errors import ConfigError
from pipeline.finetune import execution
from pipeline.finetune import memory as finetune_memory
from pipeline.hardware import Device
from pipeline.plan import memory as plan_memory

GIB = 2**30
SHAPE = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}  # fmt: skip


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
    """Keys and texts of the warnings; each names its key in the remedy, too."""
    sizes = plan_memory.estimates(made, record, there)
    problems = list(plan_memory.too_large(made, sizes, there, Path("use.yaml")))
    assert all(problem.key in problem.remedy for problem in problems)
    return [(problem.key, str(problem.what)) for problem in problems]


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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "micro_batch_size": 2},
        {"adapter": "lora", "load_in_4bit": False, "lora_target_modules": ["q_proj"]},
        {"num_processes": 2, "fsdp_version": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("sequence_len", [1024, 16_000])
def test_check_warns_of_the_pass_that_training_would_choose_and_could_not_hold(record, settings, sequence_len):
    """From too small a GPU to one with room: a warning exactly where weights, adapter and the chosen pass exceed its memory."""
    made = config(finetune=settings, data={"sequence_len": sequence_len})
    shape, tune = SimpleNamespace(**SHAPE), FinetuneConfig(**settings)
    fixed = finetune_memory.frozen_bytes(shape, 135_000_000, tune) + finetune_memory.adapter_bytes(shape, tune)
    gates = finetune_memory.adapts_gates(tune)
    base = execution.Base(shape, "sdpa", has_plain_head=True, has_gates=gates, is_known_to_liger=True)
    machine = execution.Machine("cuda", "a GPU", "bfloat16", 8, tune.num_processes)
    verdicts = set()
    for size in (GIB // 8, GIB // 4, GIB // 2, GIB, 2 * GIB, 8 * GIB, 32 * GIB, 80 * GIB):
        chosen = execution.choose(
            tune, base, machine, "nf4", sequence_len=sequence_len, free_bytes=max(0, size - fixed)
        )
        activations = chosen.tokens_a_pass * finetune_memory.bytes_a_token(
            shape, checkpointing=chosen.gradient_checkpointing, fused_loss=chosen.fused_loss, has_gates=gates
        )
        refused = fixed + activations > size
        told = any("finetune would take" in text for _, text in warned(made, record(), device(size, "cuda")))
        assert told is refused
        verdicts.add(told)
    assert verdicts == {True, False}, "the sizes reach from too small to large enough"


def test_a_gpu_too_small_without_checkpointing_is_estimated_with_it(record):
    """As `auto` does it: not where a long row fits without; and a CPU never checkpoints by itself."""
    made = config(data={"sequence_len": 16_000})
    assert plan_memory.estimates(made, record(), device(6 * GIB, "cuda"))["finetune"] < 2 * GIB
    assert 6 * GIB < plan_memory.estimates(made, record(), device(8 * GIB, "cuda"))["finetune"] < 8 * GIB
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
