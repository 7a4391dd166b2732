"""Room on a GPU for a server, checked before it starts; the error names the holders of the memory. CUDA only."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline import hardware
from pipeline.artifacts import ServedUnit
from pipeline.errors import Problem, ServingError

WAIT_S = 30.0  # a process that just ended gives its memory back within a few seconds


def check(unit: ServedUnit, model: Path, wait_s: float = WAIT_S) -> None:
    """Wait until each GPU of the unit has room for its weights and KV cache, the least that it needs.

    Raises ServingError, which names the holders of the memory, when none becomes free. Checks nothing where nvidia-smi
    tells no figures.
    """
    if hardware.device().kind != "cuda":
        return
    need, count = least(unit, model), _gpus(unit)
    cards = hardware.settled_gpu_memory(lambda card: card.free >= need, wait_s, count)
    short = [card for card in cards if card.free < need]
    if short:
        raise ServingError(
            Problem(
                f"the model's weights and its KV cache take {need / 2**30:.1f} GiB of a GPU, of which {short[0].told()}",
                key="serve.kv_cache_memory",
                remedy="end what holds the GPU, lower serve.kv_cache_memory, or raise serve.tensor_parallel_size",
            )
        )


def least(unit: ServedUnit, model: Path) -> int:
    """Bytes of one GPU that weights and KV cache fill; activations and CUDA graphs come on top."""
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if "float32" in (config.get("dtype"), config.get("torch_dtype")) and _flag(unit, "--dtype", "") != "float32":
        weights //= 2  # served in 16 bits
    if _flag(unit, "--quantization", "") and "quantization_config" not in config:
        weights = 0  # vLLM makes them smaller as it reads them; by how much isn't known here
    on_cpu = int(float(_flag(unit, "--cpu-offload-gb", "0")) * 2**30)
    return max(0, weights // _gpus(unit) - on_cpu) + int(_flag(unit, "--kv-cache-memory-bytes", "0"))


def _gpus(unit: ServedUnit) -> int:
    return int(_flag(unit, "--tensor-parallel-size", "1")) * int(_flag(unit, "--pipeline-parallel-size", "1"))


def _flag(unit: ServedUnit, name: str, default: str) -> str:
    return next((flag.partition("=")[2] for flag in unit.flags if flag.startswith(f"{name}=")), default)
