"""How many tokens go through the model at once: what is free, and what a token's activations take until its backward pass.

Runs in the train environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import hardware
from pipeline.config.schema import FinetuneConfig
from pipeline.finetune import distributed

CPU_TOKENS_A_PASS = 1024
GPU_TOKENS_A_PASS = range(1024, 16384 + 1)  # fewer leave a GPU idle and unpack NF4 too often; more gain nothing
SHORT_STEP, LONG_STEP, LONG = 256, 1024, 4096
USED_BY_ACTIVATIONS = 0.8  # of free memory


def free(device: str) -> float:
    """Bytes that the system, or the GPU within this process's share of it, could give now; of several processes, the least."""
    if device == "cpu":
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        there = min(int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024, hardware.memory())
        return distributed.least(there / distributed.size(), device)
    import torch

    torch.cuda.empty_cache()
    there, total = torch.cuda.mem_get_info()
    share = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return distributed.least(min(there, share), device)


def step(tokens: int) -> int:
    """A pass of so many tokens that becomes a CUDA graph is padded to the next multiple of this."""
    return SHORT_STEP if tokens <= LONG else LONG_STEP


def passes(
    settings: FinetuneConfig, config: Any, device: str, tokens: int, sequence_len: int, *, fused_loss: bool = False,
    gated: bool = False,
) -> tuple[bool, int]:  # fmt: skip
    """Whether layers are checkpointed, and how many tokens go through the model at once, for a batch of `tokens`.

    `auto` checkpoints only when GPU_TOKENS_A_PASS.start tokens (or a whole row) wouldn't fit without: passing a batch
    in parts costs less than computing every layer twice; what fits is taken before padding. On a CPU passes are short
    enough.
    """
    if device == "cpu":
        return settings.gradient_checkpointing is True, min(tokens, max(CPU_TOKENS_A_PASS, sequence_len))
    room = USED_BY_ACTIVATIONS * free(device)
    least = max(GPU_TOKENS_A_PASS.start, sequence_len)
    kept = int(room / bytes_a_token(config, checkpointed=False, fused_loss=fused_loss, gated=gated))
    checkpointed = settings.gradient_checkpointing
    if checkpointed == "auto":
        checkpointed = kept < min(tokens, least)
    again = bytes_a_token(config, checkpointed=True, fused_loss=fused_loss, gated=gated)
    fits = int(room / again) if checkpointed else kept - kept % step(kept)
    return checkpointed, min(tokens, max(sequence_len, min(fits, GPU_TOKENS_A_PASS.stop - 1)))


def is_gated(model: Any, settings: FinetuneConfig) -> bool:
    """Whether finetune_lora computes the product in this model's gated blocks again instead of keeping it."""
    parts = {"gate_proj", "up_proj", "down_proj"}
    there = parts <= {name.rpartition(".")[2] for name, _ in model.named_modules()}
    adapted = settings.lora_target_modules is None or parts <= set(settings.lora_target_modules)
    return there and adapted and getattr(model.config, "hidden_act", None) == "silu"


def bytes_a_token(config: Any, *, checkpointed: bool, fused_loss: bool = False, gated: bool = False) -> int:
    """Memory that a token's activations take until its backward pass, in bytes.

    A layer keeps, in bf16: six rows as wide as the model (its two inputs, the norms' results, queries, the attention's
    result), keys and values, and of the inner width the gate, its partner and their product, which isn't kept where a
    block is `gated`. The logits: bf16, float32 and its gradient; a fused loss has none.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = getattr(config, "num_attention_heads", 1)
    keys = config.hidden_size * (getattr(config, "num_key_value_heads", None) or heads) // heads
    layer = 2 * (6 * config.hidden_size + 2 * keys + (2 if gated else 3) * inner)
    kept = (
        2 * config.hidden_size * config.num_hidden_layers + layer if checkpointed else layer * config.num_hidden_layers
    )
    return int(kept + (0 if fused_loss else 12 * config.vocab_size))
