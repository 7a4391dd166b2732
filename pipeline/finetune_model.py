"""The model that is trained: the base in NF4, frozen, with LoRA layers in float32 around its linear ones.

Where memory allows, the frozen NF4 weights are unpacked once: training sees the same values as if each pass unpacked
them again, for 2 bytes a parameter. On a GPU, Liger's kernels and the fused LoRA layers of finetune_lora keep little for
the backward pass, so that short passes without checkpointing fit where a whole batch wouldn't. Runs in the train
environment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import (
    compute_dtype,
    finetune_attention,
    finetune_distributed,
    finetune_head,
    finetune_lora,
    finetune_memory,
    finetune_shards,
)
from pipeline.config import FinetuneConfig
from pipeline.errors import ConfigError, ModelError
from pipeline.hardware import GPU_OPTIMIZERS

if TYPE_CHECKING:
    import torch

UNPACKED_BYTES = 2
UNPACK_UP_TO = {"cpu": 0.5, "cuda": 0.05}  # of free memory; a big model hides the unpacking behind its products
UNPACKED = ", unpacked once"
LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


@dataclass(frozen=True)
class Hardware:
    """What was chosen for this machine, for the artefact's detail. None of it changes the effective batch."""

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


def load(
    base: Path, settings: FinetuneConfig, sequence_len: int, before: Hardware | None = None
) -> tuple[Any, Hardware]:
    """The base model of a Hugging Face folder, frozen, and how it will be run.

    What free memory decides is taken from `before`, where a run that began under other memory is gone on with: how a batch
    is cut, and how weights are kept, show in the last bits of a sum.

    Raises ModelError when transformers can't load the folder, ConfigError for a setting that needs a GPU.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and settings.optimizer in GPU_OPTIMIZERS:
        raise ConfigError(
            f"{settings.optimizer} needs a GPU and there is none",
            key="finetune.optimizer",
            allowed="adamw_torch or adamw_torch_fused",
            remedy="set finetune.optimizer: adamw_torch",
        )
    dtype = compute_dtype.of_device(device)
    split, processes = settings.fsdp_version is not None, finetune_distributed.size()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, quantization_config=None if split else four_bit(settings, dtype), local_files_only=True,
            trust_remote_code=False, use_safetensors=True,
            device_map={"": torch.cuda.current_device()} if device == "cuda" and not split else None,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the base model can't be loaded for training: {error}",
            file=str(base),
            remedy="take a causal language model that this transformers version knows",
        ) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    weights = _weights(model, settings, dtype, device, before)
    finetune_attention.register()
    fits = device == "cpu" or dtype == torch.bfloat16  # the flash kernel knows 16 bits alone
    attention = finetune_attention.choose(model.config, device, sequence_len) if fits else None
    if attention:
        model.set_attn_implementation(attention)
    liger = device == "cuda" and _use_liger(model)
    head_is_ours = device == "cuda" and not split and "lm_head" not in (settings.lora_target_modules or ())
    fused_loss = head_is_ours and finetune_head.take_over(model)
    tokens = settings.micro_batch_size * sequence_len
    with finetune_shards.held_free(model, settings, device, processes) if split else nullcontext():
        checkpointing, tokens_a_pass = (
            (before.gradient_checkpointing, before.tokens_a_pass)
            if before is not None
            else finetune_memory.passes(
                settings,
                model.config,
                device,
                tokens,
                sequence_len,
                fused_loss=fused_loss,
                gated=finetune_memory.is_gated(model, settings),
            )
        )
    hardware = Hardware(
        device=device,
        name=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        attention=attention or model.config._attn_implementation,  # noqa: SLF001 - transformers' own place for it
        shares_prefixes=attention == finetune_attention.CPU,
        kernels=("liger" if liger else "torch") + (", fused LoRA" if device == "cuda" else ""),
        fused_loss=fused_loss,
        cuda_graphs=attention == finetune_attention.CUDA
        and fused_loss
        and not checkpointing
        and not rotates_by_length(model.config),
        frozen_weights=weights,
        gradient_checkpointing=checkpointing,
        tokens_a_pass=tokens_a_pass,
        processes=processes,
        split=split,
    )
    return model, hardware


def rotates_by_length(config: Any) -> bool:
    """Whether rotary frequencies depend on how long a pass is: Python looks at it, so that no CUDA graph can hold it."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(part for part in found.values() if isinstance(part, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _weights(model: Any, settings: FinetuneConfig, dtype: torch.dtype, device: str, before: Hardware | None) -> str:
    """How the frozen weights are kept; a small model's 4-bit ones are unpacked."""
    import torch

    if not settings.load_in_4bit:
        return "bf16" if dtype == torch.bfloat16 else "float32"
    if settings.fsdp_version is not None:
        finetune_shards.pack(model, settings, dtype)
        return settings.bnb_4bit_quant_type
    most = UNPACK_UP_TO[device] * finetune_memory.free(device)
    if before is not None:
        most = math.inf if before.frozen_weights.endswith(UNPACKED) else 0.0
    return settings.bnb_4bit_quant_type + (UNPACKED if unpack(model, dtype, most) else "")


