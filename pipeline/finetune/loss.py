"""The loss that training lowers, of rows that pass through the model together; and its mean over rows, as validation has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.finetune import fused_loss, packing
from pipeline.finetune import model as finetune_model
from pipeline.finetune.packing import IGNORED, Row

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pass:
    """What one pass takes, as tensors.

    `ids` and `positions` (tokens,), `ends` (rows + 1,) where each row begins in the stream, `at` (trained,) the tokens that
    predict a trained one, and `targets` (trained,) what they should predict.
    `longest` is the longest row's length in tokens; `has_prefix` says that the first row is what all others begin with.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    at: torch.Tensor
    targets: torch.Tensor
    longest: int
    has_prefix: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The five of them."""
        return self.ids, self.positions, self.ends, self.at, self.targets


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
    return loss_of(model, to_device(inputs(rows, hardware), hardware.device), hardware)


def inputs(rows: Sequence[Row], hardware: finetune_model.Hardware) -> Pass:
    """The rows behind each other as one stream, on the CPU."""
    import torch

    prefix = packing.shared_prefix(rows) if hardware.shares_prefixes else 0
    segments = [range(prefix), *(range(prefix, len(row.input_ids)) for row in rows)][0 if prefix else 1 :]
    lengths = torch.tensor([len(segment) for segment in segments], dtype=torch.int32)
    labels = [IGNORED] * prefix + [it for row in rows for it in (*row.labels[prefix + 1 :], IGNORED)]
    targets = torch.tensor(labels)
    at = (targets != IGNORED).nonzero().flatten()
    return Pass(
        ids=torch.tensor([*rows[0].input_ids[:prefix], *(it for row in rows for it in row.input_ids[prefix:])]),
        positions=torch.tensor([at for segment in segments for at in segment]),
        ends=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        at=at,
        targets=targets[at],
        longest=int(lengths.max()),
        has_prefix=bool(prefix),
    )


def to_device(it: Pass, device: str) -> Pass:
    """The same pass there."""
    ids, positions, ends, at, targets = (tensor.to(device, non_blocking=True) for tensor in it.tensors)
    return Pass(ids, positions, ends, at, targets, it.longest, it.has_prefix)


def loss_of(model: Any, it: Pass, hardware: finetune_model.Hardware) -> torch.Tensor:
    """Cross entropy summed over the pass's trained tokens, in nats."""
    import torch

    dtype = getattr(torch, hardware.dtype)
    prefixed = {"shared_prefix": True} if it.has_prefix else {}
    with torch.autocast(hardware.device, dtype, enabled=dtype != torch.float32):
        logits = model(
            input_ids=it.ids[None], position_ids=it.positions[None], use_cache=False, logits_to_keep=it.at,
            cu_seq_lens_q=it.ends, cu_seq_lens_k=it.ends, max_length_q=it.longest, max_length_k=it.longest, **prefixed,
        ).logits[0]  # fmt: skip
    if hardware.fused_loss:  # they are hidden states then
        return fused_loss.summed(logits, model.get_output_embeddings().weight, it.targets)
    return torch.nn.functional.cross_entropy(logits.float(), it.targets, reduction="sum", ignore_index=IGNORED)
