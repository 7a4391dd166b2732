"""Cross entropy from hidden states, held against torch's own on all logits at once."""

from __future__ import annotations

import json

import pytest
from support import programs

pytestmark = pytest.mark.slow

COMPARED = """
import json
import torch
from pipeline.finetune import fused_loss
from transformers import LlamaConfig, LlamaForCausalLM
fused_loss.LOGITS_AT_ONCE = 7 * 50
torch.manual_seed(0)
hidden, weight = torch.randn(33, 24, requires_grad=True), torch.randn(50, 24)
targets = torch.randint(50, (33,))
targets[::4] = -100
theirs = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
ours = fused_loss.summed(hidden, weight, targets)
grads = [torch.autograd.grad(it * 0.5, hidden)[0] for it in (ours, theirs)]
sizes = dict(vocab_size=50, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
plain = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
ids = torch.arange(10)[None]
with torch.no_grad():
    logits = plain(ids).logits
    is_plain = fused_loss.is_plain(plain)
    fused_loss.take_over(plain)
    handed_on = plain(ids).logits @ plain.get_output_embeddings().weight.t()
scaled = LlamaForCausalLM(LlamaConfig(**sizes))
scaled.config.model_type = "granite"
with torch.no_grad():
    evaluated = float(fused_loss.summed(hidden, weight, targets))
print(json.dumps({
    "losses": [float(ours), float(theirs), evaluated],
    "gradients": float((grads[0] - grads[1]).abs().max()),
    "ignored": float(grads[0][::4].abs().max()),
    "is_plain": [is_plain, fused_loss.is_plain(scaled)],
    "handed_on": float((logits - handed_on).abs().max()),
}))
"""


SCALED = """
import json
import torch
from pipeline.finetune import fused_loss
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
weight = torch.randn(50, 64, device=device)
targets = torch.randint(50, (512,), device=device)
grads = []
for dtype in (torch.bfloat16, torch.float32):
    torch.manual_seed(1)
    hidden = torch.randn(512, 64).to(device=device, dtype=torch.bfloat16).to(dtype).requires_grad_()
    loss = fused_loss.summed(hidden, weight, targets) * torch.tensor(1 / 300, device=device)
    grads.append(torch.autograd.grad(loss, hidden)[0].double())
print(json.dumps(float((grads[0] * grads[1]).sum() / (grads[1] * grads[1]).sum()) - 1))
"""


@pytest.fixture(scope="module")
def compared() -> dict:
    """Both ways on random numbers, seven tokens at once."""
    return json.loads(programs.python(COMPARED))


def test_it_is_torchs_cross_entropy_and_its_gradient(compared: dict) -> None:
    """Summed over the targets that count; the others have no gradient. Without gradients the loss is the same."""
    ours, theirs, evaluated = compared["losses"]
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert evaluated == ours
    assert compared["gradients"] < 1e-5
    assert compared["ignored"] == 0


def test_a_plain_output_layer_hands_its_input_on(compared: dict) -> None:
    """The model's output times the layer's weight gives its logits; an architecture that scales them is left alone."""
    assert compared["is_plain"] == [True, False]
    assert compared["handed_on"] < 1e-5


@pytest.mark.gpu
def test_the_gradients_scale_is_not_rounded() -> None:
    """1/300 in bfloat16 is 0.2 % less: the whole gradient would be shorter by that."""
    assert abs(json.loads(programs.python(SCALED))) < 1e-3
