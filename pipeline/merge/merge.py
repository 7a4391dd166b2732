"""Stage program: the adapter into its base, by the way to merge that keeps more of what was learned.

    python -m pipeline.merge.merge REQUEST.json

Training saw the base's linear layers in 4 bits. An adapter is merged into those values (`dequantized`) or into the base's own
(`original`); the better way differs from model to model. `merge_base: auto` measures the loss of both on the validation rows, with
the objective's own labels and arithmetic, and writes the lower one. The holdout plays no part: it has to test the choice.

The two are compared in memory: one folder is written. Without validation rows, or after training in 16 bits, `auto` is the original
base. Tokenizer and template are copied byte for byte.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pipeline import out_of_memory, program
from pipeline.artifacts import Artifact
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ModelError
from pipeline.finetune import model as finetune_model
from pipeline.finetune.objectives import OBJECTIVES
from pipeline.finetune.packing import Row
from pipeline.merge import weights as merge_weights
from pipeline.merge.weights import Adapter, Nf4, Way
from pipeline.model import weights

if TYPE_CHECKING:
    import torch


MORE_MEMORY = "end other programs that use the memory or the GPU, and run again: merging takes one layer at a time"


@dataclass
class Tally:
    """The change by merging: the largest one, sums of squares, how many bf16 values changed, layers without a change."""

    largest: float = 0.0
    squares: float = 0.0
    base_squares: float = 0.0
    changes: int = 0
    values: int = 0
    unchanged_layers: list[str] = field(default_factory=list)

    def add(self, name: str, base: torch.Tensor, result: torch.Tensor) -> None:
        """Count one layer; both in the dtype that is written."""
        delta = result.float() - base.float()
        changes = int((delta != 0).sum())
        self.largest = max(self.largest, float(delta.abs().max()))
        self.squares += float(delta.square().sum())
        self.base_squares += float(base.float().square().sum())
        self.changes += changes
        self.values += delta.numel()
        self.unchanged_layers += [] if changes else [name]


def run(request: program.Request) -> dict[str, Any]:
    """The stage: merge the adapter `finetune` into the model `base`.

    Detail: `merge_base`, the way; `val_loss/original` and `val_loss/dequantized`, the losses of `val_rows` rows where both were
    compared, in the objective's unit; figures of the change.

    Raises ModelError when the adapter belongs to another base, fits no layer, changes nothing or isn't finite; ConfigError for
    `dequantized` after training without 4 bits; ResourceError when memory doesn't suffice, to compare both ways or to merge.
    """
    base, finetune = Artifact(**request.inputs["base"]), Artifact(**request.inputs["finetune"])
    _check_parent(base, finetune)
    shapes = {name: tensor.shape for name, tensor in weights.tensors(base.payload).items()}
    adapter = merge_weights.read_adapter(finetune.payload, shapes)
    settings = FinetuneConfig(**request.config["finetune"])
    way, losses = _choose(request, base.payload, adapter, settings)
    nf4 = Nf4(base.payload, settings) if way == "dequantized" else None
    shutil.rmtree(request.folder / "payload", ignore_errors=True)  # of a killed run
    folder = request.payload
    for path in sorted(base.payload.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors" and path.name != weights.INDEX:
            target = folder / path.relative_to(base.payload)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    with out_of_memory.named(f"merging into the {way} base", "merge.merge_base", MORE_MEMORY):
        tally = _merge(base.payload, shapes, adapter, nf4, folder)
    return {
        "merge_base": way,
        **losses,
        "layers": len(adapter.pairs),
        "scaling": adapter.scaling,
        "max_abs_delta": tally.largest,
        "relative_delta": (tally.squares / tally.base_squares) ** 0.5,
        "moved_share": tally.changes / tally.values,
        "unmoved_layers": tally.unchanged_layers,
        **{
            key: base.detail[key]
            for key in (
                "architecture",
                "parameters",
                "hidden_size",
                "eos_token",
                "eos_token_id",
                "pad_token",
                "licence",
                "quantized_from",
            )
            if key in base.detail
        },
    }


def _choose(
    request: program.Request, base: Path, adapter: Adapter, settings: FinetuneConfig
) -> tuple[Way, dict[str, float]]:
    """The way to merge, and the losses that decided; none where there is no choice."""
    setting = request.config["merge"]["merge_base"]
    if setting != "auto":
        return setting, {}
    if not settings.load_in_4bit:
        program.message("merged into the original base: training in 16 bits saw no other")
        return "original", {}
    sequence_len = request.config["sequence_len"]
    encode_file = OBJECTIVES[settings.objective].rows_module().encoder(base, settings, sequence_len)
    val = Artifact(**request.inputs["prepare"]).payload / "val.jsonl"
    rows = [row for row in encode_file(val) if row.trained]
    if not rows:
        program.message("merged into the original base: choosing needs validation rows (data.val_set_size)")
        return "original", {}
    losses = _losses(base, adapter, settings, sequence_len, rows)
    way = min(losses, key=lambda way: losses[way] if math.isfinite(losses[way]) else math.inf)
    figures = ", ".join(f"{way} {loss:.4f}" for way, loss in losses.items())
    program.message(f"merged into the {way} base; loss of {len(rows)} validation rows: {figures}")
    return way, {"val_rows": len(rows), **{f"val_loss/{way}": loss for way, loss in losses.items()}}


def _losses(
    base: Path, adapter: Adapter, settings: FinetuneConfig, sequence_len: int, rows: list[Row]
) -> dict[Way, float]:
    """The validation loss of each way to merge, the original first; NaN where the adapter isn't finite."""
    alone = {"num_processes": 1, "fsdp_version": None}
    plain = settings.model_copy(update={"adapter": "lora", "load_in_4bit": False, **alone})
    with out_of_memory.named(
        "comparing both ways to merge", "merge.merge_base", "set merge.merge_base: original, or dequantized"
    ):
        model, execution = finetune_model.load(base, plain, sequence_len)
        loss = OBJECTIVES[settings.objective].loss_module()
        parts = loss.passes(rows, execution)
        losses: dict[Way, float] = {}
        for number, way in enumerate(get_args(Way), start=1):
            nf4 = Nf4(base, settings) if way == "dequantized" else None
            merge_weights.fill(model, base, adapter, nf4)
            losses[way] = loss.mean_loss(model, parts, execution)
            program.progress(number, len(get_args(Way)), "ways to merge", loss=losses[way])
    return losses


