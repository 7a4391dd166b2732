"""The adapter into its base: W + scaling * B A for each adapted layer, computed in float32, written in bf16.

Goes tensor by tensor over the base's files, so that memory holds one base tensor and the adapter. The base
is the original one or, for `merge_base: dequantized`, what training saw: every linear layer that NF4
training kept in 4 bits, quantized and dequantized again. Plain LoRA only; tokenizer and template are copied
byte for byte.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import checkpoint, model_checks, program, weights
from pipeline.artifacts import Artifact
from pipeline.errors import ConfigError, ModelError, Problem

if TYPE_CHECKING:
    import torch

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
BLOCKSIZE = 64  # of bitsandbytes' 4-bit layers, which training uses as they come
REMEDY = "run the same command again; if the base changed, fine-tuning runs again with it"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter found whole: its file, its factor, and its pairs of tensors (A, B) by base tensor."""

    file: Path
    scaling: float
    pairs: dict[str, tuple[str, str]]


@dataclass
class Tally:
    """What merging changed: the largest change, sums of squares, and how many bf16 values moved."""

    largest: float = 0.0
    squares: float = 0.0
    base_squares: float = 0.0
    moved: int = 0
    values: int = 0
    unmoved: list[str] = field(default_factory=list)

    def add(self, name: str, base: torch.Tensor, merged: torch.Tensor) -> None:
        """Count one layer; both in the dtype that is written."""
        change = merged.float() - base.float()
        moved = int((change != 0).sum())
        self.largest = max(self.largest, float(change.abs().max()))
        self.squares += float(change.square().sum())
        self.base_squares += float(base.float().square().sum())
        self.moved += moved
        self.values += change.numel()
        self.unmoved += [] if moved else [name]


