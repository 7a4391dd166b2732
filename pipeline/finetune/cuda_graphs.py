"""Run each pass as a CUDA graph: one launch instead of thousands, when launching costs more than computing.

- A graph replays the same kernels on the same addresses. Passes are therefore padded to a few shapes: tokens that no row attends to,
  targets without loss.
- The first pass of all runs without a graph, so that every kernel is loaded. Each shape is recorded when it first comes.
- Graphs share their memory, but a larger pass can't use the memory of smaller ones. Where it finds no room beside them, all are
  recorded again, the larger one first.
- Dropout has new masks at every replay, because its seeds are data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import out_of_memory, program
from pipeline.finetune import fused_lora, memory
from pipeline.finetune import loss as finetune_loss
from pipeline.finetune.execution import Execution
from pipeline.finetune.loss import Pass
from pipeline.finetune.packing import IGNORED, Row

if TYPE_CHECKING:
    import torch

ROWS = 64
KEPT = 32


class Shape(NamedTuple):
    """The sizes of a padded pass: tokens, tokens with loss, rows."""

    tokens: int
    targets: int
    rows: int


def shape_of(stream: Pass) -> Shape:
    """The shape that a pass is padded to: the next multiples, with one row at least for the padding.

    Tokens with loss come in quarters of all tokens.
    """
    tokens = _next(len(stream.ids), memory.step(len(stream.ids)))
    return Shape(tokens, _next(len(stream.at), tokens // 4), _next(len(stream.ends), ROWS))


def padded(stream: Pass, shape: Shape, longest: int) -> Pass:
    """The pass in this shape: one more row of padding, and targets without loss; `longest` is the longest row of any pass."""
    import torch

    tokens, rows = len(stream.ids), len(stream.ends) - 1
    filler = shape.tokens - tokens
    ends = torch.full((shape.rows + 1,), shape.tokens, dtype=stream.ends.dtype)
    ends[: rows + 1] = stream.ends
    pad = torch.nn.functional.pad
    return Pass(
        ids=pad(stream.ids, (0, filler)),
        positions=torch.cat([stream.positions, torch.arange(filler)]),
        ends=ends,
        at=pad(stream.at, (0, shape.targets - len(stream.at))),
        targets=pad(stream.targets, (0, shape.targets - len(stream.targets)), value=IGNORED),
        longest=max(longest, memory.LONG_STEP),
    )


def _next(number: int, step: int) -> int:
    return -(-number // step) * step


class Graphs:
    """Adds the gradients of passes to `gradients`, by graphs where it can; the addresses of `gradients` never change."""

    def __init__(
        self,
        model: Any,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        execution: Execution,
        longest: int,
    ) -> None:
        self._model, self._weights, self._gradients = model, list(weights), list(gradients)
        self._execution, self._longest = execution, longest
        self._warm, self.works = False, True
        self._recorded: dict[Shape, _Recorded] = {}
        self._pool: Any = None

    def __call__(self, rows: Sequence[Row], divisor: int) -> torch.Tensor:
        """Add the gradient of the rows' summed loss / divisor; returns that loss, a scalar on the GPU."""
        stream = finetune_loss.inputs(rows, self._execution)
        fused_lora.draw(self._model)
        shape = shape_of(stream)
        if self._warm and self.works and shape not in self._recorded:
            self._try(stream, shape)
        recording = self._recorded.pop(shape, None)
        if recording is None:
            return self._without_graph(stream, 1 / divisor)
        self._recorded[shape] = recording  # the last in order; the first is dropped when there are too many
        return recording.replay(padded(stream, shape, self._longest), 1 / divisor)

    def _without_graph(self, stream: Pass, scale: float) -> torch.Tensor:
        """Run a pass as it is; the first pass of all then leaves its memory to the graphs."""
        import torch

        loss = self._add(finetune_loss.to_device(stream, self._execution.device), scale)
        if not self._warm:
            torch.cuda.empty_cache()
        self._warm = True
        return loss

    def _try(self, stream: Pass, shape: Shape) -> None:
        """Record the shape; a model that can't be recorded runs without graphs from then on."""
        import torch

        if len(self._recorded) == KEPT:
            del self._recorded[next(iter(self._recorded))]
        stream, count = padded(stream, shape, self._longest), len(self._recorded)
        error = self._recording(stream, shape)
        if error is not None and count and out_of_memory.is_told_by(error):
            self._forget()
            error = self._recording(stream, shape)
        if error is None:
            return
        self._forget()
        if out_of_memory.is_told_by(error):
            raise torch.OutOfMemoryError(error)
        self.works = False
        program.message(f"training goes on without CUDA graphs: {error.splitlines()[0]}")

    def _recording(self, stream: Pass, shape: Shape) -> str | None:
        """Record a padded pass; the error's text if it fails. An error itself would hold the tensors where it was raised."""
        try:
            self._recorded[shape] = self._record(stream)
        except RuntimeError as error:
            return out_of_memory.told(error) or str(error)
        return None

    def _forget(self) -> None:
        """Return the graphs' memory, and to the default stream: a recording that failed may have left its own current."""
        import torch

        torch.cuda.set_stream(torch.cuda.default_stream())
        self._recorded.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _record(self, stream: Pass) -> _Recorded:
        """Capture a padded pass, which adds nothing yet; kernels that this pass alone needs may be loaded meanwhile."""
        import torch

        static = finetune_loss.to_device(stream, self._execution.device)
        scale = torch.ones((), device=self._execution.device)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"):
            loss = self._add(static, scale)
        self._pool = graph.pool()
        return _Recorded(graph, static, scale, loss)

    def _add(self, stream: Pass, scale: float | torch.Tensor) -> torch.Tensor:
        import torch

        loss = finetune_loss.loss_of(self._model, stream, self._execution) * scale
        gradients = torch.autograd.grad(loss, self._weights)
        torch._foreach_add_(self._gradients, gradients)
        return loss.detach()


class _Recorded(NamedTuple):
    """A graph, the tensors that it reads, and the loss that it writes."""

    graph: Any
    inputs: Pass
    scale: torch.Tensor
    loss: torch.Tensor

    def replay(self, stream: Pass, scale: float) -> torch.Tensor:
        """Run it on another pass of its shape; the loss, which no later replay changes."""
        for place, tensor in zip(self.inputs.tensors, stream.tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        self.scale.fill_(scale)
        self.graph.replay()
        return self.loss.clone()
