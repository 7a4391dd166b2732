"""A server starts only where a GPU has room for it, and the error says who has it else."""

from __future__ import annotations

import json
import time

import pytest
from fakes import fake_smi
from support.released import ENVIRONMENT, a_model
from support.wire import chat, said

from pipeline import hardware
from pipeline.config.schema import ServeConfig
from pipeline.errors import ServingError
from pipeline.serving import gpu_room
from pipeline.serving import serve as serving
from pipeline.serving.server import ToServe

SERVE = ServeConfig(kv_cache_memory="20GiB", startup_timeout=20)
HELD = "GPU-0, 42, python3, 61440\n"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model folder, with a home beside it."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    return a_model(tmp_path / "model", answer="here")


def unit_of(model, serve=SERVE):
    """The unit that would serve it."""
    return serving.served_unit(model, serve, "m", ENVIRONMENT)


def test_a_held_gpu_is_told_with_who_holds_it(model, tmp_path, monkeypatch):
    """No server starts, and the error names process and setting."""
    fake_smi.install(monkeypatch, tmp_path, 20000, programs=HELD)
    monkeypatch.setattr(gpu_room, "WAIT_S", 0.0)
    to_serve = ToServe(unit_of(model), model, SERVE, "m", tmp_path / "server", ENVIRONMENT)
    with pytest.raises(ServingError) as caught:
        serving.start(to_serve, keep=False, on_event=lambda _: None)
    problem = caught.value.problems[0]
    assert "20.0 GiB of a GPU, of which 19.5 of 79.6 GiB are free; held by pid 42 (python3) 60.0 GiB" in problem.what
    assert problem.key == "serve.kv_cache_memory"
    assert serving.find(tmp_path / "server") is None


def test_a_server_starts_where_there_is_room(model, tmp_path, monkeypatch):
    """Beside another that holds the rest."""
    fake_smi.install(monkeypatch, tmp_path, 21000, programs=HELD)
    unit = unit_of(model)
    assert unit.device == "NVIDIA H100 80GB HBM3"
    with serving.running(ToServe(unit, model, SERVE, "m", tmp_path / "server", ENVIRONMENT), lambda _: None) as server:
        assert said(chat(server.url, model="m")) == "here"


def test_memory_that_an_ended_process_gives_back_is_waited_for(model, tmp_path, monkeypatch):
    """The stage before has just ended: its memory is free a moment later."""
    count = tmp_path / "count"
    grows = f"echo x >> {count}; echo $(( $(wc -l < {count}) * 8000 ))"
    fake_smi.install(monkeypatch, tmp_path, grows)
    began = time.monotonic()
    gpu_room.check(unit_of(model), model)
    assert time.monotonic() - began < 10


def test_every_gpu_that_is_taken_needs_room(model, tmp_path, monkeypatch):
    """With two of them the second may be the one that is held; with one it isn't looked at."""
    fake_smi.install(monkeypatch, tmp_path, 70000, 10)
    gpu_room.check(unit_of(model), model, 0)
    both = unit_of(model, SERVE.model_copy(update={"tensor_parallel_size": 2}))
    with pytest.raises(ServingError, match=r"0\.0 of 79\.6 GiB"):
        gpu_room.check(both, model, 0)


def test_the_least_is_counted_by_what_is_stored(model):
    """Each of two GPUs takes half of the weights, and a whole KV cache."""
    (model / "model.safetensors").write_bytes(b"x" * 4000)
    kv = 20 * 2**30
    assert gpu_room.least(unit_of(model), model) == 4000 + kv
    two = unit_of(model, SERVE.model_copy(update={"tensor_parallel_size": 2}))
    assert gpu_room.least(two, model) == 2000 + kv


@pytest.mark.parametrize(
    ("device_class", "dtype", "weights"),
    [
        ("cpu-x86_64-avx512_bf16", "auto", 2000),
        ("cpu-x86_64-avx2", "auto", 4000),
        ("cpu-x86_64-avx512_bf16", "float32", 4000),
        ("cpu-x86_64-avx2", "bfloat16", 2000),
    ],
)
def test_weights_stored_in_float32_are_counted_as_they_are_served(model, monkeypatch, device_class, dtype, weights):
    """Half of their bytes in 16 bits, all of them in float32, which `auto` is on a CPU with AVX2 alone."""
    device = hardware.Device("cpu", "a CPU", device_class, 2**34, 2, 0, bf16="bf16" in device_class)
    monkeypatch.setattr(hardware, "device", lambda: device)
    (model / "model.safetensors").write_bytes(b"x" * 4000)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    unit = unit_of(model, SERVE.model_copy(update={"dtype": dtype}))
    assert gpu_room.least(unit, model) == weights + 20 * 2**30


def test_weights_that_vllm_makes_smaller_as_it_reads_them_count_nothing(model):
    """They take less than their files by a share that is vLLM's affair; what is quantized already takes what it takes."""
    (model / "model.safetensors").write_bytes(b"x" * 4000)
    online = unit_of(model, SERVE.model_copy(update={"extra_args": {"quantization": "fp8"}}))
    assert gpu_room.least(online, model) == 20 * 2**30
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert gpu_room.least(online, model) == 4000 + 20 * 2**30
