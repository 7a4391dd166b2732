"""The memory that fine-tuning takes, in bytes, a line a term; and the tokens that go through the model at once.

`tunegate check` estimates by the same formulas (plan/memory.py). Standard library only, except `free` on a GPU. Weights and
activations are counted in bf16; a device that computes in float32 takes twice as much.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import hardware
from pipeline.finetune import distributed

if TYPE_CHECKING:
    from pipeline.config.schema import FinetuneConfig

CPU_TOKENS_A_PASS = 1024
GPU_TOKENS_A_PASS = range(1024, 16384 + 1)  # fewer leave a GPU idle and unpack NF4 too often; more gain nothing
SHORT_STEP, LONG_STEP, LONG = 256, 1024, 4096
USED_BY_ACTIVATIONS = 0.8  # of free memory
BF16_BYTES = 2
ADAPTER_BYTES = 16  # a parameter, its gradient and two moments, in float32
GATE = frozenset({"gate_proj", "up_proj", "down_proj"})


def free(device: str) -> float:
    """Bytes that the system, or the GPU within this process's share of it, could give now; the least of all processes."""
    if device == "cpu":
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        available = min(int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024, hardware.memory())
        return distributed.least(available / distributed.size(), device)
    import torch

    torch.cuda.empty_cache()
    available, total = torch.cuda.mem_get_info()
    share = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return distributed.least(min(available, share), device)


def step(tokens: int) -> int:
    """A pass of so many tokens that becomes a CUDA graph is padded to the next multiple of this."""
    return SHORT_STEP if tokens <= LONG else LONG_STEP


def passes(
    settings: FinetuneConfig, config: Any, device: str, *, tokens: int, sequence_len: int, free_bytes: float,
    fused_loss: bool = False, has_gates: bool = False,
) -> tuple[bool, int]:  # fmt: skip
    """Whether layers are checkpointed, and how many tokens go through the model at once, for a batch of `tokens`.

    `auto` checkpoints if GPU_TOKENS_A_PASS.start tokens (or a whole row) wouldn't fit without: passing a batch in parts costs
    less than computing every layer twice. The tokens that fit are counted before padding. On a CPU passes are short enough.
    """
    if device == "cpu":
        return settings.gradient_checkpointing is True, min(tokens, max(CPU_TOKENS_A_PASS, sequence_len))
    room = USED_BY_ACTIVATIONS * free_bytes
    least = max(GPU_TOKENS_A_PASS.start, sequence_len)
    fits = int(room / bytes_a_token(config, checkpointing=False, fused_loss=fused_loss, has_gates=has_gates))
    checkpointing = settings.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = fits < min(tokens, least)
    if checkpointing:
        fits = int(room / bytes_a_token(config, checkpointing=True, fused_loss=fused_loss, has_gates=has_gates))
    else:
        fits -= fits % step(fits)
    return checkpointing, min(tokens, max(sequence_len, min(fits, GPU_TOKENS_A_PASS.stop - 1)))


def adapts_gates(settings: FinetuneConfig) -> bool:
    """Whether LoRA goes around all three layers of a gated block."""
    return settings.lora_target_modules is None or set(settings.lora_target_modules) >= GATE


