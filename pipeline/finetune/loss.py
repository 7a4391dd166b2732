"""The loss of supervised fine-tuning (sft): cross entropy of rows that pass through the model together, and its mean over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.finetune import fused_loss, packing
from pipeline.finetune import model as finetune_model
from pipeline.finetune.execution import Execution
from pipeline.finetune.packing import IGNORED, Row

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pass:
    """One pass through the model, as tensors of one stream: rows behind each other.

    - `ids`, `positions` (tokens,);
    - `ends` (rows + 1,): where each row begins in the stream, and the stream's end;
    - `at` (targets,): the tokens that predict one with loss; `targets` (targets,): the tokens to predict;
    - `longest`: the longest row, in tokens;
    - `has_prefix`: the first row is the beginning of all others.
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


def passes(rows: Sequence[Row], execution: Execution, most: int | None = None) -> list[list[Row]]:
    """The rows cut into passes of at most `most` rows, and of as many tokens as the execution takes at once."""
    lengths = [row.length for row in rows]
    parts = packing.passes(range(len(rows)), lengths, tokens=execution.tokens_a_pass, most=most)
    return [[rows[number] for number in numbers] for numbers in parts]


def mean_loss(model: Any, parts: Sequence[Sequence[Row]], execution: Execution) -> float:
    """Cross entropy a token with loss, in nats, over all passes; without dropout or gradient."""
    with finetune_model.without_dropout(model):
        total = sum(float(summed_loss(model, rows, execution)) for rows in parts)
    return total / sum(row.trained for rows in parts for row in rows)


def summed_loss(model: Any, rows: Sequence[Row], execution: Execution) -> torch.Tensor:
    """Cross entropy summed over the rows' tokens with loss, in nats; logits are computed at those tokens alone.

    On a CPU the rows' common beginning, such as a system prompt, goes through the model once, and every row attends to it. Loss and
    gradient are the same for fewer tokens; dropout draws for the beginning once, too.
    """
    return loss_of(model, to_device(inputs(rows, execution), execution.device), execution)


def inputs(rows: Sequence[Row], execution: Execution) -> Pass:
    """The rows behind each other as one stream, on the CPU; first their common beginning, where it is shared."""
    import torch

    prefix = packing.shared_prefix(rows) if execution.shares_prefixes else 0
    segments = [range(prefix, row.length) for row in rows]
    if prefix:
        segments.insert(0, range(prefix))
    lengths = torch.tensor([len(segment) for segment in segments], dtype=torch.int32)
    labels = [IGNORED] * prefix + [label for row in rows for label in (*row.labels[prefix + 1 :], IGNORED)]
    targets = torch.tensor(labels)
    at = (targets != IGNORED).nonzero().flatten()
    return Pass(
        ids=torch.tensor([*rows[0].input_ids[:prefix], *(token for row in rows for token in row.input_ids[prefix:])]),
        positions=torch.tensor([position for segment in segments for position in segment]),
        ends=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        at=at,
        targets=targets[at],
        longest=int(lengths.max()),
        has_prefix=bool(prefix),
    )


def to_device(stream: Pass, device: str) -> Pass:
    """The same pass there."""
    ids, positions, ends, at, targets = (tensor.to(device, non_blocking=True) for tensor in stream.tensors)
    return Pass(ids, positions, ends, at, targets, stream.longest, stream.has_prefix)


def loss_of(model: Any, stream: Pass, execution: Execution) -> torch.Tensor:
    """Cross entropy summed over the pass's targets, in nats."""
    import torch

    dtype = getattr(torch, execution.dtype)
    prefix = {"shared_prefix": True} if stream.has_prefix else {}
    with torch.autocast(execution.device, dtype, enabled=dtype != torch.float32):
        logits = model(
            input_ids=stream.ids[None], position_ids=stream.positions[None], use_cache=False, logits_to_keep=stream.at,
            cu_seq_lens_q=stream.ends, cu_seq_lens_k=stream.ends,
            max_length_q=stream.longest, max_length_k=stream.longest, **prefix,
        ).logits[0]  # fmt: skip
    if execution.fused_loss:  # they are hidden states then
        return fused_loss.summed(logits, model.get_output_embeddings().weight, stream.targets)
    return torch.nn.functional.cross_entropy(logits.float(), stream.targets, reduction="sum", ignore_index=IGNORED)
