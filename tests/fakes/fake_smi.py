"""A stand-in for nvidia-smi on PATH: one H100 or more, as much free as told, held by whom told."""

from __future__ import annotations

import stat

TOTAL_MIB = 81559


def install(monkeypatch, folder, *free_mib, programs=""):
    """Put it on PATH with a GPU for each of `free_mib`, each MiB or shell that echoes them; GPU N has the uuid GPU-N."""
    found = [free if isinstance(free, str) else f"echo {free}" for free in free_mib]
    memory = "\n".join(f'echo "{n}, GPU-{n}, $({free}), {TOTAL_MIB}"' for n, free in enumerate(found))
    cards = "\n".join(f'echo "{n}, GPU-{n}, NVIDIA H100 80GB HBM3, {TOTAL_MIB}, 9.0"' for n in range(len(found)))
    tool = folder / "nvidia-smi"
    tool.write_text(
        f"#!/bin/sh\ncase $1 in\n--query-compute-apps*)\ncat <<'END'\n{programs}END\n;;\n"
        f"*memory.free*)\n{memory}\n;;\n*)\n{cards}\n;;\nesac\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("TUNEGATE_DEVICE", raising=False)
