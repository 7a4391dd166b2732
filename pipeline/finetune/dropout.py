"""Dropout on a GPU whose mask is computed from a seed wherever it is needed, and never kept.

Imported on a GPU only: it needs Triton. Tensors are contiguous, of less than 2^31 elements. Eight elements share the 128
random bits of one Philox call, so that memory bounds it, not arithmetic: the probability is kept to 2^-16.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024
SHARED = 8


@triton.jit
def _kept(x, at, elements, bits, cut, scale):
    value = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32)
    return tl.where((bits & 0xFFFF) >= cut, value * scale, 0.0)


@triton.jit
def _drop(x, out, at, elements, bits, cut, scale):
    tl.store(out + at, _kept(x, at, elements, bits, cut, scale), mask=at < elements)


@triton.jit
def _add(x, to, at, elements, bits, cut, scale):
    there = tl.load(to + at, mask=at < elements, other=0.0).to(tl.float32)
    tl.store(to + at, there + _kept(x, at, elements, bits, cut, scale), mask=at < elements)


@triton.jit
def _each(x, out, seed_at, elements, cut, scale, add: tl.constexpr, block: tl.constexpr):
    lanes = tl.program_id(0) * block + tl.arange(0, block)
    first, second, third, fourth = tl.randint4x(tl.load(seed_at), lanes)
    at = tl.program_id(0) * (block * 8) + tl.arange(0, block)
    for number in tl.static_range(8):
        if number // 2 == 0:
            bits = first
        elif number // 2 == 1:
            bits = second
        elif number // 2 == 2:
            bits = third
        else:
            bits = fourth
        if number % 2 == 1:
            bits = bits >> 16
        if add:
            _add(x, out, at + number * block, elements, bits, cut, scale)
        else:
            _drop(x, out, at + number * block, elements, bits, cut, scale)


def _run(x: torch.Tensor, out: torch.Tensor, p: float, seed: torch.Tensor, *, add: bool) -> None:
    cut = round(p * 2**16)
    programs = triton.cdiv(x.numel(), BLOCK * SHARED)
    _each[(programs,)](x, out, seed, x.numel(), cut, 1 / (1 - cut / 2**16), add=add, block=BLOCK)


def dropped(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """A copy of x, zeroed with probability p, the rest divided by 1 - p; `seed` is an int64 scalar on the GPU."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _run(x, out, p, seed, add=False)
    return out


def add_dropped(to: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor) -> None:
    """Add dropped(x, p, seed) to `to` in place, in one pass over memory."""
    _run(x.contiguous(), to, p, seed, add=True)
