"""LoRA around a frozen linear layer as one step of autograd: y = x Wᵀ + s·dropout(x) Aᵀ Bᵀ (LoRA, arXiv 2106.09685).

What is kept for the backward pass is the layer's input and the seed of its dropout: no dropped copy, no mask, no
unpacked weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEEDS = 2**31 - 1


def fuse(model: Any) -> int:
    """Give every LoRA layer of a peft model with one adapter, `default`, the forward pass of here; how many they are."""
    from peft.tuners.lora import Linear, LoraLayer

    function = _function()
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    fusible = [layer for layer in layers if isinstance(layer, Linear) or type(layer).__name__ == "Linear4bit"]
    for layer in fusible:
        layer.forward = _forward_of(layer, function)
    return len(fusible)


def _forward_of(layer: Any, function: Any) -> Any:
    """The layer's forward pass: (…, in) → (…, out) in the input's dtype, or autocast's."""
    import torch

    base, scaling = layer.get_base_layer(), layer.scaling["default"]
    a, b, dropout = (getattr(layer, name)["default"] for name in ("lora_A", "lora_B", "lora_dropout"))

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        p = dropout.p if dropout.training and hasattr(dropout, "p") else 0.0
        # drawn on the CPU: no wait for the GPU, and a checkpointed layer draws the same again
        seed = int(torch.randint(SEEDS, ())) if p else 0
        flat: torch.Tensor = function.apply(x.flatten(0, -2), base, a.weight, b.weight, scaling, p, seed)
        return flat.view(*x.shape[:-1], -1)

    return forward


def weight_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight, (out, in): unpacked when it is kept in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        weight: torch.Tensor = layer.weight
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    unpacked: torch.Tensor = dequantize_4bit(layer.weight.data.view(-1, 1), state)
    return unpacked.to(dtype)


def _function() -> Any:
    """The autograd function; shapes: x (n, in), A (r, in), B (out, r), all gradients but the frozen weight's."""
    import torch

    class FrozenLinearWithLora(torch.autograd.Function):  # type: ignore[misc] # torch is Any where types are checked
        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, base: Any, a: torch.Tensor, b: torch.Tensor, scaling: float, p: float, seed: int
        ) -> torch.Tensor:
            with torch.autocast(x.device.type, enabled=False):
                y = torch.nn.functional.linear(x, weight_of(base, x.dtype), _bias(base, x.dtype))
                inner = dropped(x, p, seed) @ a.to(x.dtype).t()
                y.addmm_(inner, b.to(x.dtype).t(), alpha=scaling)
            ctx.save_for_backward(x, a, b, inner)
            ctx.rest = base, scaling, p, seed
            return y

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            x, a, b, inner = ctx.saved_tensors
            base, scaling, p, seed = ctx.rest
            with torch.autocast(x.device.type, enabled=False):
                dy = dy.contiguous()
                d_inner = (dy @ b.to(dy.dtype)).mul_(scaling)
                db = (dy.t() @ inner).to(b.dtype).mul_(scaling)
                da = (d_inner.t() @ dropped(x, p, seed)).to(a.dtype)
                dx = None
                if ctx.needs_input_grad[0]:
                    dx = dy @ weight_of(base, dy.dtype)
                    add_dropped(dx, d_inner @ a.to(dy.dtype), p, seed)
            return dx, None, da, db, None, None, None

    return FrozenLinearWithLora


def _bias(base: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return None if base.bias is None else base.bias.to(dtype)


def dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Zero each element with probability p, divide the others by 1 - p; the same ones for the same seed."""
    if not p:
        return x
    if x.is_cuda:
        from pipeline.finetune_dropout import dropped as on_gpu

        return on_gpu(x, p, seed)
    return x * _mask(x, p, seed)


def add_dropped(to: torch.Tensor, x: torch.Tensor, p: float, seed: int) -> None:
    """Add dropped(x, p, seed) to `to` in place."""
    if p and x.is_cuda:
        from pipeline.finetune_dropout import add_dropped as on_gpu

        on_gpu(to, x, p, seed)
    else:
        to += dropped(x, p, seed)


def _mask(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    import torch

    drawn = torch.rand(x.shape, generator=torch.Generator(x.device).manual_seed(seed), device=x.device)
    return (drawn >= p).to(x.dtype) / (1 - p)
