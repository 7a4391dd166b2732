"""Dropout on a GPU whose mask is computed from a seed wherever it is needed, and never kept.

Imported on a GPU only: it needs Triton. Tensors are contiguous, of less than 2^31 elements.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _dropped(x, out, elements, p, seed, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < elements
    value = tl.load(x + at, mask=inside).to(tl.float32)
    kept = tl.rand(seed, at) >= p
    tl.store(out + at, tl.where(kept, value / (1 - p), 0.0), mask=inside)


@triton.jit
def _add_dropped(to, x, elements, p, seed, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < elements
    value = tl.load(x + at, mask=inside).to(tl.float32)
    there = tl.load(to + at, mask=inside).to(tl.float32)
    kept = tl.rand(seed, at) >= p
    tl.store(to + at, there + tl.where(kept, value / (1 - p), 0.0), mask=inside)


def dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """A copy of x, zeroed with probability p, the rest divided by 1 - p."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _dropped[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), p, seed, block=BLOCK)
    return out


def add_dropped(to: torch.Tensor, x: torch.Tensor, p: float, seed: int) -> None:
    """Add dropped(x, p, seed) to `to` in place, in one pass over memory."""
    _add_dropped[(triton.cdiv(x.numel(), BLOCK),)](to, x, x.numel(), p, seed, block=BLOCK)
