"""The machine's device: its kind, its size, and how much of it is free. Needs no torch.

nvidia-smi tells of GPUs, /proc of a CPU; memory and cores are within the container's limits. `TUNEGATE_DEVICE=cpu` or `=cuda`
chooses; unset, a visible GPU is used. Limits: Linux, NVIDIA, GPUs of one kind (the first stands for all).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import ResourceError

# Vector units whose kernels round differently, best first: a CPU's class is named after the first that it has.
ISA = {
    "x86_64": {"amx_bf16": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"},
    "aarch64": {"sve2": "sve2", "sve": "sve", "bf16": "bf16", "asimd": "asimd"},
}
BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
BF16_COMPUTE_CAPABILITY = 8.0
GPU_OPTIMIZERS = ("adamw_bnb_8bit", "paged_adamw_8bit")  # bitsandbytes has them for GPUs alone
WITHOUT_BF16 = ("cpu-x86_64-avx2", "cpu-x86_64-generic")  # they emulate it


@dataclass(frozen=True)
class Device:
    """The device that a stage or a server computes on.

    A ServedUnit records `device_class`, such as `cpu-x86_64-avx512_bf16` or `NVIDIA H100 80GB HBM3`; machines of one class run
    the same kernels. `memory` is in bytes (of one GPU, or the machine's), `cores` counts usable CPU cores, `count` GPUs. `bf16`
    tells whether bfloat16 arithmetic is native.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    device_class: str
    memory: int
    cores: int
    count: int
    bf16: bool

    @property
    def serving_dtype(self) -> Literal["bfloat16", "float16", "float32"]:
        """The meaning of `serve.dtype: auto` here: bfloat16 unless its products are slow, as on a CPU with AVX2 alone."""
        if self.bf16:
            return "bfloat16"
        if self.kind == "cuda":
            return "float16"
        return "float32" if self.device_class in WITHOUT_BF16 else "bfloat16"


@dataclass(frozen=True)
class GpuMemory:
    """One GPU's memory now, in bytes, and its holders, each `pid N (program) X GiB`, as far as nvidia-smi shows them.

    In a container nvidia-smi shows no process outside.
    """

    free: int
    total: int
    holders: tuple[str, ...]

    def told(self) -> str:
        """In words: how much is free, and the holders of the rest."""
        holders = ", ".join(self.holders) or "nobody that nvidia-smi shows here"
        return f"{self.free / 2**30:.1f} of {self.total / 2**30:.1f} GiB are free; held by {holders}"


def gpu_memory() -> tuple[GpuMemory, ...]:
    """The memory of each visible GPU; empty where there is none or nvidia-smi doesn't tell."""
    cards = _nvidia_smi("--query-gpu=index,uuid,memory.free,memory.total")
    programs = _nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory")
    rows = _visible(cards or "", 4, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not all(free.isdigit() and total.isdigit() for _, _, free, total in rows):
        return ()
    holding = [row for row in _rows(programs or "", 4) if row[3].isdigit()]
    return tuple(
        GpuMemory(
            int(free) * 2**20,
            int(total) * 2**20,
            tuple(f"pid {pid} ({name}) {int(size) / 2**10:.1f} GiB" for on, pid, name, size in holding if on == uuid),
        )
        for _, uuid, free, total in rows
    )


def settled_gpu_memory(
    is_enough: Callable[[GpuMemory], bool], wait_s: float, count: int | None = None
) -> tuple[GpuMemory, ...]:
    """The memory of the first `count` visible GPUs (None: all), once each is enough or `wait_s` seconds are over.

    A process that ended gives its memory back a moment later.
    """
    until = time.monotonic() + wait_s
    while True:
        cards = gpu_memory()[:count]
        if all(map(is_enough, cards)) or time.monotonic() > until:
            return cards
        time.sleep(0.5)


def device() -> Device:
    """The device that work goes to; raises ResourceError when TUNEGATE_DEVICE=cuda and no GPU is visible."""
    choice = os.environ.get("TUNEGATE_DEVICE", "")
    if choice not in {"", "cpu", "cuda"}:
        raise ResourceError(
            f"TUNEGATE_DEVICE is {choice!r}",
            allowed="cpu, cuda, or unset",
            remedy="export TUNEGATE_DEVICE=cpu, or unset it",
        )
    if choice != "cpu":
        gpu = _gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if gpu is not None:
            return gpu
    if choice == "cuda":
        raise ResourceError(
            "TUNEGATE_DEVICE is cuda, but nvidia-smi shows no visible GPU",
            remedy="check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or unset TUNEGATE_DEVICE to use the CPU",
        )
    return cpu_of(Path("/proc/cpuinfo").read_text(encoding="utf-8"), platform.machine(), memory(), cores())


def cpu_of(cpuinfo: str, machine: str, memory: int, cores: int) -> Device:
    """The Device that /proc/cpuinfo describes."""
    flags = set(_field(cpuinfo, "flags", "Features").split())
    isa = next((name for flag, name in ISA.get(machine, {}).items() if flag in flags), "generic")
    name = _field(cpuinfo, "model name", "Model", "Hardware") or machine
    return Device("cpu", name, f"cpu-{machine}-{isa}", memory, cores, 0, bool(flags & BF16_FLAGS))


def gpu_of(csv: str, visible: str | None, cores: int) -> Device | None:
    """The Device that nvidia-smi's CSV (index, uuid, name, MiB, compute capability) describes, or None.

    `visible` is CUDA_VISIBLE_DEVICES: indices or UUID prefixes; empty hides all, and the first unknown entry
    ends the list, as CUDA has it.
    """
    rows = _visible(csv, 5, visible)
    if not rows:
        return None
    _, _, name, mebibytes, capability = rows[0]
    size = int(float(mebibytes)) * 2**20 if mebibytes.replace(".", "").isdigit() else 0
    bf16 = capability.replace(".", "").isdigit() and float(capability) >= BF16_COMPUTE_CAPABILITY
    return Device("cuda", name, name, size, cores, len(rows), bf16)


def _rows(csv: str, columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in csv.strip().splitlines()]
    return [row for row in rows if len(row) == columns]


def _visible(csv: str, columns: int, visible: str | None) -> list[list[str]]:
    """The rows, which begin with index and uuid, of the GPUs that CUDA_VISIBLE_DEVICES names, in its order."""
    rows = _rows(csv, columns)
    if visible is None:
        return rows
    visible_rows: list[list[str]] = []
    for entry in (part.strip() for part in visible.split(",")):
        card = next((row for row in rows if entry and (entry == row[0] or row[1].startswith(entry))), None)
        if card is None:
            break
        visible_rows.append(card)
    return visible_rows


def memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory, within the cgroup's limit."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", (proc / "meminfo").read_text(encoding="utf-8"), re.MULTILINE)
    total = int(match[1]) * 1024 if match else 0
    limit = _read(cgroup / "memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use, within its affinity and the cgroup's quota; at least 1."""
    affinity = len(os.sched_getaffinity(0))
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    return max(1, min(affinity, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else affinity


def _gpu(visible: str | None) -> Device | None:
    csv = _nvidia_smi("--query-gpu=index,uuid,name,memory.total,compute_cap")
    return None if csv is None else gpu_of(csv, visible, cores())


def _nvidia_smi(query: str) -> str | None:
    """nvidia-smi's answer as bare CSV; None where it isn't there or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        child = subprocess.run(
            [tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return child.stdout if child.returncode == 0 else None


def _field(cpuinfo: str, *names: str) -> str:
    for name in names:
        match = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
        if match:
            return match[1].strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
