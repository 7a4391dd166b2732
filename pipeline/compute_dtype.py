"""The dtype that a model computes in on this machine: bf16 where the hardware multiplies it, else float32, then faster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.hardware import BF16_FLAGS

if TYPE_CHECKING:
    import torch


def of_device(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> torch.dtype:
    """The dtype to train and generate in, on "cuda" or "cpu"."""
    import torch

    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    vectors = torch.backends.cpu.get_cpu_capability()
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    return torch.bfloat16 if BF16_FLAGS & flags and vectors != "DEFAULT" else torch.float32


def for_quantizing(model: Any) -> Any:
    """The model as AWQ computes with it: as it was loaded, but in float32 where only a CPU without bf16 is there.

    Converting to the same dtype would change it: rotary frequencies are kept in float32 beside weights in bf16.
    """
    import torch

    if torch.cuda.is_available() or model.dtype != torch.bfloat16 or of_device("cpu") == torch.bfloat16:
        return model
    return model.to(torch.float32)


def back_to_stored(model: Any) -> None:
    """Undo `for_quantizing` before saving: parameters get the dtype that the model was loaded in.

    Buffers stay as they are: AutoAWQ keeps its scales there, always in float16.
    """
    stored_dtype = getattr(model.config, "dtype", None) or model.config.torch_dtype  # transformers 5, transformers 4
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(stored_dtype)
