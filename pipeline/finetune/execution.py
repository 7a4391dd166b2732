"""How a training run is run on this machine: chosen once before the first step, and kept in hardware.json.

`choose` is pure: the settings, the base's shape and the machine's figures go in, an Execution comes out. `model.apply` follows it.
No choice changes the effective batch. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.finetune import attention, fused_loss, memory
from pipeline.finetune.objectives import OBJECTIVES
from pipeline.hardware import GPU_OPTIMIZERS

if TYPE_CHECKING:
    from pipeline.config.schema import FinetuneConfig

UNPACK_UP_TO = {"cpu": 0.5, "cuda": 0.05}  # of free memory; a big model hides the unpacking behind its products
UNPACKED = ", unpacked once"
UNKNOWN_FREE = 2.0**62  # a device that doesn't tell its memory is short of nothing
ONE_GATE_LAYER = {"phi3"}  # gate and up are one layer, and no block's product is computed again


@dataclass(frozen=True)
class Execution:
    """How a run is run, for hardware.json and the artefact's detail. No field changes the effective batch."""

    device: str
    name: str
    dtype: str
    threads: int
    attention: str
    shares_prefixes: bool
    kernels: str
    fused_loss: bool
    cuda_graphs: bool
    frozen_weights: str
    gradient_checkpointing: bool
    tokens_a_pass: int
    processes: int = 1
    split: bool = False


@dataclass(frozen=True)
class Machine:
    """The device of this process: its kind (cpu or cuda), the dtype that it multiplies fast, its processes."""

    device: str
    name: str
    dtype: str
    threads: int
    processes: int = 1


@dataclass(frozen=True)
class Base:
    """The base model as far as choices look at it, by its transformers config and its layers.

    `has_plain_head`: its logits are one product of its output layer. `has_gates`: see `memory.recomputes_gates`.
    """

    config: Any
    attention: str
    has_plain_head: bool
    has_gates: bool
    is_known_to_liger: bool


def raise_for_gpu_optimizer(settings: FinetuneConfig, device: str) -> None:
    """Raise ConfigError for an optimizer that runs on a GPU only, without one."""
    if device == "cpu" and settings.optimizer in GPU_OPTIMIZERS:
        raise ConfigError(
            f"{settings.optimizer} must run on a GPU, and this machine shows none",
            key="finetune.optimizer",
            allowed="adamw_torch or adamw_torch_fused",
            remedy="set finetune.optimizer: adamw_torch",
        )


def frozen_weights(
    settings: FinetuneConfig, machine: Machine, packed_count: int, free_bytes: float, before: Execution | None = None
) -> str:
    """How the frozen weights are kept; `packed_count` of them are in 4 bits, and a small model's are unpacked once.

    A run that goes on keeps them as it did `before`.
    """
    if not settings.load_in_4bit:
        return "bf16" if machine.dtype == "bfloat16" else "float32"
    if settings.fsdp_version is not None:
        return settings.bnb_4bit_quant_type
    limit = UNPACK_UP_TO[machine.device] * free_bytes
    if before is not None:
        limit = math.inf if before.frozen_weights.endswith(UNPACKED) else 0.0
    return settings.bnb_4bit_quant_type + (UNPACKED if memory.BF16_BYTES * packed_count <= limit else "")


def choose(
    settings: FinetuneConfig, base: Base, machine: Machine, weights: str, *, sequence_len: int, free_bytes: float,
    before: Execution | None = None,
) -> Execution:  # fmt: skip
    """The execution of a run: `weights` as `frozen_weights` has them, `free_bytes` beside them.

    A run that goes on under other memory keeps the choices that memory made `before`: how a batch is cut shows in the last bits
    of a sum.
    """
    is_gpu, split = machine.device == "cuda", settings.fsdp_version is not None
    rows_attention = _rows_attention(base, machine, sequence_len)
    fuses = fuses_loss(settings, machine.device) and base.has_plain_head
    checkpointing, tokens_a_pass = (
        (before.gradient_checkpointing, before.tokens_a_pass)
        if before is not None
        else memory.passes(
            settings, base.config, machine.device, tokens=settings.micro_batch_size * sequence_len,
            sequence_len=sequence_len, free_bytes=free_bytes, fused_loss=fuses, has_gates=base.has_gates,
        )
    )  # fmt: skip
    fits_graphs = rows_attention == attention.CUDA and fuses and not checkpointing
    return Execution(
        device=machine.device,
        name=machine.name,
        dtype=machine.dtype,
        threads=machine.threads,
        attention=rows_attention or base.attention,
        shares_prefixes=rows_attention == attention.CPU,
        kernels=("liger" if is_gpu and base.is_known_to_liger else "torch") + (", fused LoRA" if is_gpu else ""),
        fused_loss=fuses,
        cuda_graphs=fits_graphs and not rotates_by_length(base.config),
        frozen_weights=weights,
        gradient_checkpointing=checkpointing,
        tokens_a_pass=tokens_a_pass,
        processes=machine.processes,
        split=split,
    )


def fuses_loss(settings: FinetuneConfig, device: str) -> bool:
    """Whether the loss is computed from hidden states where the base's output layer is plain.

    Not on a CPU, for a split base or an adapted output layer, nor for an objective with another loss.
    """
    is_ours = settings.fsdp_version is None and "lm_head" not in (settings.lora_target_modules or ())
    return device == "cuda" and is_ours and OBJECTIVES[settings.objective].is_cross_entropy


def estimate(settings: Any, config: Any, parameters: int, *, kind: str, device_memory: int, sequence_len: int) -> int:
    """Bytes that a training process takes at its peak: weights + adapter + tokens a pass · bytes a token.

    `choose` decides the pass, as it does when training starts, with all of the device free. `settings` has FinetuneConfig's
    attributes, `config` those of the base's config.json. A device_memory of 0 is unknown: it is short of nothing.
    """
    weights = memory.frozen_bytes(config, parameters, settings) + memory.adapter_bytes(config, settings)
    architecture = getattr(config, "model_type", "")
    is_gated = architecture in fused_loss.PLAIN - ONE_GATE_LAYER and getattr(config, "hidden_act", "silu") == "silu"
    base = Base(
        config, attention="", has_plain_head=architecture in fused_loss.PLAIN,
        has_gates=kind == "cuda" and is_gated and memory.adapts_gates(settings), is_known_to_liger=False,
    )  # fmt: skip
    machine = Machine(kind, "", "bfloat16", 1, settings.num_processes)
    free_bytes = max(0.0, device_memory - weights) if device_memory else UNKNOWN_FREE
    execution = choose(settings, base, machine, "", sequence_len=sequence_len, free_bytes=free_bytes)
    activations = execution.tokens_a_pass * memory.bytes_a_token(
        config,
        checkpointing=execution.gradient_checkpointing,
        fused_loss=execution.fused_loss,
        has_gates=base.has_gates,
    )
    return weights + activations


def rotates_by_length(config: Any) -> bool:
    """Whether rotary frequencies depend on a pass's length: Python looks at it, so no CUDA graph can hold it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _rows_attention(base: Base, machine: Machine, sequence_len: int) -> str | None:
    """Attention of packed rows, or None to leave the base its own; the flash kernel takes 16 bits only."""
    if machine.device == "cuda" and machine.dtype != "bfloat16":
        return None
    return attention.choose(base.config, machine.device, sequence_len)
