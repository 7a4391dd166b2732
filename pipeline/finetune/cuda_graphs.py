"""Passes as CUDA graphs: one launch where there were thousands, which take a CPU longer to say than a GPU to do.

A graph replays the same kernels on the same addresses, so passes are padded to a few shapes: tokens that nobody
attends to, targets that carry no loss. The first pass of all runs as it is, so that every kernel is there; from then on each
shape is recorded when it first comes. Graphs share their memory, but a larger pass can't use what smaller ones took: where
it finds no room beside theirs, all are recorded anew, itself first. Dropout has new masks at every replay, because its seeds
are data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import out_of_memory, program
from pipeline.finetune import fused_lora, memory
from pipeline.finetune import loss as finetune_loss
from pipeline.finetune import model as finetune_model
from pipeline.finetune.loss import Pass
from pipeline.finetune.packing import IGNORED, Row

if TYPE_CHECKING:
    import torch

ROWS = 64
KEPT = 32


class Shape(NamedTuple):
    """The sizes of a padded pass: tokens, trained tokens, rows."""

    tokens: int
    trained: int
    rows: int


def shape_of(it: Pass) -> Shape:
    """The shape that a pass is padded to: the next multiples, with one row at least for the padding.

    Trained tokens come in quarters of all tokens.
    """
    tokens = _next(len(it.ids), memory.step(len(it.ids)))
    return Shape(tokens, _next(len(it.at), tokens // 4), _next(len(it.ends), ROWS))


def padded(it: Pass, shape: Shape, longest: int) -> Pass:
    """The pass in this shape: one more row of padding, and targets that carry no loss; `longest` row a pass may have."""
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
        longest=max(longest, memory.LONG_STEP),
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
        self._warm, self.works = False, True
        self._recorded: dict[Shape, _Recorded] = {}
        self._pool: Any = None

    def __call__(self, rows: Sequence[Row], trained: int) -> torch.Tensor:
        """The rows' loss summed over their trained tokens, a `trained`-th of it, its gradient added; a scalar on the GPU."""
        it = finetune_loss.inputs(rows, self._hardware)
        fused_lora.draw(self._model)
        shape = shape_of(it)
        if self._warm and self.works and shape not in self._recorded:
            self._try(it, shape)
        recorded = self._recorded.pop(shape, None)
        if recorded is None:
            return self._as_it_is(it, 1 / trained)
        self._recorded[shape] = recorded  # the last in order; the first is dropped when there are too many
        return recorded.replay(padded(it, shape, self._longest), 1 / trained)

    def _as_it_is(self, it: Pass, scale: float) -> torch.Tensor:
        """Without a graph; after the first pass of all the memory that it took is given to the graphs."""
        import torch

        loss = self._add(finetune_loss.to_device(it, self._hardware.device), scale)
        if not self._warm:
            torch.cuda.empty_cache()
        self._warm = True
        return loss

    def _try(self, it: Pass, shape: Shape) -> None:
        """Record the shape; a model that can't be recorded runs as it is from then on."""
        import torch

        if len(self._recorded) == KEPT:
            del self._recorded[next(iter(self._recorded))]
        it, others = padded(it, shape, self._longest), len(self._recorded)
        failed = self._recording(it, shape)
        if failed is not None and others and out_of_memory.is_told_by(failed):
            self._forget()
            failed = self._recording(it, shape)
        if failed is None:
            return
        self._forget()
        if out_of_memory.is_told_by(failed):
            raise torch.OutOfMemoryError(failed)
        self.works = False
        program.message(f"training goes on without CUDA graphs: {failed.splitlines()[0]}")

    def _recording(self, it: Pass, shape: Shape) -> str | None:
        """Record a padded pass; what went wrong, in words alone, because an error holds the tensors where it was raised."""
        try:
            self._recorded[shape] = self._record(it)
        except RuntimeError as error:
            return out_of_memory.told(error) or str(error)
        return None

    def _forget(self) -> None:
        """Give the graphs' memory back. A recording that failed may have left its stream the current one."""
        import torch

        torch.cuda.set_stream(torch.cuda.default_stream())
        self._recorded.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _record(self, it: Pass) -> _Recorded:
        """Capture a padded pass; it adds nothing yet. Kernels that it alone needs may be loaded meanwhile."""
        import torch

        static = finetune_loss.to_device(it, self._hardware.device)
        scale = torch.ones((), device=self._hardware.device)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"):
            loss = self._add(static, scale)
        self._pool = graph.pool()
        return _Recorded(graph, static, scale, loss)

    def _add(self, it: Pass, scale: float | torch.Tensor) -> torch.Tensor:
        import torch

        loss = finetune_loss.loss_of(self._model, it, self._hardware) * scale
        found = torch.autograd.grad(loss, self._weights)
        torch._foreach_add_(self._gradients, found)
        return loss.detach()


class _Recorded(NamedTuple):
    """A graph, the tensors that it reads, and the loss that it writes."""

    graph: Any
    inputs: Pass
    scale: torch.Tensor
    loss: torch.Tensor

    def replay(self, it: Pass, scale: float) -> torch.Tensor:
        """Run it on another pass of its shape; the loss, which no later replay changes."""
        for place, tensor in zip(self.inputs.tensors, it.tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        self.scale.fill_(scale)
        self.graph.replay()
        return self.loss.clone()
