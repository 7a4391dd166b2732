"""Training over several processes of one host: which process takes which rows, and which sums they share.

- A step's rows are those of a single process, dealt by tokens.
- Its loss is the sum over all processes, divided by the sum of all rows' `trained`; the gradients are summed in one all-reduce.
- One and several processes thus do the same step, up to the order of sums and to dropout, which each process draws for itself.
- Adapter and optimizer are whole in every process: a checkpoint is one process's.

The set-up is accelerate's. Runs in the train environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline.errors import StageFailed

if TYPE_CHECKING:
    import torch

    from pipeline.finetune.packing import Row

PATIENCE = timedelta(minutes=30)  # for a partner that still loads its model or writes a checkpoint
PARTNER_GONE = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


@dataclass(frozen=True)
class Group:
    """The processes that train together: `size` of them, of which this one is number `rank`; alone by default."""

    rank: int = 0
    size: int = 1

    def share(self, rows: Sequence[Row]) -> list[Row]:
        """This process's part of the rows."""
        return [rows[number] for number in shares([row.length for row in rows], self.size)[self.rank]]

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one exchange."""
        import torch

        tensors = list(tensors)
        if self.size == 1:
            return
        flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))

    def total(self, number: float, device: str) -> float:
        """The sum of a number over all processes."""
        import torch

        if self.size == 1:
            return number
        tensor = torch.tensor([number], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(tensor)
        return float(tensor)

    def most(self, number: int, device: str) -> int:
        """The largest of the processes' numbers."""
        import torch

        if self.size == 1:
            return number
        tensor = torch.tensor([number], device=device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def must_agree(self, weights: Mapping[str, torch.Tensor], step: int) -> None:
        """Raise StageFailed when the processes' adapters differ: each would go on training its own."""
        import torch

        if self.size == 1:
            return
        sums = torch.stack([weight.detach().double().abs().sum() for weight in weights.values()])
        low, high = sums.clone(), sums.clone()
        torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise StageFailed(
                f"step {step}: the adapter differs between the {self.size} processes",
                key="finetune.num_processes",
                remedy="run the same command on GPUs of one kind, which goes on from the last checkpoint, or set"
                " finetune.num_processes: 1, which begins anew",
            )


def join() -> Group:
    """Meet the other processes that `launch` started, and take this one's GPU."""
    import torch
    from accelerate import PartialState

    from pipeline.finetune import launch  # here because a plan counts memory, and starts no process

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    PartialState(
        cpu=not torch.cuda.is_available(), init_method=f"file://{os.environ[launch.MEETING]}",
        rank=rank, world_size=size, timeout=PATIENCE,
    )  # fmt: skip
    return Group(rank, size)


def leave() -> None:
    """Close the connections."""
    from accelerate import PartialState

    PartialState().destroy_process_group()


def is_loss_of_a_partner(error: RuntimeError) -> bool:
    """Whether an exchange failed, as it does when another process is gone."""
    import torch

    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(words in text for words in PARTNER_GONE)


def size() -> int:
    """How many processes this one has met; 1 before `join`."""
    import torch

    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    return 1 if alone else int(torch.distributed.get_world_size())


def least(number: float, device: str) -> float:
    """The smallest of the processes' numbers, for decisions that all must take alike; the number itself before `join`."""
    import torch

    if size() == 1:
        return number
    tensor = torch.tensor([number], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN)
    return float(tensor)


def shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The numbers of rows, dealt to `size` processes, longest first, each to the one with the fewest tokens; in order within."""
    parts: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        to = min(range(size), key=lambda rank: tokens[rank])
        parts[to].append(number)
        tokens[to] += lengths[number]
    return [sorted(numbers) for numbers in parts]
