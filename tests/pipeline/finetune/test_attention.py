"""Attention over packed rows, held against torch's own on each row by itself."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support import programs

from pipeline.finetune import attention

COMPARED = """
import json, sys
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from pipeline.finetune import attention as finetune_attention
device, dtype = sys.argv[1], torch.float32 if sys.argv[1] == "cpu" else torch.bfloat16
attention = finetune_attention.rows_on_cpu if device == "cpu" else finetune_attention.rows_on_cuda
lengths = [1, 37, finetune_attention.LONGEST_PLAIN + 8, 64]
ends = pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
torch.manual_seed(0)
shapes = [(1, heads, sum(lengths), 32) for heads in (6, 2, 2)]
q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
ours, _ = attention(None, q, k, v, None, scaling=0.2, cu_seq_lens_q=ends, max_length_q=max(lengths))
rows = zip(*(it.split(lengths, dim=2) for it in (q, k, v)))
theirs = [scaled_dot_product_attention(*row, is_causal=True, scale=0.2, enable_gqa=True) for row in rows]
theirs = torch.cat(theirs, dim=2).transpose(1, 2)
weight = torch.randn(ours.shape, device=device, dtype=dtype)
grads = [torch.autograd.grad((it * weight).sum(), (q, k, v)) for it in (ours, theirs)]
print(json.dumps({
    "shapes": [list(ours.shape), list(theirs.shape)],
    "values": float((ours - theirs).abs().max()),
    "gradients": max(float((one - other).abs().max()) for one, other in zip(*grads)),
}))
"""


@pytest.mark.slow
def test_rows_on_a_cpu_equal_torchs_attention_row_by_row():
    """Values and gradients agree for short rows, long ones and one of a single token, with shared keys."""
    found = json.loads(programs.python(COMPARED, "cpu"))
    assert found["shapes"] == [[1, 622, 6, 32]] * 2
    assert found["values"] < 1e-5
    assert found["gradients"] < 1e-4


@pytest.mark.gpu
def test_rows_on_a_gpu_equal_torchs_attention_row_by_row():
    """The flash kernel for rows of varying length agrees to bf16's precision."""
    found = json.loads(programs.python(COMPARED, "cuda"))
    assert found["values"] < 0.03
    assert found["gradients"] < 0.1


@pytest.mark.parametrize(
    ("config", "own"),
    [
        ({}, False),
        ({"sliding_window": 4096}, False),
        ({"sliding_window": 128}, True),
        ({"attn_logit_softcapping": 50.0}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
    ],
)
def test_only_plainly_causal_models_get_row_attention(config: dict, own: bool):
    """A window shorter than a row, capped scores or mixed layers leave a model its own attention."""
    chosen = attention.choose(SimpleNamespace(**config), "cpu", 256)
    assert chosen == (None if own else attention.CPU)
