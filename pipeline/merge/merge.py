"""Stage program: the adapter into its base, by the way to merge that keeps more of what was learned.

    python -m pipeline.merge.merge REQUEST.json

Training saw the base's linear layers in 4 bits. Merged into those values again (`dequantized`) or into the base's own
(`original`): which is better differs from model to model, so `merge_base: auto` measures the loss of both on the validation
rows, with training's own mask and arithmetic, and writes the lower one; never on the holdout, which has to judge the
choice. The two are compared in memory, so that one folder is written; without validation rows, or after training in 16
bits, it is the original base. Tokenizer and template are copied byte for byte.
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
from pipeline.finetune import loss as finetune_loss
from pipeline.finetune import model as finetune_model
from pipeline.finetune import rows as finetune_rows
from pipeline.finetune.packing import Row
from pipeline.merge import weights as merge_weights
from pipeline.merge.weights import Adapter, Nf4, Way
from pipeline.model import weights

if TYPE_CHECKING:
    import torch


MORE_MEMORY = "end what else uses the memory or the GPU and run again; one layer at a time is all that it takes"


@dataclass
class Tally:
    """What merging changed: the largest change, sums of squares, and how many bf16 values moved."""

    largest: float = 0.0
    squares: float = 0.0
    base_squares: float = 0.0
    moved: int = 0
    values: int = 0
    unmoved: list[str] = field(default_factory=list)

    def add(self, name: str, base: torch.Tensor, merged: torch.Tensor) -> None:
        """Count one layer; both in the dtype that is written."""
        change = merged.float() - base.float()
        moved = int((change != 0).sum())
        self.largest = max(self.largest, float(change.abs().max()))
        self.squares += float(change.square().sum())
        self.base_squares += float(base.float().square().sum())
        self.moved += moved
        self.values += change.numel()
        self.unmoved += [] if moved else [name]


def run(request: program.Request) -> dict[str, Any]:
    """The stage: merge the adapter `finetune` into the model `base`.

    Detail: `merge_base`, the way that was taken; `val_loss/original` and `val_loss/dequantized`, nats a trained token of
    `val_rows` rows, where it was measured; what merging changed.

    Raises ModelError when the adapter belongs to another base, fits no layer, changes nothing or isn't
    finite; ConfigError when `dequantized` is asked for after training without 4 bits; ResourceError when memory doesn't
    suffice, to compare both ways or to merge.
    """
    base, finetune = Artifact(**request.inputs["base"]), Artifact(**request.inputs["finetune"])
    _check_parent(base, finetune)
    shapes = {name: tensor.shape for name, tensor in weights.tensors(base.payload).items()}
    adapter = merge_weights.read_adapter(finetune.payload, shapes)
    settings = FinetuneConfig(**request.config["finetune"])
    way, measured = _choose(request, base.payload, adapter, settings)
    nf4 = Nf4(base.payload, settings) if way == "dequantized" else None
    shutil.rmtree(request.folder / "payload", ignore_errors=True)  # what a killed run left
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
        **measured,
        "layers": len(adapter.pairs),
        "scaling": adapter.scaling,
        "max_abs_delta": tally.largest,
        "relative_delta": (tally.squares / tally.base_squares) ** 0.5,
        "moved_share": tally.moved / tally.values,
        "unmoved_layers": tally.unmoved,
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
    """The way to merge, and what it was chosen by: nothing where there is no choice."""
    wanted = request.config["merge"]["merge_base"]
    if wanted != "auto":
        return wanted, {}
    if not settings.load_in_4bit:
        program.message("merged into the original base: training in 16 bits saw no other")
        return "original", {}
    sequence_len = request.config["sequence_len"]
    encoded = finetune_rows.encoder(base, settings, sequence_len)
    val = Artifact(**request.inputs["prepare"]).payload / "val.jsonl"
    rows = [row for row in encoded(val) if row.trained]
    if not rows:
        program.message(
            "merged into the original base: without validation rows (data.val_set_size) nothing can be chosen"
        )
        return "original", {}
    losses = _losses(base, adapter, settings, sequence_len, rows)
    way = min(losses, key=lambda way: losses[way] if math.isfinite(losses[way]) else math.inf)
    shown = ", ".join(f"{way} {loss:.4f}" for way, loss in losses.items())
    program.message(f"merged into the {way} base; loss of {len(rows)} validation rows: {shown}")
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
        model, hardware = finetune_model.load(base, plain, sequence_len)
        cut = finetune_loss.passes(rows, hardware)
        losses: dict[Way, float] = {}
        for done, way in enumerate(get_args(Way), start=1):
            nf4 = Nf4(base, settings) if way == "dequantized" else None
            merge_weights.fill(model, base, adapter, nf4)
            losses[way] = finetune_loss.mean_loss(model, cut, hardware)
            program.progress(done, len(get_args(Way)), "ways to merge", loss=losses[way])
    return losses


def _merge(base: Path, shapes: dict[str, tuple[int, ...]], adapter: Adapter, nf4: Nf4 | None, folder: Path) -> Tally:
    tally = Tally()
    with merge_weights.merging(base, adapter, nf4) as pair:

        def merged(name: str) -> torch.Tensor:
            value, result = pair(name)
            if name in adapter.pairs:
                tally.add(name, value, result)
            return result.cpu()

        weights.write(folder, shapes, merged, lambda done, total: program.progress(done >> 20, total >> 20, "MiB"))
    if tally.moved == 0:
        raise ModelError(
            "the adapter changes no weight: it is untrained, or too small for bf16",
            file=str(adapter.file), remedy="train for longer, or at a higher learning_rate",
        )  # fmt: skip
    return tally


def _check_parent(base: Artifact, finetune: Artifact) -> None:
    trained_on = finetune.parents.get("base")
    if trained_on != base.digest:
        raise ModelError(
            f"the adapter was trained on base {str(trained_on)[:12]}, and this one is {base.digest[:12]}",
            file=str(finetune.path), remedy=merge_weights.REMEDY,
        )  # fmt: skip


if __name__ == "__main__":
    program.main(run)
