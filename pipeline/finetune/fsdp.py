"""The frozen base split over the processes (FSDP2): each keeps its part of every layer, and a layer is whole while it is used.

The base is read into main memory (mapped from its files, which the processes share) and goes to the GPU layer by layer, where
it is packed into 4 bits and split, so that a card never holds more than its part and one layer. Packed weights travel as
bfloat16: only floating tensors can be split, and bitsandbytes reads the same bits. The adapter is small, stays whole in every
process and is left out: its gradients are summed as they are without a split. Every process must take the same number of
passes, since each gathers layers. Embeddings and the head are split too, and whole from a pass's start to its end.

accelerate's own preparation for FSDP2 would split the adapter and its optimizer state too, and change the checkpoints.
Runs in the train environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ModelError

if TYPE_CHECKING:
    import torch

NF4_BYTES = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # of a weight: 4 bits, and its block's scale in 8 bits with a scale of its own
SCALE_BYTES = 4 / 64  # without double quantization


def layers(model: Any) -> list[Any]:
    """The decoder layers of a transformers model.

    Raises ModelError when it doesn't say which they are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ModelError(
            f"{type(model).__name__} names no layers by which it could be split",
            key="finetune.fsdp_version",
            remedy="leave finetune.fsdp_version out",
        )
    return found


def pack(model: Any, settings: FinetuneConfig, dtype: torch.dtype) -> None:
    """Make every linear layer of the decoder layers one of bitsandbytes, which packs its weight when it is moved."""
    import bitsandbytes
    import torch

    linear = [
        (parent, name, child)
        for layer in layers(model)
        for parent in layer.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
    ]
    for parent, name, child in linear:
        with torch.device("meta"):
            packed = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=dtype,
                                                quant_storage=torch.bfloat16)  # fmt: skip
        packed.weight = bitsandbytes.nn.Params4bit(
            child.weight.data, requires_grad=False, module=packed, quant_storage=torch.bfloat16,
            quant_type=settings.bnb_4bit_quant_type, compress_statistics=settings.bnb_4bit_use_double_quant,
        )  # fmt: skip
        packed.bias = child.bias
        setattr(parent, name, packed)
    model.is_loaded_in_4bit = model.is_quantized = True  # peft asks


def split(adapted: Any, device: str, processes: int) -> None:
    """Split the frozen weights of a peft model over the processes; its trained ones go to this one's device whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (processes,))
    trained = {weight for weight in adapted.parameters() if weight.requires_grad}
    for weight in trained:
        weight.data = weight.data.to(device)
    for layer in layers(adapted.get_base_model()):
        layer.to(device)
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(adapted, mesh=mesh, ignored_params=trained)


@contextmanager
def held_free(model: Any, settings: FinetuneConfig, device: str, processes: int) -> Iterator[None]:
    """Occupy a GPU's memory as the split base will, so that what is found free is what will be left."""
    import torch

    if device != "cuda":
        yield
        return
    held = torch.empty(bytes_a_process(model, settings, processes), dtype=torch.uint8, device=device)
    yield
    del held
    torch.cuda.empty_cache()


def bytes_a_process(model: Any, settings: FinetuneConfig, processes: int) -> int:
    """What a process will hold of the base: its part, two layers while one is used and the next comes, and the rest whole."""
    found = layers(model)
    whole = sum(_bytes(parameter, settings) for layer in found for parameter in layer.parameters())
    rest = sum(parameter.nbytes for parameter in model.parameters()) - sum(
        parameter.nbytes for layer in found for parameter in layer.parameters()
    )
    return int(whole / processes + 2 * whole / len(found) + rest)


def _bytes(parameter: Any, settings: FinetuneConfig) -> float:
    if type(parameter).__name__ != "Params4bit":
        return float(parameter.nbytes)
    return float(parameter.numel() * (NF4_BYTES if settings.bnb_4bit_use_double_quant else 0.5 + SCALE_BYTES))
