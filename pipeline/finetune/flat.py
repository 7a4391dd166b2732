"""All weights that are trained as one tensor, with all gradients as another: an optimizer step is a few kernels then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def flatten(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """One parameter that holds the weights behind each other, of their one dtype on their one device; (elements,).

    From then on each weight and its gradient are views of the parameter and of its gradient, which starts as zero.
    """
    import torch

    with torch.no_grad():
        flat = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    flat.grad = torch.zeros_like(flat)
    sizes = [weight.numel() for weight in weights]
    for weight, part, gradient in zip(weights, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        weight.data = part.view(weight.shape)
        weight.grad = gradient.view(weight.shape)
    return flat
