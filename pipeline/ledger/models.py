"""The model of each step of the ledger, ready to answer: one engine, plain layers, training's dtype.

4-bit weights are unpacked once, training's NF4 and the quantized model's alike: the same values as if every product unpacked them,
and many times faster on a CPU. `quantize.formats` reads the quantized model from its bytes, whichever package wrote them: AutoAWQ's
folders need no environment of their own here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import compute_dtype
from pipeline.artifacts import Artifact, LedgerStep
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ModelError, Problem
from pipeline.finetune import model as finetune_model
from pipeline.merge import weights as merge_weights
from pipeline.model import special_tokens, weights
from pipeline.quantize import formats

if TYPE_CHECKING:
    import torch

MERGED: dict[merge_weights.Way, LedgerStep] = {"original": "merged_original", "dequantized": "merged_dequantized"}


@dataclass(frozen=True)
class Speaker:
    """A model with the tokenizer and the end tokens of its own folder, ready to generate."""

    model: Any
    tokenizer: Any
    end_tokens: tuple[int, ...]


def steps(artifacts: Mapping[str, Artifact], settings: FinetuneConfig) -> tuple[LedgerStep, ...]:
    """The steps to ask, in the ledger's order: of both ways to merge, this model's comes last."""
    way = MERGED[artifacts["merge"].detail["merge_base"]]
    further = [step for step in MERGED.values() if step != way] if settings.load_in_4bit else []
    last: tuple[LedgerStep, ...] = ("quantized",) if "quantize" in artifacts else ()
    return ("base", "adapter", *further, way, *last)


def load(step: LedgerStep, artifacts: Mapping[str, Artifact], settings: FinetuneConfig) -> Speaker:
    """The model of a step, on the GPU where there is one.

    This model's merge and the quantized model are read from their folders; the other merge is repeated in memory. Raises ModelError
    when a folder can't be loaded, lacks a weight or holds one that isn't finite.
    """
    import torch

    base, finetune, merge = (artifacts[name] for name in ("base", "finetune", "merge"))
    dtype = compute_dtype.of_device("cuda" if torch.cuda.is_available() else "cpu")
    if step == "base":
        return _ready(_plain(base.payload, base.payload, dtype), base.payload)
    if step == "adapter":
        return _ready(_adapted(base.payload, finetune.payload, settings, dtype), base.payload)
    if step == "quantized":
        folder = artifacts["quantize"].payload
        model = _plain(merge.payload, folder, dtype)
        formats.load_dequantized(model, folder)
        return _ready(model, folder)
    model = _plain(merge.payload, merge.payload, dtype)
    if step != MERGED[merge.detail["merge_base"]]:
        shapes = {name: tensor.shape for name, tensor in weights.tensors(base.payload).items()}
        nf4 = merge_weights.Nf4(base.payload, settings) if step == "merged_dequantized" else None
        merge_weights.fill(model, base.payload, merge_weights.read_adapter(finetune.payload, shapes), nf4)
    return _ready(model, merge.payload)


def _plain(folder: Path, config_folder: Path, dtype: torch.dtype, quantization: Any = None) -> Any:
    """The weights of one folder under the config.json of another, such as its quantized self."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(config_folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model, keys = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, quantization_config=quantization, local_files_only=True,
            trust_remote_code=False, use_safetensors=True, output_loading_info=True,
            device_map={"": 0} if torch.cuda.is_available() else None,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers can't load it: {error}", file=str(folder), remedy=_again(folder)) from error
    strays = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in keys[kind]]
    if strays:
        raise ModelError(
            [
                Problem("doesn't fit config.json", file=str(folder), key=name, remedy=_again(folder))
                for name in sorted(map(str, strays))
            ]
        )
    return model


def _adapted(base: Path, adapter: Path, settings: FinetuneConfig, dtype: torch.dtype) -> Any:
    """The adapter on the base as training had it, in the dtype that autocast gave its products."""
    from peft import PeftModel

    model = _plain(base, base, dtype, finetune_model.four_bit(settings, dtype))
    if settings.load_in_4bit:
        finetune_model.unpack(model, dtype)
    lora_model = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    return lora_model.to(dtype).get_base_model()


def _ready(model: Any, folder: Path) -> Speaker:
    from transformers import AutoTokenizer

    defects = [
        Problem("holds NaN or infinity", file=str(folder), key=name, allowed="finite numbers", remedy=_again(folder))
        for name, parameter in model.named_parameters()
        if not bool(parameter.isfinite().all())
    ]
    if defects:
        raise ModelError(defects)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Speaker(model.eval(), tokenizer, tuple(sorted(special_tokens.end_tokens(folder, tokenizer))))


def _again(folder: Path) -> str:
    """Artefacts are never changed in place: a stage writes one again when its folder is gone."""
    return f"delete {folder.parent} and run the same command again, which makes it anew"
