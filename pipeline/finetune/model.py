"""The model that is trained: the base in NF4, frozen, with LoRA layers in float32 around its linear ones.

`load` reads the base, asks `execution.choose` how the run is run, and applies that. Where memory allows, the frozen NF4 weights are
unpacked once, for 2 bytes a parameter: training sees the same values as if each pass unpacked them again. On a GPU, Liger's
kernels and fused LoRA layers keep little for the backward pass: short passes then fit without checkpointing, where a whole batch
wouldn't. Runs in the train environment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import compute_dtype
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ConfigError, ModelError
from pipeline.finetune import attention, distributed, fsdp, fused_lora, fused_loss, memory
from pipeline.finetune.execution import (
    UNPACKED,
    Base,
    Execution,
    Machine,
    choose,
    frozen_weights,
    raise_for_gpu_optimizer,
)  # fmt: skip

if TYPE_CHECKING:
    import torch

LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def load(
    base: Path, settings: FinetuneConfig, sequence_len: int, before: Execution | None = None
) -> tuple[Any, Execution]:
    """The base model of a Hugging Face folder, frozen, and how the run is run.

    A run that goes on keeps what memory decided `before`. Raises ModelError when transformers can't load the folder, ConfigError
    for a setting that needs a GPU.
    """
    machine = this_machine()
    raise_for_gpu_optimizer(settings, machine.device)
    model = _read(base, settings, machine)
    weights = _keep_weights(model, settings, machine, before)
    shape = _base_of(model, settings, machine)
    execution = choose(
        settings, shape, machine, weights,
        sequence_len=sequence_len, free_bytes=_free_beside(model, settings, machine), before=before,
    )  # fmt: skip
    apply(model, execution)
    return model, execution


def this_machine() -> Machine:
    """The device that this process computes on, as torch sees it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Machine(
        device=device,
        name=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        dtype=str(compute_dtype.of_device(device)).removeprefix("torch."),
        threads=torch.get_num_threads(),
        processes=distributed.size(),
    )


def apply(model: Any, execution: Execution) -> None:
    """Make the base run as chosen: attention over packed rows, Liger's kernels, an output layer that returns its input."""
    attention.register()
    if execution.attention in (attention.CPU, attention.CUDA):
        model.set_attn_implementation(execution.attention)
    if execution.kernels.startswith("liger"):
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, LIGER)
    if execution.fused_loss:
        fused_loss.take_over(model)


def _read(base: Path, settings: FinetuneConfig, machine: Machine) -> Any:
    """The frozen base: on its device, or in main memory when it is going to be split."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype, split = getattr(torch, machine.dtype), settings.fsdp_version is not None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, quantization_config=None if split else four_bit(settings, dtype), local_files_only=True,
            trust_remote_code=False, use_safetensors=True,
            device_map={"": torch.cuda.current_device()} if machine.device == "cuda" and not split else None,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the base model can't be loaded for training: {error}",
            file=str(base),
            remedy="set base_model to a causal language model that this transformers version knows",
        ) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def _keep_weights(model: Any, settings: FinetuneConfig, machine: Machine, before: Execution | None) -> str:
    """Pack the weights of a base to be split, or unpack a small one's; how they are kept then."""
    import torch

    dtype = getattr(torch, machine.dtype)
    if not settings.load_in_4bit or settings.fsdp_version is not None:
        if settings.load_in_4bit:
            fsdp.pack(model, settings, dtype)
        return frozen_weights(settings, machine, packed_count=0, free_bytes=0.0)
    count = sum(layer.in_features * layer.out_features for _, _, layer in _packed_layers(model))
    weights = frozen_weights(settings, machine, count, memory.free(machine.device), before)
    if weights.endswith(UNPACKED):
        unpack(model, dtype)
    return weights


