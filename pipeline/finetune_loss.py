"""The loss that training lowers, of rows that pass through the model together; and its mean over rows, as validation has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline import finetune_model, packing
from pipeline.packing import IGNORED, Row

if TYPE_CHECKING:
    import torch


def passes(rows: Sequence[Row], hardware: finetune_model.Hardware, most: int | None = None) -> list[list[Row]]:
    """The rows cut into passes through the model: of at most `most` rows, and of as many tokens as the hardware takes."""
    lengths = [len(row.input_ids) for row in rows]
    cut = packing.passes(range(len(rows)), lengths, tokens=hardware.tokens_a_pass, most=most)
    return [[rows[number] for number in some] for some in cut]


def mean_loss(model: Any, cut: Sequence[Sequence[Row]], hardware: finetune_model.Hardware) -> float:
    """Cross entropy a trained token, in nats, over all passes of `cut`; without dropout or gradient."""
    with finetune_model.without_dropout(model):
        total = sum(float(summed_loss(model, rows, hardware)) for rows in cut)
    return total / sum(row.trained for rows in cut for row in rows)


def summed_loss(model: Any, rows: Sequence[Row], hardware: finetune_model.Hardware) -> torch.Tensor:
    """Cross entropy summed over the rows' trained tokens, in nats; logits are made at those tokens alone.

    On a CPU the tokens that all rows begin with, such as a system prompt, go through the model once, and
    every row attends to them: the same loss and gradient for fewer tokens. Dropout draws for them once, too.
    """
    import torch

    prefix = packing.shared_prefix(rows) if hardware.shares_prefixes else 0
    segments = [range(prefix), *(range(prefix, len(row.input_ids)) for row in rows)][0 if prefix else 1 :]
    lengths = torch.tensor([len(segment) for segment in segments], dtype=torch.int32)
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    positions = torch.tensor([at for segment in segments for at in segment])
    ids = torch.tensor([*rows[0].input_ids[:prefix], *(it for row in rows for it in row.input_ids[prefix:])])
    labels = [IGNORED] * prefix + [it for row in rows for it in (*row.labels[prefix + 1 :], IGNORED)]
    targets = torch.tensor(labels)
    at = (targets != IGNORED).nonzero().flatten()
    ends, ids, positions, targets, at = (
        it.to(hardware.device, non_blocking=True) for it in (ends, ids, positions, targets, at)
    )
    dtype, longest = getattr(torch, hardware.dtype), int(lengths.max())
    only_ours = {"shared_prefix": True} if prefix else {}
    with torch.autocast(hardware.device, dtype, enabled=dtype != torch.float32):
        logits = model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=at,
            cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest, **only_ours,
        ).logits[0]  # fmt: skip
    return torch.nn.functional.cross_entropy(logits.float(), targets[at], reduction="sum")
