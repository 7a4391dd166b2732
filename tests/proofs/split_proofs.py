"""Two steps with fused LoRA layers over an NF4 base: whole in one process, and split over two. Prints both as JSON.

    python tests/proofs/split_proofs.py BASE

On a CPU training doesn't fuse layers; here they are, as on a GPU, and layers are checkpointed. Runs in the train environment.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from array import array
from pathlib import Path
from typing import Any

from pipeline import program
from pipeline.config.schema import FinetuneConfig
from pipeline.finetune import launch

LENGTHS = (20, 12, 31, 7, 16)


def rank(request: program.Request, group: Any) -> dict[str, Any]:
    """Losses, gradient norms, and the sum of each trained tensor's sizes after two steps."""
    from peft.helpers import disable_input_dtype_casting

    from pipeline.finetune import checkpoints, fsdp, fused_lora, train
    from pipeline.finetune import model as finetune_model
    from pipeline.finetune import rows as finetune_rows
    from pipeline.finetune.packing import Row

    settings = FinetuneConfig(**request.config["finetune"])
    ids = [array("i", [(3 + 7 * number + 5 * at) % 400 for at in range(size)]) for number, size in enumerate(LENGTHS)]
    rows = [Row(it, it, 0, is_cut=False) for it in ids]
    model, execution = finetune_model.load(Path(request.config["base"]), settings, 32)
    model = finetune_model.with_lora(model, settings, execution, "0" * 64, seed=1)
    assert fused_lora.fuse(model)[0] == 14
    if execution.split:
        fsdp.split(model, execution.device, group.size)
    training = train.Training(
        model, execution, settings, finetune_rows.Rows(rows, [], 0, 0),
        sequence_len=32, seed=1, folder=request.folder, group=group,
    )  # fmt: skip
    state = checkpoints.State()
    with disable_input_dtype_casting(model):
        for _ in range(2):
            training.step(state, range(len(rows)))
    return {
        "history": [[entry["train_loss"], entry["grad_norm"]] for entry in state.history],
        "weights": [float(weight.detach().abs().sum()) for weight in training.weights.values()],
        "held": sum(getattr(it, "_local_tensor", it).nbytes for it in model.parameters() if not it.requires_grad),
        "dtype": execution.dtype,
    }


def main() -> None:
    """Measure both."""
    found = []
    for split in ({}, {"num_processes": 2, "fsdp_version": 2}):
        settings = FinetuneConfig(
            micro_batch_size=5, lora_dropout=0.0, learning_rate=1e-2, warmup_ratio=0.0, gradient_checkpointing=True, **split
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            request = program.Request(
                {"finetune": settings.model_dump(mode="json"), "base": sys.argv[1]}, {}, Path(folder)
            )
            found.append(launch.launch(request, settings.num_processes, (str(Path(__file__).resolve()),)))
    print(json.dumps(found))


if __name__ == "__main__":
    if launch.MEETING in os.environ:
        from pipeline.finetune import rank as finetune_rank

        finetune_rank.main(rank)
    else:
        main()
