"""Measure the figures of test_train.py, on a tiny model in the train environment.

    python tests/proofs/finetune_proofs.py FOLDER (holding base/ and prepare/)

Prints one JSON object. Float32 throughout, so that equal means equal to rounding.
"""

from __future__ import annotations

import json
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pipeline.config.schema import FinetuneConfig
from pipeline.finetune import loss, memory, packing, train
from pipeline.finetune import model as finetune_model
from pipeline.finetune import rows as finetune_rows
from pipeline.finetune.execution import Execution
from pipeline.finetune.packing import IGNORED, Row


def exact(base: Path, settings: FinetuneConfig) -> tuple[Any, Execution]:
    """The model to be trained, in float32, with adapters that already change what it says."""
    model, execution = finetune_model.load(base, settings, 256)
    model = finetune_model.with_lora(model.float(), settings, execution, "0" * 64, seed=1)
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model, replace(execution, dtype="float32")


def fallback(model: Any, execution: Execution, rows: list[Row]) -> dict[str, Any]:
    """Packed and alone with transformers' own attention and masks, as models with windows are trained."""
    model.set_attn_implementation("sdpa")
    own, execution = execution.attention, replace(execution, shares_prefixes=False)
    with finetune_model.without_dropout(model):
        alone = [float(loss.summed_loss(model, [row], execution)) for row in rows]
        packed = float(loss.summed_loss(model, rows, execution))
    model.set_attn_implementation(own)
    return {"alone": alone, "packed": packed}


def packed_and_alone(model: Any, execution: Execution, rows: list[Row]) -> dict[str, Any]:
    """Each row's loss alone, the pack's, and a row's loss when its neighbour in the pack is another."""
    with finetune_model.without_dropout(model):
        alone = [float(loss.summed_loss(model, [row], execution)) for row in rows]
        packed = float(loss.summed_loss(model, rows, execution))
        quiet = replace(rows[0], labels=array("i", [IGNORED]) * len(rows[0].labels))
        beside = [
            float(loss.summed_loss(model, [first, rows[1]], execution))
            for first in (quiet, replace(quiet, input_ids=quiet.input_ids[::-1]))
        ]
    return {"alone": alone, "packed": packed, "beside": beside}


def by_transformers(base: Path, model: Any, rows: list[Row]) -> list[float]:
    """Each row's loss by transformers' own attention and loss, the row alone in its batch."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    merged = model.merge_and_unload()
    plain.load_state_dict(merged.state_dict())
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row.input_ids.tolist()]), torch.tensor([row.labels.tolist()])
        with torch.no_grad():
            losses.append(float(plain(input_ids=ids, labels=labels).loss) * row.trained)
    return losses


def gradient(base: Path, settings: FinetuneConfig, rows: list[Row], tokens: int) -> torch.Tensor:
    """The gradient of one effective batch, cut into passes of `tokens` tokens."""
    model, execution = exact(base, settings)
    run = train.Training(
        model, replace(execution, tokens_a_pass=tokens), settings, finetune_rows.Rows(rows, [], 0, 0),
        sequence_len=256, seed=1, folder=Path("unused"),
    )  # fmt: skip
    kept: list[torch.Tensor] = []
    run.optimizer.register_step_pre_hook(
        lambda *_: kept.append(torch.cat([it.grad.flatten() for it in run.weights.values()]))
    )
    run.step(train.State(), range(len(rows)))
    return kept[0]


def gradients(base: Path, settings: FinetuneConfig, rows: list[Row]) -> dict[str, float]:
    """How far a batch's gradient moves by other passes and by checkpointing, relative to its length."""
    whole, cut = (gradient(base, settings, rows, tokens) for tokens in (100_000, 1))
    again = gradient(base, settings.model_copy(update={"gradient_checkpointing": True}), rows, 100_000)
    return {
        "length": float(whole.norm()),
        "by_passes": float((whole - cut).norm() / whole.norm()),
        "by_checkpointing": float((whole - again).norm() / whole.norm()),
    }


def unpacking(base: Path) -> dict[str, float]:
    """The largest difference between a 4-bit layer as bitsandbytes runs it and its unpacked stand-in."""
    import bitsandbytes

    config = finetune_model.four_bit(FinetuneConfig(), torch.bfloat16)
    packed = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    layer = packed.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    layer.train()
    x = torch.randn(40, layer.in_features, dtype=torch.bfloat16)
    by_library = layer(x)
    finetune_model.unpack(packed, torch.bfloat16)
    stand_in = packed.model.layers[0].self_attn.q_proj
    before = original.model.layers[0].self_attn.q_proj
    return {
        "difference": float((by_library - stand_in(x)).abs().max()),
        "rounding": float((before.weight - stand_in.weight).abs().mean() / before.weight.abs().mean()),
        "levels": len(torch.unique(stand_in.weight[0, :64])),
    }


def under_other_memory(base: Path) -> dict[str, str]:
    """How weights are kept where there is memory, where there is none, and where a run from there goes on here."""
    settings, free = FinetuneConfig(), memory.free
    _, roomy = finetune_model.load(base, settings, 256)
    memory.free = lambda _device: 0.0
    _, tight = finetune_model.load(base, settings, 256)
    _, roomy_again = finetune_model.load(base, settings, 256, roomy)
    memory.free = free
    _, tight_again = finetune_model.load(base, settings, 256, tight)
    found = {"roomy": roomy, "tight": tight, "roomy_again": roomy_again, "tight_again": tight_again}
    return {name: execution.frozen_weights for name, execution in found.items()}


def dropout() -> dict[str, float]:
    """The share that the quick dropout keeps, and its scale."""
    outer = torch.nn.Module()
    outer.layers = torch.nn.ModuleDict({"default": torch.nn.Dropout(0.2)})
    finetune_model._quicken_dropout(outer)
    torch.manual_seed(3)
    x = torch.ones(101, 997)
    y = outer.layers["default"](x)
    again = outer.layers["default"](x)
    outer.eval()
    return {
        "dropped": float((y == 0).float().mean()),
        "mean": float(y.mean()),
        "levels": len(torch.unique(y)),
        "same_twice": float((y == again).float().mean()),
        "off": float((outer.layers["default"](x) - x).abs().max()),
    }


def main() -> None:
    """Measure everything."""
    folder = Path(sys.argv[1])
    base, prepared = folder / "base" / "payload", folder / "prepare" / "payload"
    settings = FinetuneConfig(adapter="lora", load_in_4bit=False, lora_dropout=0.0, micro_batch_size=64)
    rows = finetune_rows.read(base, prepared, folder / "proofs", settings, 256).train[:6]
    model, execution = exact(base, settings)
    found = {
        "lengths": [len(row.input_ids) for row in rows],
        "trained": [row.trained for row in rows],
        "attention": execution.attention,
        "prefix": packing.shared_prefix(rows),
        **packed_and_alone(model, execution, rows),
        "fallback": fallback(model, execution, rows),
        "by_transformers": by_transformers(base, model, rows),
        "gradients": gradients(base, settings, rows),
        "unpacking": unpacking(base),
        "under_other_memory": under_other_memory(base),
        "dropout": dropout(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
