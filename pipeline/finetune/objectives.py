"""The objectives of training as a table: which rows an adapter learns from, by which loss, and which metrics it reports.

A new objective takes a module, an entry here, its name in `FinetuneConfig.objective`, a page of docs, and tests. Modules are
named, not imported: the table needs the standard library alone, and a stage's key still holds their source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from pipeline.config.schema import FinetuneConfig
    from pipeline.finetune.packing import Row
    from pipeline.finetune.rows import Rows


class RowsModule(Protocol):
    """Reads prepared rows as token rows. A row has `length`, its tokens, and `trained`, its share of a batch's loss."""

    def read(self, base: Path, splits: Path, extra: Path | None, settings: FinetuneConfig, sequence_len: int) -> Rows:
        """The rows to train and to validate on."""

    def encoder(self, base: Path, settings: FinetuneConfig, sequence_len: int) -> Callable[[Path], list[Row]]:
        """A function from a file of prepared rows to token rows."""


class LossModule(Protocol):
    """Computes the loss of rows in passes of a limited size."""

    def passes(self, rows: Sequence[Row], execution: Any, most: int | None = None) -> list[list[Row]]:
        """The rows cut into passes."""

    def summed_loss(self, model: Any, rows: Sequence[Row], execution: Any) -> torch.Tensor:
        """The loss of one pass, times the sum of its rows' `trained`; with gradient."""

    def mean_loss(self, model: Any, parts: Sequence[Sequence[Row]], execution: Any) -> float:
        """The loss of all passes, divided by the sum of their rows' `trained`; without dropout or gradient."""


@dataclass(frozen=True)
class Objective:
    """One objective: the modules that do it, the names and the unit of its two losses.

    `is_cross_entropy`: the loss is cross entropy at labels of one stream of tokens. The fused output layer and CUDA graphs compute
    that alone.
    """

    rows: str
    loss: str
    unit: str
    train_metric: str = "train_loss"
    eval_metric: str = "eval_loss"
    is_cross_entropy: bool = False

    @property
    def metrics(self) -> tuple[str, str]:
        """The losses that a run reports, in training and in validation."""
        return self.train_metric, self.eval_metric

    def rows_module(self) -> RowsModule:
        """The module that reads its rows."""
        return cast("RowsModule", import_module(self.rows))

    def loss_module(self) -> LossModule:
        """The module that computes its loss."""
        return cast("LossModule", import_module(self.loss))


SFT = "sft"
OBJECTIVES: dict[str, Objective] = {
    SFT: Objective(
        rows="pipeline.finetune.rows", loss="pipeline.finetune.loss", unit="loss a token (nats)", is_cross_entropy=True
    ),
}
