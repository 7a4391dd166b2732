"""The weights of a merged model: W + scaling · B A for each layer with an adapter, computed in float32, returned in bf16.

Tensor by tensor: memory holds one of the base's, and the adapter. W is the base's own or, by `Nf4`, training's: every linear layer
that training held in 4 bits, quantized and dequantized again. Plain LoRA only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ConfigError, ModelError, Problem
from pipeline.model import checkpoint, checks, weights

if TYPE_CHECKING:
    import torch

Way = Literal["original", "dequantized"]
Pair = Callable[[str], "tuple[torch.Tensor, torch.Tensor]"]
PREFIX = "base_model.model."
# Settings of an adapter that change its arithmetic; each must be absent or empty.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
}
BLOCKSIZE = 64  # the default of bitsandbytes' 4-bit layers, which training uses
REMEDY = "run the same command again; if the base changed, fine-tuning runs again with it"


@dataclass(frozen=True)
class Adapter:
    """A whole LoRA adapter: its file, its factor, and its pairs of tensors (A, B) by base tensor."""

    file: Path
    scaling: float
    pairs: dict[str, tuple[str, str]]


def read_adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Adapter:
    """The adapter in `folder`, its every tensor matched with a tensor of the base (`shapes`, by name).

    Raises ModelError with every reason against merging it.
    """
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config = checks.read_object(config_file)
    if config is None or not file.is_file():
        raise ModelError(
            "the adapter is missing",
            file=str(folder),
            allowed=f"{file.name} and {config_file.name}",
            remedy=REMEDY,
        )
    try:
        header = weights.read_header(file)
    except weights.BadHeader as error:
        raise ModelError(str(error), file=str(file), remedy=REMEDY) from error
    problems = [
        Problem(
            f"{config[key]!r} can't be merged here",
            file=str(config_file),
            key=key,
            allowed=repr(choices[0]),
            remedy="fine-tune with plain LoRA (finetune.adapter: qlora or lora)",
        )
        for key, choices in PLAIN.items()
        if key in config and config[key] not in choices
    ]
    pairs, strays = _pairs(header, shapes)
    problems += [
        Problem(
            "fits no layer of the base: it would not be applied",
            file=str(file),
            key=name,
            remedy="fine-tune on this base: run the same command again",
        )
        for name in strays
    ]
    if not pairs and not strays:
        problems.append(Problem("the adapter is empty: nothing would be applied", file=str(file), remedy=REMEDY))
    if problems:
        raise ModelError(problems)
    rank = float(config["r"])
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter(file, scaling, pairs)


def _pairs(
    header: dict[str, weights.Tensor], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Base tensor -> (A, B) for all that fit, and the names of all that don't."""
    pairs: dict[str, tuple[str, str]] = {}
    for name, tensor in header.items():
        module, _, end = name.removeprefix(PREFIX).partition(".lora_A.")
        partner = name.replace(".lora_A.", ".lora_B.")
        target = f"{module}.weight"
        if not name.startswith(PREFIX) or end != "weight" or partner not in header or target not in shapes:
            continue
        rows, columns = (*shapes[target], 0)[:2]
        rank = tensor.shape[0]
        if tensor.shape == (rank, columns) and header[partner].shape == (rows, rank):
            pairs[target] = (name, partner)
    matches = {name for pair in pairs.values() for name in pair}
    return pairs, weights.in_order(dict.fromkeys(header.keys() - matches, ()))


@contextmanager
def merging(base: Path, adapter: Adapter, nf4: Nf4 | None) -> Iterator[Pair]:
    """Yield a function of a tensor's name: the base's tensor (by `nf4` where given), and the same with the adapter in it.

    Tensors with an adapter lie on the GPU where there is one.
    """
    import torch
    from safetensors import safe_open

    device = _device()
    with weights.Reader(base) as read, safe_open(adapter.file, framework="pt") as lora:

        def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            weight = read(name) if nf4 is None else nf4(name, read(name))
            if name not in adapter.pairs:
                return weight, weight
            weight = weight.to(device)
            a, b = (lora.get_tensor(part).to(device, torch.float32) for part in adapter.pairs[name])
            return weight, (weight.to(torch.float32) + adapter.scaling * (b @ a)).to(torch.bfloat16)

        yield pair


def fill(model: Any, base: Path, adapter: Adapter, nf4: Nf4 | None) -> None:
    """Overwrite a plain model's weights, on any device, with the merged model's: no folder is written."""
    import torch

    with torch.no_grad(), merging(base, adapter, nf4) as pair:
        for name, parameter in model.named_parameters():
            parameter.copy_(pair(name)[1])


class Nf4:
    """Quantizes and dequantizes the linear layers that training held in 4 bits, with training's own settings.

    It runs on the GPU where there is one, as training did.
    """

    def __init__(self, base: Path, settings: FinetuneConfig) -> None:
        if not settings.load_in_4bit:
            raise ConfigError(
                "dequantized merges into the base in 4 bits, and training saw it in 16 (load_in_4bit: false)",
                key="merge.merge_base",
                allowed="original",
                remedy="set merge.merge_base: original, or finetune.adapter: qlora",
            )
        self._kind, self._nested = settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant
        self._names = _linear_layers(base)
        self._device = _device()

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of that name as training saw it; the same where training left it in bf16."""
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if name not in self._names:
            return weight
        bits, state = quantize_4bit(
            weight.to(self._device, torch.bfloat16),
            blocksize=BLOCKSIZE,
            quant_type=self._kind,
            compress_statistics=self._nested,
        )
        return dequantize_4bit(bits, state).to(torch.bfloat16).reshape(weight.shape)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _linear_layers(base: Path) -> set[str]:
    """The weights that transformers hands to bitsandbytes: linear layers except the output layer."""
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert

    model = checkpoint.skeleton(base)
    sixteen_bit = set(get_keys_to_not_convert(model))
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in sixteen_bit
    }
