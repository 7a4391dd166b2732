"""Attention over packed rows: a stream of rows in one sequence, none of which attends to another.

Rows follow each other without padding, their positions start at 0, and `cu_seq_lens_q` (transformers' name) says where each begins.

- `CPU`: causal attention row by row, as plain matrix products. The backward pass of scaled_dot_product_attention takes four times
  as long there (bf16, rows of 100 tokens).
- `CUDA`: torch's flash kernel for rows of varying length.
- None from `choose`: attention that is more than causal (sliding windows, capped scores). Such models keep transformers' own masks,
  which are block-diagonal by the positions.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CPU = "tunegate_rows_cpu"
CUDA = "tunegate_rows_cuda"
# Above it the scores of a row, kept for the backward pass, cost more than the slower kernel does.
LONGEST_PLAIN = 512
MORE_THAN_CAUSAL = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size", "layers_block_type")


def choose(config: Any, device: str, sequence_len: int) -> str | None:
    """The attention to set on a model of this transformers config, or None to leave it its own."""
    window = getattr(config, "sliding_window", None) or 0
    plain = not any(getattr(config, name, None) for name in MORE_THAN_CAUSAL if name != "sliding_window")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not plain or (0 < window < sequence_len) or layers != {"full_attention"}:
        return None
    if device == "cpu":
        return CPU
    return CUDA if "window_size" in _varlen_parameters() and not getattr(config, "attention_dropout", 0) else None


@lru_cache(maxsize=1)
def _varlen_parameters() -> frozenset[str]:
    """The parameters of torch's kernel (2.10 takes no window, some versions no shared keys); empty without a kernel."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def register() -> None:
    """Register both with transformers, without masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, attention in ((CPU, rows_on_cpu), (CUDA, rows_on_cuda)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def rows_on_cpu(
    _module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, *,
    scaling: float, cu_seq_lens_q: torch.Tensor, dropout: float = 0.0, shared_prefix: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention row by row; with `shared_prefix` every row also sees the first one, whole.

    Shapes: query (1, heads, tokens, d), key and value (1, kv heads, tokens, d); returns (1, tokens, heads, d).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    lengths = [length for length in cu_seq_lens_q.diff().tolist() if length]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    answers = []
    for at, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        if shared_prefix and at:
            k, v = torch.cat([keys[0], k], dim=2), torch.cat([values[0], v], dim=2)  # noqa: PLW2901
        if k.shape[2] <= LONGEST_PLAIN and not dropout:
            answers.append(_plain(q, k, v, scaling))
        else:
            mask = _later(q.shape[2], k.shape[2], q.dtype)
            answers.append(
                scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout, enable_gqa=True)
            )
    return torch.cat(answers, dim=2).transpose(1, 2).contiguous(), None


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax attention by matrix products; the heads that share a key are rows of one product."""
    import torch

    batch, heads, tokens, size = query.shape
    key_heads, keys = key.shape[1:3]
    queries = (query * scaling).reshape(batch, key_heads, heads // key_heads * tokens, size)
    scores = (queries @ key.transpose(2, 3)).view(batch, heads, tokens, keys)
    weights = torch.softmax(scores + _later(tokens, keys, query.dtype), dim=-1)
    return (weights.view(batch, key_heads, -1, keys) @ value).view(batch, heads, tokens, size)


@lru_cache(maxsize=256)
def _later(tokens: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Minus infinity for every key behind its query; the queries are the last `tokens` of `keys`."""
    import torch

    return torch.full((tokens, keys), float("-inf"), dtype=dtype).triu(keys - tokens + 1)


def rows_on_cuda(
    _module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, *,
    scaling: float, cu_seq_lens_q: torch.Tensor, max_length_q: int, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention over all rows by the flash kernel; shapes as `rows_on_cpu`, no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    options = {"enable_gqa": True} if groups > 1 and "enable_gqa" in _varlen_parameters() else {}
    if groups > 1 and not options:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    answer = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), cu_seq_lens_q, cu_seq_lens_q,
        max_length_q, max_length_q, scale=scaling, window_size=(-1, 0), **options,
    )  # fmt: skip
    return answer.unsqueeze(0), None