def run(request: program.Request) -> dict[str, Any]:
    """The stage: merge the adapter `finetune` into the model `base`.

    Raises ModelError when the adapter belongs to another base, fits no layer, changes nothing or isn't
    finite; ConfigError when `dequantized` is asked for after training without 4 bits.
    """
    base, finetune = Artifact(**request.inputs["base"]), Artifact(**request.inputs["finetune"])
    merge_base = request.config["merge"]["merge_base"]
    _check_parent(base, finetune)
    quantized = _Nf4(base.payload, request.config["finetune"]) if merge_base == "dequantized" else None
    shutil.rmtree(request.folder / "payload", ignore_errors=True)  # what a killed run left
    folder = request.payload
    for path in sorted(base.payload.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors" and path.name != weights.INDEX:
            target = folder / path.relative_to(base.payload)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shapes = {name: tensor.shape for name, tensor in weights.tensors(base.payload).items()}
    adapter = read_adapter(finetune.payload, shapes)
    tally = _merge(base.payload, shapes, adapter, quantized, folder)
    return {
        "merge_base": merge_base,
        "layers": len(adapter.pairs),
        "scaling": adapter.scaling,
        "max_abs_delta": tally.largest,
        "relative_delta": (tally.squares / tally.base_squares) ** 0.5,
        "moved_share": tally.moved / tally.values,
        "unmoved_layers": tally.unmoved,
        **{
            key: base.detail[key]
            for key in (
                "architecture",
                "parameters",
                "hidden_size",
                "eos_token",
                "eos_token_id",
                "pad_token",
                "licence",
                "quantized_from",
            )
            if key in base.detail
        },
    }


def read_adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Adapter:
    """The adapter in `folder`, its every tensor matched with a tensor of the base (`shapes`, by name).

    Raises ModelError with everything that keeps it from being merged.
    """
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config = model_checks.read_object(config_file)
    if config is None or not file.is_file():
        raise ModelError(
            "there is no adapter",
            file=str(folder),
            allowed=f"{file.name} and {config_file.name}",
            remedy=REMEDY,
        )
    try:
        found = weights.read_header(file)
    except weights.BadHeader as error:
        raise ModelError(str(error), file=str(file), remedy=REMEDY) from error
    problems = [
        Problem(
            f"{config[key]!r} can't be merged here",
            file=str(config_file),
            key=key,
            allowed=repr(allowed[0]),
            remedy="fine-tune with plain LoRA",
        )
        for key, allowed in PLAIN.items()
        if key in config and config[key] not in allowed
    ]
    pairs, strays = _pairs(found, shapes)
    problems += [
        Problem(
            "fits no layer of the base: it would not be applied",
            file=str(file),
            key=name,
            remedy="fine-tune on this base",
        )
        for name in strays
    ]
    if not pairs and not strays:
        problems.append(Problem("holds no layer: nothing would be applied", file=str(file), remedy="fine-tune again"))
    if problems:
        raise ModelError(problems)
    rank = float(config["r"])
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter(file, scaling, pairs)


def _pairs(
    found: dict[str, weights.Tensor], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Base tensor -> (A, B) for all that fit, and the names of all that don't."""
    pairs: dict[str, tuple[str, str]] = {}
    for name, tensor in found.items():
        module, _, end = name.removeprefix(PREFIX).partition(".lora_A.")
        other = name.replace(".lora_A.", ".lora_B.")
        target = f"{module}.weight"
        if not name.startswith(PREFIX) or end != "weight" or other not in found or target not in shapes:
            continue
        rows, columns = (*shapes[target], 0)[:2]
        rank = tensor.shape[0]
        if tensor.shape == (rank, columns) and found[other].shape == (rows, rank):
            pairs[target] = (name, other)
    used = {name for pair in pairs.values() for name in pair}
    return pairs, weights.in_order(dict.fromkeys(found.keys() - used, ()))


def _merge(
    base: Path, shapes: dict[str, tuple[int, ...]], adapter: Adapter, quantized: _Nf4 | None, folder: Path
) -> Tally:
    import torch
    from safetensors import safe_open

    tally = Tally()
    with weights.Reader(base) as read, safe_open(adapter.file, framework="pt") as lora:

        def merged(name: str) -> torch.Tensor:
            value = read(name)
            if quantized is not None:
                value = quantized(name, value)
            if name not in adapter.pairs:
                return value
            a, b = (lora.get_tensor(part).to(torch.float32) for part in adapter.pairs[name])
            result = (value.to(torch.float32) + adapter.scaling * (b @ a)).to(torch.bfloat16)
            tally.add(name, value, result)
            return result

        weights.write(folder, shapes, merged, lambda done, total: program.progress(done >> 20, total >> 20, "MiB"))
    if tally.moved == 0:
        raise ModelError(
            "the adapter changes no weight: it is untrained, or too small for bf16",
            file=str(adapter.file), remedy="train for longer, or at a higher learning_rate",
        )  # fmt: skip
    return tally


class _Nf4:
    """Quantizes and dequantizes the linear layers that training held in 4 bits, with training's own settings.

    On a GPU where there is one: both sides of the arithmetic then run where training ran.
    """

    def __init__(self, base: Path, finetune: dict[str, Any]) -> None:
        import torch

        if not finetune["load_in_4bit"]:
            raise ConfigError(
                "dequantized merges into what 4-bit training saw, and load_in_4bit is false",
                key="merge.merge_base",
                allowed="original",
                remedy="set merge_base: original, or train with adapter: qlora",
            )
        self._kind, self._nested = finetune["bnb_4bit_quant_type"], finetune["bnb_4bit_use_double_quant"]
        self._names = _linear_layers(base)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The weight of that name as training saw it; untouched where training left it in bf16."""
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if name not in self._names:
            return value
        packed, state = quantize_4bit(
            value.to(self._device, torch.bfloat16),
            blocksize=BLOCKSIZE,
            quant_type=self._kind,
            compress_statistics=self._nested,
        )
        return dequantize_4bit(packed, state).to("cpu", torch.bfloat16).reshape(value.shape)


def _linear_layers(base: Path) -> set[str]:
    """The weights that transformers hands to bitsandbytes: linear layers, but not the head."""
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert

    model = checkpoint.skeleton(base)
    left = set(get_keys_to_not_convert(model))
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in left
    }


def _check_parent(base: Artifact, finetune: Artifact) -> None:
    trained_on = finetune.parents.get("base")
    if trained_on != base.digest:
        raise ModelError(
            f"the adapter was trained on base {str(trained_on)[:12]}, and this one is {base.digest[:12]}",
            file=str(finetune.path), remedy=REMEDY,
        )  # fmt: skip


if __name__ == "__main__":
    program.main(run)
