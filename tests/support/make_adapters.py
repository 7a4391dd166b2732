"""Make LoRA adapters for a tiny model, and what peft and bitsandbytes make of them, to compare with.

    python tests/support/make_adapters.py BASE OUT

Runs in the train environment. Writes OUT/<name>/payload for adapters of several kinds, sound and broken,
and OUT/reference/{original,dequantized}.safetensors: peft's merge of `sound` into the base in float32, and
the sum of bitsandbytes' own dequantized layers and peft's delta; both in bf16.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def make(base: Path, out: Path, **options: Any) -> None:
    """An adapter with random A and B."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(out / "payload")


def variant(sound: Path, out: Path, change: Any) -> None:
    """A copy of the sound adapter with its tensors changed."""
    shutil.copytree(sound, out)
    file = out / "payload" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def reference(base: Path, adapter: Path, out: Path) -> None:
    """Write peft's merge in float32, and bitsandbytes' layers plus peft's delta."""
    out.mkdir()
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(whole, adapter).merge_and_unload().state_dict()
    keep = {name: value.bfloat16().contiguous() for name, value in merged.items() if name != "lm_head.weight"}
    save_file(keep, out / "original.safetensors")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    packed = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.bfloat16)
    from bitsandbytes.functional import dequantize_4bit

    adapted = PeftModel.from_pretrained(packed, adapter)
    seen = dict(keep)
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "base_layer"):
            weight = module.base_layer.weight
            plain = dequantize_4bit(weight.data, weight.quant_state).bfloat16().float()
            seen[f"{name}.weight"] = (plain + module.get_delta_weight("default").float()).bfloat16().contiguous()
    save_file(seen, out / "dequantized.safetensors")


def main() -> None:
    """Make everything."""
    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    sound = out / "sound"
    make(base, sound)
    make(base, out / "rslora", use_rslora=True)
    make(base, out / "dora", use_dora=True)
    variant(
        sound,
        out / "nan",
        lambda t: {n: v * float("nan") if "layers.1.mlp.up_proj.lora_B" in n else v for n, v in t.items()},
    )
    variant(sound, out / "untrained", lambda t: {n: v * 0 if "lora_B" in n else v for n, v in t.items()})
    variant(
        sound,
        out / "foreign",
        lambda t: {n.replace("layers.1.self_attn", "layers.7.self_attn"): v for n, v in t.items()},
    )
    variant(sound, out / "wide", lambda t: {n: torch.cat([v, v]) if "lora_B" in n else v for n, v in t.items()})
    variant(sound, out / "empty", lambda _: {})
    reference(base, sound / "payload", out / "reference")


if __name__ == "__main__":
    main()