def recomputes_gates(model: Any, settings: FinetuneConfig) -> bool:
    """Whether finetune/fused_lora.py computes the product of this model's gated blocks again instead of keeping it."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return names >= GATE and adapts_gates(settings) and getattr(model.config, "hidden_act", None) == "silu"


def bytes_a_token(config: Any, *, checkpointing: bool, fused_loss: bool = False, has_gates: bool = False) -> int:
    """A token's activations until its backward pass, by a transformers config.

    | kept                | bytes                          |
    |---------------------|--------------------------------|
    | layers              | layers · layer                 |
    | … if checkpointing  | layers · 2 · hidden + layer    |
    | logits              | 12 · vocabulary                |
    | … of a fused loss   | 0                              |

    The logits are kept in bf16 and in float32, and so is their gradient.
    """
    layer = layer_bytes_a_token(config, has_gates=has_gates)
    layers = config.num_hidden_layers
    inside = layers * BF16_BYTES * config.hidden_size + layer if checkpointing else layers * layer
    return int(inside + (0 if fused_loss else 12 * _vocabulary(config)))


def layer_bytes_a_token(config: Any, *, has_gates: bool) -> int:
    """A token's activations in one decoder layer: 2 · (6 · hidden + 2 · keys + 3 · inner).

    - 6 · hidden: the layer's two inputs, the results of both norms, the queries, the attention's result;
    - 2 · keys: keys and values;
    - 3 · inner: the gate, its partner and their product, which isn't kept where a model `has_gates`.
    """
    inner, keys = _inner(config), _keys(config)
    return int(BF16_BYTES * (6 * config.hidden_size + 2 * keys + (2 if has_gates else 3) * inner))


def adapter_bytes(config: Any, settings: FinetuneConfig) -> int:
    """LoRA around every linear layer: ADAPTER_BYTES · r · layers · (9 · hidden + 2 · keys + 3 · inner).

    A pair of rank r around a layer has r · (inputs + outputs) parameters. Inputs and outputs of a decoder layer's seven are:

    - queries and the attention's output: 4 · hidden;
    - keys and values: 2 · (hidden + keys);
    - gate, up and down: 3 · (hidden + inner).
    """
    sides = 9 * config.hidden_size + 2 * _keys(config) + 3 * _inner(config)
    return int(ADAPTER_BYTES * settings.lora_r * config.num_hidden_layers * sides)


def frozen_bytes(config: Any, parameters: int, settings: FinetuneConfig) -> int:
    """The base's weights in one process: decoder layers in 4 or 16 bits, embeddings and output layer in 16.

    Unpacking them once is left out: it is done only where a small part of free memory holds it.
    """
    embeddings = _vocabulary(config) * config.hidden_size * (1 if getattr(config, "tie_word_embeddings", False) else 2)
    rest = BF16_BYTES * embeddings
    whole = (parameters - embeddings) * (packed_bytes(settings) if settings.load_in_4bit else BF16_BYTES)
    if settings.fsdp_version is None:
        return int(whole + rest)
    return split_bytes(whole, rest, config.num_hidden_layers, settings.num_processes)


def packed_bytes(settings: FinetuneConfig) -> float:
    """Bytes of a weight in 4 bits with its block's scale: in 8 bits with a scale of its own, or in float32."""
    return 0.5 + 1 / 64 + 4 / (64 * 256) if settings.bnb_4bit_use_double_quant else 0.5 + 4 / 64


def split_bytes(whole: float, rest: float, layers: int, processes: int) -> int:
    """Bytes a process holds of a split base: its part of the layers, two whole layers (one in use, one coming), and the rest."""
    return int(whole / processes + 2 * whole / layers + rest)


def smaller(settings: FinetuneConfig) -> str:
    """The settings to change when memory doesn't suffice; the effective batch stays as it is."""
    also = "" if settings.gradient_checkpointing is True else ", or set finetune.gradient_checkpointing: true"
    if settings.fsdp_version is None:
        more = "" if settings.num_processes > 1 else "more finetune.num_processes and "
        also += f", or, with several GPUs, set {more}finetune.fsdp_version: 2 (the base is split over them)"
    if settings.micro_batch_size == 1:
        return "lower data.sequence_len" + also
    batch = settings.micro_batch_size * settings.gradient_accumulation_steps
    micro = max(size for size in range(1, settings.micro_batch_size // 2 + 1) if batch % size == 0)
    return (
        f"set finetune.micro_batch_size: {micro} and finetune.gradient_accumulation_steps:"
        f" {batch // micro} (the same effective batch){also}"
    )


def _inner(config: Any) -> int:
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


def _keys(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", 1)
    return int(config.hidden_size * (getattr(config, "num_key_value_heads", None) or heads) // heads)


def _vocabulary(config: Any) -> int:
    return int(getattr(config, "vocab_size", 0))
