"""Which dtype a model computes in, by what a CPU and a GPU can do; and that AWQ stores the same dtypes whichever it is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.programs import TESTS, python

from pipeline import compute_dtype

BENCHMARK = TESTS.parent / "benchmarks" / "quantize_cpu.py"


class Model:
    """A model of this dtype, which keeps each conversion."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.conversions: list[str] = []

    def to(self, dtype: str) -> Model:
        """Convert it in place, as torch does."""
        self.conversions.append(dtype)
        return self


def machine(
    monkeypatch: pytest.MonkeyPatch, *, vectors: str = "AVX2", gpu: bool = False, gpu_bf16: bool = False
) -> None:
    """The torch that is imported sees this machine."""
    cuda = SimpleNamespace(is_available=lambda: gpu, is_bf16_supported=lambda including_emulation: gpu_bf16)
    cpu = SimpleNamespace(get_cpu_capability=lambda: vectors)
    torch = SimpleNamespace(bfloat16="bf16", float32="float32", cuda=cuda, backends=SimpleNamespace(cpu=cpu))
    monkeypatch.setitem(sys.modules, "torch", torch)


@pytest.mark.parametrize(
    ("flags", "vectors", "dtype"),
    [
        ("flags : fpu avx avx2 fma", "AVX2", "float32"),
        ("flags : avx2 avx512f avx512bw", "AVX512", "float32"),
        ("flags : avx2 avx512f avx512_bf16", "AVX512", "bf16"),
        ("flags : avx2 avx512f amx_bf16 amx_tile", "AVX512", "bf16"),
        ("Features : fp asimd sve bf16", "SVE256", "bf16"),
        ("Features : fp asimd", "DEFAULT", "float32"),
        ("flags : avx2 avx512_bf16", "DEFAULT", "float32"),
    ],
)
def test_a_cpu_computes_in_bf16_only_where_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, vectors: str, dtype: str
) -> None:
    """By its flags, and only where torch was built to use them."""
    machine(monkeypatch, vectors=vectors)
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert compute_dtype.of_device("cpu", tmp_path / "cpuinfo") == dtype


def test_a_machine_without_cpuinfo_computes_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing says that it multiplies bf16."""
    machine(monkeypatch)
    assert compute_dtype.of_device("cpu", tmp_path / "none") == "float32"


@pytest.mark.parametrize(("gpu_bf16", "dtype"), [(True, "bf16"), (False, "float32")])
def test_a_gpu_computes_in_bf16_where_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, gpu_bf16: bool, dtype: str
) -> None:
    """An older one emulates it."""
    machine(monkeypatch, gpu=True, gpu_bf16=gpu_bf16)
    assert compute_dtype.of_device("cuda") == dtype


@pytest.mark.parametrize(
    ("stored", "cpu", "gpu", "conversions"),
    [
        ("bf16", "float32", False, ["float32"]),
        ("bf16", "bf16", False, []),
        ("bf16", "float32", True, []),
        ("float16", "bf16", False, []),
    ],
)
def test_awq_leaves_the_stored_dtype_only_on_a_cpu_without_bf16(
    monkeypatch: pytest.MonkeyPatch, stored: str, cpu: str, gpu: bool, conversions: list[str]
) -> None:
    """On a CPU with bf16 and beside a GPU nothing is converted, as that would round the rotary frequencies."""
    machine(monkeypatch, gpu=gpu)
    monkeypatch.setattr(compute_dtype, "of_device", lambda device: {"cpu": cpu}[device])
    model = Model(stored)
    assert compute_dtype.for_quantizing(model) is model
    assert model.conversions == conversions


@pytest.mark.slow
@pytest.mark.parametrize(("environment", "method"), [("train", "llmcompressor"), ("autoawq", "autoawq")])
def test_computed_in_float32_awq_stores_the_same_dtypes(environment: str, method: str) -> None:
    """Both sides of the benchmark, each in its dtype, pass the stage's check and write the same kinds of tensors."""
    told = python(BENCHMARK, "--smoke", "--method", method, "--threads", "1", environment=environment)
    bfloat16, float32 = (line for line in told.splitlines() if line.startswith(("bfloat16 ", "float32 ")))
    assert bfloat16.split(";")[1] != float32.split(";")[1], "the two dtypes round differently"
    assert told.splitlines()[-1].startswith("both wrote the same ")
