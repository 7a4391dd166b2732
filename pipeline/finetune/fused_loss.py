"""Cross entropy straight from hidden states: a few tokens' logits at a time, and their gradient with them.

The logits of a whole pass, in float32 and with their gradient, take more memory than all layers of a small model, and are read
several times. Nothing here waits for a number from the GPU, so a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.finetune.packing import IGNORED

if TYPE_CHECKING:
    import torch

LOGITS_AT_ONCE = 2**25
# Architectures of transformers whose logits are the output layer's product and nothing more.
PLAIN = {"llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}


def is_plain(model: Any) -> bool:
    """Whether the logits of a transformers model are one product of its output layer, without a bias."""
    import torch

    head = model.get_output_embeddings()
    return model.config.model_type in PLAIN and type(head) is torch.nn.Linear and head.bias is None


def take_over(model: Any) -> None:
    """Let a plain output layer return its input, the hidden states; its weight stays in place, for `summed`."""
    model.get_output_embeddings().forward = lambda states: states


def summed(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of softmax(states weightᵀ), summed over targets that aren't IGNORED, in nats; float32.

    Shapes: states (n, width), weight (vocabulary, width), targets (n,). The weight gets no gradient.
    """
    loss: torch.Tensor = _function().apply(states, weight.to(states.dtype), targets)
    return loss


def _function() -> Any:
    """The autograd function: the forward pass computes the gradient by `states` too, while it has the logits."""
    import torch

    class Summed(torch.autograd.Function):  # type: ignore[misc] # torch is Any where types are checked
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            total = torch.zeros((), dtype=torch.float32, device=states.device)
            gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
            at_once = max(1, LOGITS_AT_ONCE // len(weight))
            with torch.autocast(states.device.type, enabled=False):
                for start in range(0, len(states), at_once):
                    tokens = slice(start, start + at_once)
                    loss, by_logits = _loss_and_gradient(states[tokens] @ weight.t(), targets[tokens])
                    total += loss
                    if gradient is not None:
                        torch.mm(by_logits.to(weight.dtype), weight, out=gradient[tokens])
            ctx.save_for_backward(gradient)
            return total

        @staticmethod
        def backward(ctx: Any, by_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            (gradient,) = ctx.saved_tensors
            # The factor stays in float32: as a scalar on a GPU it would be rounded to the gradient's type.
            return torch.mul(gradient, by_loss.view(1, 1), out=torch.empty_like(gradient)), None, None

    return Summed


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some tokens' summed loss, and its gradient by their logits: softmax(logits) - onehot(target)."""
    import torch

    logits = logits.float()
    has_target = targets != IGNORED
    right = targets.clamp(min=0)[:, None]
    total = logits.logsumexp(-1, keepdim=True)
    loss = ((total - logits.gather(1, right)).squeeze(1) * has_target).sum()
    logits = logits.sub_(total).exp_()
    logits.scatter_add_(1, right, torch.full_like(right, -1, dtype=logits.dtype))
    return loss, logits.mul_(has_target[:, None])
