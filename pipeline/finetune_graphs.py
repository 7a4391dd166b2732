"""A small model's passes as CUDA graphs: one launch where there were thousands, each longer in the making than in the doing.

A graph replays the same kernels on the same addresses, so passes are padded to a few shapes: tokens that nobody
attends to, targets that carry no loss. A shape is recorded when it comes a second time; the first time, and shapes beyond
the number kept, run as they are. Dropout has new masks at every replay, because its seeds are data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import finetune_lora, finetune_loss, finetune_model, out_of_memory, program
from pipeline.finetune_loss import Pass
from pipeline.packing import IGNORED, Row

if TYPE_CHECKING:
    import torch

TOKENS, TRAINED, ROWS = 512, 256, 64
KEPT = 12
WARM_UPS = 2


class Shape(NamedTuple):
    """The sizes of a padded pass: tokens, trained tokens, rows."""

    tokens: int
    trained: int
    rows: int


def shape_of(it: Pass) -> Shape:
    """The shape that a pass is padded to: the next multiples, with one row at least for the padding."""
    return Shape(_next(len(it.ids), TOKENS), _next(len(it.at), TRAINED), _next(len(it.ends), ROWS))


def padded(it: Pass, shape: Shape, longest: int) -> Pass:
    """The pass in this shape: further rows of padding, none longer than TOKENS, and targets that carry no loss."""
    import torch

    tokens, rows = len(it.ids), len(it.ends) - 1
    filler = shape.tokens - tokens
    ends = torch.full((shape.rows + 1,), shape.tokens, dtype=it.ends.dtype)
    ends[: rows + 1] = it.ends
    pad = torch.nn.functional.pad
    return Pass(
        ids=pad(it.ids, (0, filler)),
        positions=torch.cat([it.positions, torch.arange(filler)]),
        ends=ends,
        at=pad(it.at, (0, shape.trained - len(it.at))),
        targets=pad(it.targets, (0, shape.trained - len(it.targets)), value=IGNORED),
        longest=max(longest, TOKENS),
    )


def _next(number: int, step: int) -> int:
    return -(-number // step) * step


class Graphs:
    """Adds the gradients of passes to `gradients`, which lie where they lie for good, by graphs where it can."""

    def __init__(
        self,
        model: Any,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        hardware: finetune_model.Hardware,
        longest: int,
    ) -> None:
        self._model, self._weights, self._gradients = model, list(weights), list(gradients)
        self._hardware, self._longest = hardware, longest
        self._most = KEPT
        self._seen: set[Shape] = set()
        self._recorded: dict[Shape, _Recorded] = {}
        self._pool: Any = None

    def __call__(self, rows: Sequence[Row], trained: int) -> torch.Tensor:
        """The rows' loss summed over their trained tokens, a `trained`-th of it, its gradient added; a scalar on the GPU."""
        it = finetune_loss.inputs(rows, self._hardware)
        shape = shape_of(it)
        finetune_lora.draw(self._model)
        recorded = self._recorded.get(shape) or self._recorded_now(it, shape)
        if recorded is None:
            return self._add(finetune_loss.to_device(it, self._hardware.device), 1 / trained)
        for place, tensor in zip(recorded.inputs.tensors, padded(it, shape, self._longest).tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        recorded.scale.fill_(1 / trained)
        recorded.graph.replay()
        return recorded.loss.clone()

    def _recorded_now(self, it: Pass, shape: Shape) -> _Recorded | None:
        """The shape's graph if it is time for one; a model that can't be recorded runs as it is from then on."""
        if shape not in self._seen or len(self._recorded) >= self._most:
            self._seen.add(shape)
            return None
        try:
            self._recorded[shape] = self._record(padded(it, shape, self._longest))
        except RuntimeError as error:
            if any(words in str(error) for words in out_of_memory.WORDS):
                raise
            self._most = 0
            program.message(f"training goes on without CUDA graphs: {str(error).splitlines()[0]}")
            return None
        return self._recorded[shape]

    def _add(self, it: Pass, scale: float | torch.Tensor) -> torch.Tensor:
        import torch

        loss = finetune_loss.loss_of(self._model, it, self._hardware) * scale
        found = torch.autograd.grad(loss, self._weights)
        torch._foreach_add_(self._gradients, found)
        return loss.detach()

    def _record(self, it: Pass) -> _Recorded:
        """Capture a padded pass; nothing is added to the gradients yet."""
        import torch

        static = finetune_loss.to_device(it, self._hardware.device)
        scale = torch.ones((), device=self._hardware.device)
        kept = [gradient.clone() for gradient in self._gradients]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what kernels make for themselves when they first run isn't to be recorded
            for _ in range(WARM_UPS):
                self._add(static, scale)
        torch.cuda.current_stream().wait_stream(side)
        torch._foreach_copy_(self._gradients, kept)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph's memory is its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._add(static, scale)
        self._pool = graph.pool()
        return _Recorded(graph, static, scale, loss)


class _Recorded(NamedTuple):
    graph: Any
    inputs: Pass
    scale: torch.Tensor
    loss: torch.Tensor