def _base_of(model: Any, settings: FinetuneConfig, machine: Machine) -> Base:
    """The loaded base as far as choices look at it."""
    return Base(
        config=model.config,
        attention=model.config._attn_implementation,  # noqa: SLF001 - transformers' own place for it
        has_plain_head=fused_loss.is_plain(model),
        has_gates=memory.recomputes_gates(model, settings),
        is_known_to_liger=machine.device == "cuda" and _is_known_to_liger(model),
    )


def _free_beside(model: Any, settings: FinetuneConfig, machine: Machine) -> float:
    """A GPU's free bytes beside the base's weights; 0 on a CPU, where memory decides no pass."""
    if machine.device == "cpu":
        return 0.0
    split = settings.fsdp_version is not None
    with fsdp.reserved(model, settings, machine.device, machine.processes) if split else nullcontext():
        return memory.free(machine.device)


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


def unpack(model: Any, dtype: torch.dtype) -> None:
    """Replace each 4-bit layer by a plain one of its dequantized values."""
    import torch

    for parent, name, layer in _packed_layers(model):
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(fused_lora.weight_of(layer, dtype), requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, name, plain)
    # peft asks the model whether its layers are packed
    model.is_loaded_in_4bit = model.is_quantized = False


def _packed_layers(model: Any) -> list[tuple[Any, str, Any]]:
    """The 4-bit layers, each with its parent and its name there."""
    import bitsandbytes

    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, bitsandbytes.nn.Linear4bit)
    ]


def _is_known_to_liger(model: Any) -> bool:
    """Whether Liger has norms, rotary embedding and SwiGLU for the model's architecture."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def with_lora(model: Any, settings: FinetuneConfig, execution: Execution, base_digest: str, seed: int) -> Any:
    """The model with LoRA layers, in training mode.

    Raises ConfigError when lora_target_modules names no layer of the model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    everything = "all-linear" if settings.lora_target_linear else None
    targets = list(settings.lora_target_modules or ()) or everything
    if "lm_head" in (settings.lora_target_modules or ()) and model.config.tie_word_embeddings:
        raise ConfigError(
            "lm_head is this base's embedding too, and no merged model could have one without the other",
            key="finetune.lora_target_modules",
            allowed=", ".join(name for name in _linear_names(model) if name != "lm_head"),
            remedy="take lm_head out of finetune.lora_target_modules",
        )
    torch.manual_seed(seed)
    try:
        lora_model = get_peft_model(
            model,
            LoraConfig(
                r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
                target_modules=targets, bias="none", task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(
            f"LoRA can't adapt a layer: {error}",
            key="finetune.lora_target_modules",
            allowed=", ".join(_linear_names(model)),
            remedy="leave finetune.lora_target_modules out to adapt every linear layer",
        ) from error
    # The folder that the base lies in is this machine's; its digest is the same everywhere.
    lora_model.peft_config["default"].base_model_name_or_path = f"sha256:{base_digest}"
    if execution.device == "cpu":
        _quicken_dropout(lora_model)
    else:
        fused_lora.fuse(lora_model, execution.device)
    if execution.gradient_checkpointing:
        lora_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora_model.enable_input_require_grads()
    lora_model.train()
    return lora_model


def _linear_names(model: Any) -> list[str]:
    """What lora_target_modules may name."""
    import torch

    layers = (name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    return sorted({name.rpartition(".")[2] for name in layers})


def _quicken_dropout(model: Any) -> None:
    """Replace torch's dropout, which draws a whole random number for each element, one after another.

    Here four elements share 64 random bits: the probability is exact to 2^-16. It takes less than half the time; torch's took a
    third of a CPU step.
    """
    import torch

    class Dropout(torch.nn.Module):  # type: ignore[misc] # torch is Any where types are checked
        def __init__(self, p: float) -> None:
            super().__init__()
            self.cut = round(p * 2**16)
            self.scale = 1 / (1 - self.cut / 2**16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                return x
            bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
            mask = bits.view(torch.int16)[: x.numel()].view(x.shape) >= self.cut - 2**15
            return x * (mask.to(x.dtype) * self.scale)

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
    tensors = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in sorted(weights.items())}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors writes for the owner only