def _merge(base: Path, shapes: dict[str, tuple[int, ...]], adapter: Adapter, nf4: Nf4 | None, folder: Path) -> Tally:
    tally = Tally()
    with merge_weights.merging(base, adapter, nf4) as pair:

        def merged(name: str) -> torch.Tensor:
            weight, merged_weight = pair(name)
            if name in adapter.pairs:
                tally.add(name, weight, merged_weight)
            return merged_weight.cpu()

        weights.write(
            folder,
            shapes,
            merged,
            lambda written_bytes, total: program.progress(written_bytes >> 20, total >> 20, "MiB"),
        )
    if tally.changes == 0:
        raise ModelError(
            "the adapter changes no weight: it is untrained, or too small for bf16",
            file=str(adapter.file), remedy="raise finetune.num_epochs or finetune.learning_rate",
        )  # fmt: skip
    return tally


def _check_parent(base: Artifact, finetune: Artifact) -> None:
    trained_on = finetune.parents.get("base")
    if trained_on != base.digest:
        raise ModelError(
            f"the adapter was trained on base {str(trained_on)[:12]}, and this base is {base.digest[:12]}",
            file=str(finetune.path), remedy=merge_weights.REMEDY,
        )  # fmt: skip


if __name__ == "__main__":
    program.main(run)
