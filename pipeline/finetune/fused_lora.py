"""LoRA around a frozen linear layer as one step of autograd: y = x Wᵀ + s·dropout(x) Aᵀ Bᵀ (LoRA, arXiv 2106.09685).

The backward pass keeps the layer's input and the seed of its dropout: no dropped copy, no mask, no unpacked weight. A gated layer's
input is silu(gate)·x: the two factors are kept, which the layers before it computed, and their product is computed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEEDS = 2**31 - 1
SEED = "lora_dropout_seed"


def fuse(model: Any, device: str = "cpu") -> tuple[int, int]:
    """Give the LoRA layers of a peft model with one adapter, `default`, this module's forward pass.

    Returns how many layers have it, and in how many gated blocks (Llama's, Qwen's, Mistral's …) the product isn't kept. A layer draws
    the same mask until `draw` is called. The layers will compute on `device`.
    """
    import torch
    from peft.tuners.lora import Linear, LoraLayer

    function = _function()
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    fusible = [layer for layer in layers if isinstance(layer, Linear) or type(layer).__name__ == "Linear4bit"]
    model.register_buffer(SEED, torch.zeros(len(fusible), dtype=torch.int64, device=device), persistent=False)
    for layer, seed in zip(fusible, getattr(model, SEED), strict=True):
        layer.forward = _forward_of(layer, function, seed)
    blocks = [block for block in model.modules() if _is_gated(block, fusible)]
    for block in blocks:
        block.forward = _gated(block)
    return len(fusible), len(blocks)


def draw(model: Any) -> None:
    """New dropout masks for the next pass, from torch's own random numbers on the CPU: no wait for the GPU."""
    import torch

    seeds = getattr(model, SEED, None)
    if seeds is not None:
        seeds.copy_(torch.randint(SEEDS, seeds.shape), non_blocking=True)


def _is_gated(block: Any, layers: list[Any]) -> bool:
    """Whether it computes down(silu(gate(x)) · up(x)) of three fused layers without biases of its own."""
    parts = [getattr(block, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = type(getattr(block, "act_fn", None)).__name__
    return all(any(part is layer for layer in layers) for part in parts) and activation in ("SiLU", "SiLUActivation")


def _gated(block: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = block.down_proj(block.up_proj(x), gate=block.gate_proj(x))
        return down

    return forward


def _forward_of(layer: Any, function: Any, seed: torch.Tensor) -> Any:
    """The layer's forward pass: (…, in) → (…, out) in the input's dtype, or autocast's."""
    import torch

    base, scaling = layer.get_base_layer(), layer.scaling["default"]
    a, b, dropout = (getattr(layer, name)["default"] for name in ("lora_A", "lora_B", "lora_dropout"))

    def forward(x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        p = dropout.p if dropout.training and hasattr(dropout, "p") else 0.0
        gate = gate if gate is None else gate.flatten(0, -2)
        flat: torch.Tensor = function.apply(x.flatten(0, -2), gate, a.weight, b.weight, (base, scaling, p), seed)
        return flat.view(*x.shape[:-1], -1)

    return forward


def weight_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight, (out, in): unpacked when it is kept in 4 bits."""
    # a weight that was split over processes and gathered has lost its state; the layer keeps it
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        plain: torch.Tensor = layer.weight
        return plain.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(layer.weight.data.view(-1, 1), state)
    return weight.to(dtype)


def _function() -> Any:
    """The autograd function; shapes: x and gate (n, in), A (r, in), B (out, r), all gradients but the frozen weight's.

    Its last arguments are the frozen layer, s and dropout's probability, and the seed.
    """
    import torch

    class FrozenLinearWithLora(torch.autograd.Function):  # type: ignore[misc] # torch is Any where types are checked
        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, gate: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
            layer: tuple[Any, float, float], seed: torch.Tensor,
        ) -> torch.Tensor:  # fmt: skip
            base, scaling, p = layer
            with torch.autocast(x.device.type, enabled=False):
                features = x if gate is None else _swiglu(gate, x)
                y = torch.nn.functional.linear(features, weight_of(base, x.dtype), _bias(base, x.dtype))
                inner = dropped(features, p, seed) @ a.to(x.dtype).t()
                y.addmm_(inner, b.to(x.dtype).t(), alpha=scaling)
            ctx.save_for_backward(x, gate, a, b, inner, seed)
            ctx.layer = layer
            return y

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            x, gate, a, b, inner, seed = ctx.saved_tensors
            base, scaling, p = ctx.layer
            dx = dgate = None
            with torch.autocast(x.device.type, enabled=False):
                dy = dy.contiguous()
                features = x if gate is None else _swiglu(gate, x)
                d_inner = (dy @ b.to(dy.dtype)).mul_(scaling)
                db = (dy.t() @ inner).to(b.dtype).mul_(scaling)
                da = (d_inner.t() @ dropped(features, p, seed)).to(a.dtype)
                if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                    del features
                    dx = dy @ weight_of(base, dy.dtype)
                    add_dropped(dx, d_inner @ a.to(dy.dtype), p, seed)
                    if gate is not None:
                        dgate, dx = _swiglu_backward(gate, x, dx)
            return dx, dgate, da, db, None, None

    return FrozenLinearWithLora


def _swiglu(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """silu(gate) · x."""
    import torch

    if x.is_cuda:
        from liger_kernel.ops.swiglu import swiglu_forward

        product: torch.Tensor = swiglu_forward(gate, x)[2]
        return product
    return torch.nn.functional.silu(gate) * x


def _swiglu_backward(gate: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of silu(gate) · x by gate and by x; on a GPU they may take the place of the two."""
    import torch

    if x.is_cuda:
        from liger_kernel.ops.swiglu import swiglu_backward

        dgate, dx = swiglu_backward(gate, x, dy)
        return dgate, dx
    open_ = torch.sigmoid(gate)
    return dy * x * open_ * (1 + gate * (1 - open_)), dy * gate * open_


def _bias(base: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return None if base.bias is None else base.bias.to(dtype)


def dropped(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Zero each element with probability p, divide the others by 1 - p; the same ones for the same seed, an int64 scalar."""
    if not p:
        return x
    if x.is_cuda:
        from pipeline.finetune.dropout import dropped as on_gpu

        return on_gpu(x, p, seed)
    return x * _mask(x, p, seed)


def add_dropped(to: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor) -> None:
    """Add dropped(x, p, seed) to `to` in place."""
    if p and x.is_cuda:
        from pipeline.finetune.dropout import add_dropped as on_gpu

        on_gpu(to, x, p, seed)
    else:
        to += dropped(x, p, seed)


def _mask(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    import torch

    generator = torch.Generator(x.device).manual_seed(int(seed))
    uniform = torch.rand(x.shape, generator=generator, device=x.device)
    return (uniform >= p).to(x.dtype) / (1 - p)
