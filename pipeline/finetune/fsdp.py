"""The frozen base split over the processes (FSDP2): each keeps its part of every layer, and a layer is whole while it is used.

- The base is read into main memory, mapped from its files, which the processes share. It goes to the GPU layer by layer, where it
  is packed into 4 bits and split: a card never holds more than its part and one layer.
- Packed weights travel as bfloat16: only floating tensors can be split, and bitsandbytes reads the same bits.
- The adapter stays whole in every process: its gradients are summed as they are without a split.
- Every process must take the same number of passes, since each gathers layers.
- Embeddings and the output layer are split too, and whole from a pass's start to its end.

accelerate's own preparation for FSDP2 would split the adapter and its optimizer state too, and change the checkpoints.
Runs in the train environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ModelError
from pipeline.finetune import memory

if TYPE_CHECKING:
    import torch


def layers(model: Any) -> list[Any]:
    """The decoder layers of a transformers model; raises ModelError where it doesn't name their class."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    decoder = [module for module in model.modules() if type(module).__name__ in names]
    if not decoder:
        raise ModelError(
            f"{type(model).__name__} doesn't name the layers to split",
            key="finetune.fsdp_version",
            remedy="leave finetune.fsdp_version out",
        )
    return decoder


def pack(model: Any, settings: FinetuneConfig, dtype: torch.dtype) -> None:
    """Replace every linear layer of the decoder layers by bitsandbytes', which packs its weight when it is moved."""
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
            layer = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=dtype,
                                               quant_storage=torch.bfloat16)  # fmt: skip
        layer.weight = bitsandbytes.nn.Params4bit(
            child.weight.data, requires_grad=False, module=layer, quant_storage=torch.bfloat16,
            quant_type=settings.bnb_4bit_quant_type, compress_statistics=settings.bnb_4bit_use_double_quant,
        )  # fmt: skip
        layer.bias = child.bias
        setattr(parent, name, layer)
    model.is_loaded_in_4bit = model.is_quantized = True  # peft asks


def split(lora_model: Any, device: str, processes: int) -> None:
    """Split the frozen weights of a peft model over the processes; its adapter goes to this one's device whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (processes,))
    adapter = {weight for weight in lora_model.parameters() if weight.requires_grad}
    for weight in adapter:
        weight.data = weight.data.to(device)
    for layer in layers(lora_model.get_base_model()):
        layer.to(device)
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    fully_shard(lora_model, mesh=mesh, ignored_params=adapter)


@contextmanager
def reserved(model: Any, settings: FinetuneConfig, device: str, processes: int) -> Iterator[None]:
    """Occupy a GPU's memory as the split base will: the memory that is free meanwhile will be free beside it."""
    import torch

    if device != "cuda":
        yield
        return
    filler = torch.empty(bytes_a_process(model, settings, processes), dtype=torch.uint8, device=device)
    yield
    del filler
    torch.cuda.empty_cache()


def bytes_a_process(model: Any, settings: FinetuneConfig, processes: int) -> int:
    """Bytes that a process will hold of the base, as `memory.split_bytes` has it."""
    decoder = layers(model)
    whole = sum(_bytes(parameter, settings) for layer in decoder for parameter in layer.parameters())
    rest = sum(parameter.nbytes for parameter in model.parameters()) - sum(
        parameter.nbytes for layer in decoder for parameter in layer.parameters()
    )
    return memory.split_bytes(whole, rest, len(decoder), processes)


def _bytes(parameter: Any, settings: FinetuneConfig) -> float:
    if type(parameter).__name__ != "Params4bit":
        return float(parameter.nbytes)
    return float(parameter.numel() * memory.packed_bytes(settings))