def four_bit(settings: FinetuneConfig, dtype: torch.dtype) -> Any:
    """How transformers is to quantize the base, or None for plain LoRA."""
    if not settings.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def unpack(model: Any, dtype: torch.dtype, most: float = math.inf) -> bool:
    """Replace each 4-bit layer by a plain one of its dequantized values; False if that takes over `most` bytes."""
    import bitsandbytes
    import torch

    packed = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, bitsandbytes.nn.Linear4bit)
    ]
    if UNPACKED_BYTES * sum(child.in_features * child.out_features for _, _, child in packed) > most:
        return False
    for parent, name, child in packed:
        plain = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(finetune_lora.weight_of(child, dtype), requires_grad=False)
        plain.bias = child.bias
        setattr(parent, name, plain)
    # peft asks the model whether its layers are packed
    model.is_loaded_in_4bit = model.is_quantized = False
    return True


def _use_liger(model: Any) -> bool:
    """Give the model Liger's norms, rotary embedding and SwiGLU; False where Liger doesn't know its architecture."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    apply_liger_kernel(model, LIGER)
    return True


def with_lora(model: Any, settings: FinetuneConfig, hardware: Hardware, base_digest: str, seed: int) -> Any:
    """The model with LoRA layers, in training mode.

    Raises ConfigError when lora_target_modules names no layer of the model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    everything = "all-linear" if settings.lora_target_linear else None
    targets = list(settings.lora_target_modules or ()) or everything
    if "lm_head" in (settings.lora_target_modules or ()) and model.config.tie_word_embeddings:
        raise ConfigError(
            "this base's output layer is its embedding, and no merged model could have one without the other",
            key="finetune.lora_target_modules",
            allowed=", ".join(name for name in _linear_names(model) if name != "lm_head"),
            remedy="take lm_head out of it",
        )
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
                target_modules=targets, bias="none", task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(
            f"LoRA finds no layer to adapt: {error}",
            key="finetune.lora_target_modules",
            allowed=", ".join(_linear_names(model)),
            remedy="leave it out to adapt every linear layer",
        ) from error
    # The folder that the base lies in is this machine's; its digest is the same everywhere.
    adapted.peft_config["default"].base_model_name_or_path = f"sha256:{base_digest}"
    if hardware.device == "cpu":
        _quicken_dropout(adapted)
    else:
        finetune_lora.fuse(adapted, hardware.device)
    if hardware.gradient_checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.enable_input_require_grads()
    adapted.train()
    return adapted


def _linear_names(model: Any) -> list[str]:
    """What lora_target_modules may name."""
    import torch

    layers = (name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    return sorted({name.rpartition(".")[2] for name in layers})


def _quicken_dropout(model: Any) -> None:
    """Replace torch's dropout, which draws a whole random number for each element, one after another.

    Here four elements share 64 random bits: the probability is kept to 2^-16, and it takes less than half the
    time (dropout was a third of a CPU step before).
    """
    import torch

    class Dropout(torch.nn.Module):  # type: ignore[misc] # torch is Any where types are checked
        def __init__(self, p: float) -> None:
            super().__init__()
            self.dropped = round(p * 2**16)
            self.scale = 1 / (1 - self.dropped / 2**16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                return x
            bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
            kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= self.dropped - 2**15
            return x * (kept.to(x.dtype) * self.scale)

    for module in model.modules():
        if isinstance(module, torch.nn.ModuleDict):
            for name, child in module.items():
                if type(child) is torch.nn.Dropout and child.p:
                    module[name] = Dropout(child.p)


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Evaluate: dropout off, and nothing else (on a CPU bitsandbytes repacks layers in evaluation mode)."""
    import torch

    layers = [layer for layer in model.modules() if "Dropout" in type(layer).__name__]
    for layer in layers:
        layer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.train()


def save_adapter(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write peft's two files; the same weights give the same bytes."""
    from safetensors.torch import save_file

    config = model.peft_config["default"].to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    config["inference_mode"] = True
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )
    named = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in sorted(weights.items())}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors writes for the owner only
