"""Cross entropy straight from hidden states: a few tokens' logits at a time, and their gradient made with them.

The logits of a whole pass, in float32 and with a gradient of their size, take more memory than all layers of a small model
and are read from end to end several times. Nothing here waits for a number from the GPU, so that a graph can hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.finetune.packing import IGNORED

if TYPE_CHECKING:
    import torch

LOGITS_AT_ONCE = 2**25
# Architectures of transformers whose logits are the output layer's product and nothing more.
PLAIN = {"llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}


def take_over(model: Any) -> bool:
    """Let the output layer of a model of transformers hand on what it is given; False, and nothing done, if it isn't plain.

    Its weight stays where it is, for `summed`.
    """
    import torch

    head = model.get_output_embeddings()
    if model.config.model_type not in PLAIN or type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    head.forward = lambda hidden: hidden
    return True


def summed(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of softmax(hidden weightᵀ), summed over targets that aren't IGNORED, in nats; float32.

    Shapes: hidden (n, width), weight (vocabulary, width), which gets no gradient, targets (n,).
    """
    loss: torch.Tensor = _function().apply(hidden, weight.to(hidden.dtype), targets)
    return loss


def _function() -> Any:
    """The autograd function: the gradient by `hidden` is made on the way forward, where the logits are at hand."""
    import torch

    class Summed(torch.autograd.Function):  # type: ignore[misc] # torch is Any where types are checked
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            at_once = max(1, LOGITS_AT_ONCE // len(weight))
            with torch.autocast(hidden.device.type, enabled=False):
                for start in range(0, len(hidden), at_once):
                    some = slice(start, start + at_once)
                    part, logits = _of(hidden[some] @ weight.t(), targets[some])
                    total += part
                    if gradient is not None:
                        torch.mm(logits.to(weight.dtype), weight, out=gradient[some])
            ctx.save_for_backward(gradient)
            return total

        @staticmethod
        def backward(ctx: Any, by_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            (gradient,) = ctx.saved_tensors
            # Times a number that stays in float32: as a scalar on a GPU it would be rounded to the gradient's type.
            return torch.mul(gradient, by_loss.view(1, 1), out=torch.empty_like(gradient)), None, None

    return Summed


def _of(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of some tokens and its gradient by their logits, softmax less the target's one."""
    import torch

    logits = logits.float()
    kept = targets != IGNORED
    right = targets.clamp(min=0)[:, None]
    total = logits.logsumexp(-1, keepdim=True)
    loss = ((total - logits.gather(1, right)).squeeze(1) * kept).sum()
    logits = logits.sub_(total).exp_()
    logits.scatter_add_(1, right, torch.full_like(right, -1, dtype=logits.dtype))
    return loss, logits.mul_(kept[:, None])
