"""The device is read from what Linux and nvidia-smi say, within the limits set on the process."""

import os
import stat

import pytest
from fakes import fake_smi

from pipeline import hardware
from pipeline.errors import ResourceError

EPYC = "processor : 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor : 1\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU implementer : 0x41\n"
SMI = "0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559, 9.0\n1, GPU-bb22, Tesla T4, 15360, 7.5\n"


def test_a_cpu_is_classed_by_the_best_vector_unit_it_has():
    """AMX before AVX-512 bf16 before AVX-512 before AVX2, whatever the order of the flags."""
    found = hardware.cpu_of(EPYC, "x86_64", 8, 2)
    assert (found.kind, found.name, found.device_class, found.bf16) == (
        "cpu",
        "AMD EPYC",
        "cpu-x86_64-avx512_bf16",
        True,
    )
    assert (
        hardware.cpu_of(EPYC.replace("avx512_bf16", "amx_bf16"), "x86_64", 8, 2).device_class == "cpu-x86_64-amx_bf16"
    )
    older = hardware.cpu_of(EPYC.replace("avx512_bf16", "").replace("avx512f", ""), "x86_64", 8, 2)
    assert (older.device_class, older.bf16) == ("cpu-x86_64-avx2", False)


def test_an_arm_and_an_unknown_cpu_have_a_class_too():
    """No machine is without a class, or its unit would have no device."""
    assert hardware.cpu_of(GRAVITON, "aarch64", 8, 2).device_class == "cpu-aarch64-sve"
    assert hardware.cpu_of("", "riscv64", 8, 2).device_class == "cpu-riscv64-generic"


def test_a_gpu_is_read_from_nvidia_smi():
    """Name, bytes of one GPU, their number and whether bfloat16 is native."""
    found = hardware.gpu_of(SMI, None, 4)
    assert found is not None
    assert (found.device_class, found.memory, found.count, found.bf16) == (
        "NVIDIA H100 80GB HBM3",
        81559 * 2**20,
        2,
        True,
    )


@pytest.mark.parametrize(
    ("visible", "names"),
    [("1", "Tesla T4"), ("GPU-bb", "Tesla T4"), ("0,7,1", "NVIDIA H100 80GB HBM3"), ("", None), ("-1", None)],
)
def test_cuda_visible_devices_is_kept_to(visible, names):
    """A hidden GPU doesn't count, and CUDA's rule that an unknown entry ends the list holds."""
    found = hardware.gpu_of(SMI, visible, 4)
    assert (found.name if found else None) == names
    if found:
        assert found.count == 1
        assert found.bf16 is (found.name != "Tesla T4")


def test_limits_of_a_container_bound_memory_and_cores(tmp_path):
    """A cgroup's memory.max and cpu.max count before what the machine has."""
    (tmp_path / "meminfo").write_text("MemTotal:       1000 kB\nMemFree: 5 kB\n")
    assert hardware.memory(tmp_path, tmp_path / "none") == 1_024_000
    (tmp_path / "memory.max").write_text("4096\n")
    assert hardware.memory(tmp_path, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.memory(tmp_path, tmp_path) == 1_024_000
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert hardware.cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert hardware.cores(tmp_path) == len(os.sched_getaffinity(0))


def test_the_device_of_this_machine_is_found_without_torch(monkeypatch, tmp_path):
    """With no nvidia-smi on PATH it is the CPU; asking for CUDA then says what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TUNEGATE_DEVICE", raising=False)
    found = hardware.device()
    assert found.kind == "cpu"
    assert found.memory > 2**28
    assert found.cores >= 1
    monkeypatch.setenv("TUNEGATE_DEVICE", "cuda")
    with pytest.raises(ResourceError, match="unset TUNEGATE_DEVICE"):
        hardware.device()


def test_a_visible_gpu_is_preferred_and_can_be_declined(monkeypatch, tmp_path):
    """nvidia-smi is really run: the device is its GPU unless TUNEGATE_DEVICE says cpu."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("TUNEGATE_DEVICE", raising=False)
    assert hardware.device().kind == "cuda"
    monkeypatch.setenv("TUNEGATE_DEVICE", "cpu")
    assert hardware.device().kind == "cpu"
    monkeypatch.setenv("TUNEGATE_DEVICE", "tpu")
    with pytest.raises(ResourceError, match="cpu, cuda"):
        hardware.device()


def test_who_holds_a_gpu_is_told_with_pid_and_size(monkeypatch, tmp_path):
    """Each card has its own holders; a card that is hidden isn't told of."""
    programs = "GPU-1, 41, VLLM::EngineCore, 10240\nGPU-0, 42, python3, 61440\nGPU-0, 43, python3, [N/A]\n"
    fake_smi.install(monkeypatch, tmp_path, 2048, 71000, programs=programs)
    first, second = hardware.gpu_memory()
    assert first.told() == "2.0 of 79.6 GiB are free; held by pid 42 (python3) 60.0 GiB"
    assert second.holders == ("pid 41 (VLLM::EngineCore) 10.0 GiB",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert hardware.gpu_memory() == (second,)


def test_without_nvidia_smi_or_its_figures_no_memory_is_told(monkeypatch, tmp_path):
    """Nobody is refused for what isn't known."""
    fake_smi.install(monkeypatch, tmp_path, "echo [N/A]")
    assert hardware.gpu_memory() == ()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert hardware.gpu_memory() == ()


def test_memory_that_comes_free_in_time_is_waited_for(monkeypatch, tmp_path):
    """An ended process gives its memory back a moment later; what stays held isn't waited for longer than asked."""
    count = tmp_path / "count"
    fake_smi.install(monkeypatch, tmp_path, f"echo x >> {count}; echo $(( $(wc -l < {count}) * 1000 ))")
    (card,) = hardware.settled_gpu_memory(lambda card: card.free >= 2500 * 2**20, 20)
    assert card.free == 3000 * 2**20
    (card,) = hardware.settled_gpu_memory(lambda card: card.free >= 80000 * 2**20, 0)
    assert card.free < 80000 * 2**20


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        (("cpu", "cpu-x86_64-avx512_bf16", True), "bfloat16"),
        (("cpu", "cpu-x86_64-avx512", False), "bfloat16"),
        (("cpu", "cpu-x86_64-avx2", False), "float32"),
        (("cuda", "NVIDIA H200", True), "bfloat16"),
        (("cuda", "Tesla T4", False), "float16"),
    ],
)
def test_what_serves_by_default_is_what_the_device_multiplies(device, dtype):
    """bfloat16 where that is quick, else the next best."""
    kind, name, bf16 = device
    assert hardware.Device(kind, name, name, 2**30, 2, 0, bf16).serving_dtype == dtype
