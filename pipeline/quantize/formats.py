"""What a quantized folder's bytes mean: packed weights unpacked to float32, without the packages that packed them.

Two formats of 4-bit weights in groups: `pack-quantized` of compressed-tensors, and AutoAWQ's GEMM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError, Problem
from pipeline.model import weights

if TYPE_CHECKING:
    import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's nibble i of an int32 holds output column AWQ_ORDER[i] of its eight."""
SCALES = {"weight_packed": "weight_scale", "qweight": "scales"}
"""By the last part of a packed tensor's name: that of its scales."""
PARTS = {"weight_scale", "weight_shape", "weight_zero_point", "scales", "qzeros"}
REQUANTIZE = "delete the folder, run the same command again, and report it if it fails again"


def decoder_layers(model: Any) -> list[Any]:
    """The decoder's layers, in order."""
    return list(model.get_decoder().layers)


def quantization_of(folder: Path) -> dict[str, Any]:
    """The quantization_config of a folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return dict(config["quantization_config"])


def load_dequantized(model: Any, folder: Path) -> None:
    """Overwrite a plain model's weights with the quantized folder's, unpacked on the model's device.

    Raises ModelError when a tensor is missing, unknown, of another shape, or broken.
    """
    import torch

    parameters = dict(model.named_parameters())
    problems, names = [], set()
    with torch.no_grad():
        for name, tensor in dequantized(folder, model.device):
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                shape = "unknown to the model" if parameter is None else f"of shape {tuple(parameter.shape)} there"
                problems.append(_problem(f"{name} of shape {tuple(tensor.shape)} is {shape}", folder))
                continue
            names.add(name)
            parameter.copy_(tensor)
    problems += [_problem(f"{name} is missing", folder) for name in sorted(parameters.keys() - names)]
    if problems:
        raise ModelError(problems)


def dequantized(folder: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """The folder's tensors on `device` by their names in the plain model, packed ones unpacked to float32.

    Raises ModelError listing every tensor with a NaN, an infinity or a scale that isn't positive.
    """
    problems = []
    with weights.Reader(folder) as reader:

        def read(name: str) -> torch.Tensor:
            return reader(name).to(device)

        for name in sorted(weights.tensors(folder)):
            module, _, kind = name.rpartition(".")
            if kind in SCALES:
                problems += _scale_problems(f"{module}.{SCALES[kind]}", read(f"{module}.{SCALES[kind]}"), folder)
                unpack = _unpack_compressed_tensors if kind == "weight_packed" else _unpack_awq
                yield f"{module}.weight", unpack(partial(_part, read, module))
            elif kind not in PARTS:
                tensor = read(name)
                problems += _finite_problems(name, tensor, folder)
                yield name, tensor
    if problems:
        raise ModelError(problems)


def _part(read: Callable[[str], torch.Tensor], module: str, part: str) -> torch.Tensor:
    return read(f"{module}.{part}")


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 of any shape → its eight 4-bit values in a new last dimension, lowest first."""
    import torch

    return (words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)) & 15


def _unpack_compressed_tensors(part: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """(out, in/8) int32 with (out, in/group) scales and (out/8, in/group) zero points → (out, in) float32."""
    rows, columns = (int(size) for size in part("weight_shape"))
    values = _nibbles(part("weight_packed")).reshape(rows, -1)[:, :columns].float()
    scale = part("weight_scale").float()
    try:
        zeros = _nibbles(part("weight_zero_point")).transpose(1, 2).reshape(-1, scale.shape[1])[:rows].float()
    except KeyError:  # symmetric: stored as value + 8
        zeros = scale.new_full(scale.shape, 8)
    group = columns // scale.shape[1]
    return (values - zeros.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)


def _unpack_awq(part: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """(in, out/8) int32 with (in/group, out) scales and (in/group, out/8) zero points → (out, in) float32."""
    import torch

    words = part("qweight")
    column = torch.tensor(AWQ_ORDER, device=words.device).argsort()
    values = _nibbles(words)[..., column].flatten(1).float()
    zeros = _nibbles(part("qzeros"))[..., column].flatten(1).float()
    scale = part("scales").float()
    group = values.shape[0] // scale.shape[0]
    return ((values - zeros.repeat_interleave(group, 0)) * scale.repeat_interleave(group, 0)).T.contiguous()


def _scale_problems(name: str, scale: torch.Tensor, folder: Path) -> list[Problem]:
    problems = _finite_problems(name, scale, folder)
    wrong = int((scale <= 0).sum())
    return problems + ([_problem(f"{name}: {wrong} scales aren't positive", folder)] if wrong else [])


def _finite_problems(name: str, tensor: torch.Tensor, folder: Path) -> list[Problem]:
    if not tensor.is_floating_point():
        return []
    wrong = int((~tensor.isfinite()).sum())
    return [_problem(f"{name}: {wrong} of {tensor.numel()} values are NaN or infinite", folder)] if wrong else []


def _problem(defect: str, folder: Path) -> Problem:
    return Problem(defect, file=str(folder), remedy=REQUANTIZE)
