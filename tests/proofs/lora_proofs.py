"""Measure the figures of test_fused_lora.py, in the train environment.

    python tests/proofs/lora_proofs.py BASE (a Hugging Face folder)

Prints one JSON object.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import FinetuneConfig
from pipeline.finetune import fused_lora
from pipeline.finetune.model import four_bit


def checked_gradient(p: float) -> bool:
    """Whether the backward pass is the forward pass's derivative, by finite differences."""
    base = torch.nn.Linear(6, 9).double().requires_grad_(False)
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 6), (3, 6), (9, 3)))
    function, seed = fused_lora._function(), torch.tensor(3)
    alone = torch.autograd.gradcheck(lambda x, a, b: function.apply(x, None, a, b, (base, 0.5, p), seed), (x, a, b))
    gate = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    gated = torch.autograd.gradcheck(
        lambda x, gate, a, b: function.apply(x, gate, a, b, (base, 0.5, p), seed), (x, gate, a, b)
    )
    return bool(alone and gated)


def models(base: Path, dropout: float) -> tuple[Any, Any]:
    """The same NF4 model with the same adapters, as peft runs it and fused."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    four = four_bit(FinetuneConfig(), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=four)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = get_peft_model(plain, config).train()
    for name, weight in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    fused = copy.deepcopy(plain)
    assert fused_lora.fuse(fused) == (14, 2)
    return plain, fused


def gradients(model: Any, *, checkpointed: bool = False) -> tuple[float, list[torch.Tensor]]:
    """The loss on fixed tokens and the adapters' gradients."""
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(1)
    fused_lora.draw(model)
    ids = torch.arange(40).remainder(17).add(5).view(2, 20)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]
    model.zero_grad()
    return float(loss), found


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference, against the largest gradient."""
    largest = max(float(it.abs().max()) for it in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


def main() -> None:
    """Measure and print."""
    base = Path(sys.argv[1])
    plain, fused = models(base, 0.0)
    (plain_loss, plain_gradients), (fused_loss, fused_gradients) = gradients(plain), gradients(fused)
    _, dropping = models(base, 0.3)
    once, kept = gradients(dropping)
    again, recomputed = gradients(dropping, checkpointed=True)
    for layer in dropping.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
    quiet, _ = gradients(dropping)
    ones = torch.ones(200, 100)
    mask = fused_lora.dropped(ones, 0.3, torch.tensor(5))
    print(
        json.dumps(
            {
                "derivative": [checked_gradient(0.0), checked_gradient(0.4)],
                "loss": [plain_loss, fused_loss],
                "gradients_apart": apart(plain_gradients, fused_gradients),
                "dropped": {"once": once, "checkpointed": again, "off": quiet, "without": fused_loss},
                "checkpointed_apart": apart(kept, recomputed),
                "mask": [float((mask == 0).float().mean()), float(mask.max())],
                "masks_equal": [
                    bool(torch.equal(mask, fused_lora.dropped(ones, 0.3, torch.tensor(5)))),
                    bool(torch.equal(mask, fused_lora.dropped(ones, 0.3, torch.tensor(6)))),
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
