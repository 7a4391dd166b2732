"""Make a tiny model learn rows by heart, plant faults in its artefacts, and ask every step of each chain.

    python tests/proofs/ledger_proofs.py FOLDER (holding prepare/)

Runs in the train environment, all stages in one process. FOLDER/NAME/ledger/ is the ledger's artefact for the chain
`clean`, or for the chain with the fault NAME; errors, prompts and answers are printed as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support import programs, tiny

from pipeline import files, program
from pipeline.artifacts import Artifact
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import TunegateError
from pipeline.finetune import train
from pipeline.ledger import answers, models
from pipeline.merge import merge
from pipeline.quantize import quantize

Tensors = dict[str, torch.Tensor]
THETA = 10.0  # positions of a few dozen tokens feel it; what a config is misread as is 10000
CONFIG: dict[str, Any] = {
    "finetune": {"micro_batch_size": 2, "num_epochs": 30, "learning_rate": 1e-2, "save_steps": 1000, "eval_steps": 20},
    "merge": {"merge_base": "auto"},
    "quantize": {"num_calibration_samples": 8, "max_calibration_tokens": 64, "group_size": 32},
    "sequence_len": 128,
    "seed": 42,
    "max_items": None,
    "ledger_items": 20,
    "max_tokens": 12,
}


def make_base(folder: Path) -> None:
    """A tiny Llama whose own sampling default would garble every answer, and whose rope isn't the usual one."""
    tiny.make(folder)
    edit(folder / "generation_config.json", lambda config: config.update(repetition_penalty=5.0))
    edit(folder / "config.json", lambda config: turn(config, THETA))


def turn(config: dict[str, Any], theta: float) -> None:
    """Set rope_theta in both spellings."""
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = theta


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file."""
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def scale_groups(tensors: Tensors) -> None:
    """Each output's first group of 32 inputs comes out eight times too large, in every layer."""
    for name, scale in tensors.items():
        if name.endswith("weight_scale"):
            scale[:, 0] *= 8


def break_one(kind: str) -> Callable[[Tensors], None]:
    """A NaN in the first tensor of that kind."""

    def change(tensors: Tensors) -> None:
        tensors[min(name for name in tensors if name.endswith(kind))].view(-1)[0] = torch.nan

    return change


def faults(chain: Path, base: Path) -> dict[str, Callable[[], Any]]:
    """How each fault is planted in the files of a copy of the clean chain."""
    merged, quantized = chain / "merge" / "payload", chain / "quantize" / "payload"
    return {
        "clean": lambda: None,
        "adapter_not_applied": lambda: shutil.copyfile(base / "model.safetensors", merged / "model.safetensors"),
        "wrong_rope_theta": lambda: edit(quantized / "config.json", lambda config: turn(config, 10000.0)),
        "scaled_groups": lambda: change_weights(quantized, scale_groups),
        "nan_scale": lambda: change_weights(quantized, break_one("weight_scale")),
        "nan_weight": lambda: change_weights(merged, break_one("down_proj.weight")),
    }


def make_chain(folder: Path) -> dict[str, dict[str, Any]]:
    """Base → finetune → merge → quantize; the records of all, prepare's too."""
    make_base(folder / "base" / "payload")
    records = {name: programs.artifact(folder / name, name, {}) for name in ("base", "prepare")}
    for name, stage in (("finetune", train.run), ("merge", merge.run), ("quantize", quantize.run)):
        place = folder / name
        place.mkdir()
        detail = stage(program.Request(CONFIG, records, place))
        records[name] = programs.artifact(place, name, detail, {"base": records["base"]["digest"]})
    return records


def ask(folder: Path, records: dict[str, dict[str, Any]], name: str) -> str:
    """The ledger's stage on a copy of the chain with that fault in it; the error, if it is one."""
    copy = folder / name
    for stage in ("merge", "quantize"):
        shutil.copytree(folder / stage, copy / stage)
    faults(copy, folder / "base" / "payload")[name]()
    moved = {stage: {**records[stage], "path": str(copy / stage)} for stage in ("merge", "quantize")}
    if name == "adapter_not_applied":  # its quantized self would be as wrong, and takes time to make
        del moved["quantize"], records["quantize"]
    (copy / "ledger").mkdir()
    try:
        detail = answers.run(program.Request(CONFIG, {**records, **moved}, copy / "ledger"))
    except TunegateError as error:
        return str(error)
    files.write_json(copy / "detail.json", detail)
    return ""


def main() -> None:
    """Make everything, and look."""
    folder = Path(sys.argv[1])
    records = make_chain(folder)
    errors = {name: ask(folder, dict(records), name) for name in faults(folder, folder)}
    files.write_json(folder / "records.json", {name: {**record} for name, record in records.items()})
    speaker = models.load(
        "adapter", {name: Artifact(**record) for name, record in records.items()}, FinetuneConfig(**CONFIG["finetune"])
    )
    rows = answers.read_rows(folder / "prepare" / "payload" / "holdout.jsonl", CONFIG)
    prompts = [answers.prompt_ids(speaker, row["messages"][:-1]) for row in rows]
    alone = [answers.generate(speaker, [prompt], CONFIG["max_tokens"])[0] for prompt in prompts]
    padded = answers.generate(speaker, [*prompts, prompts[0] * 4], CONFIG["max_tokens"])[:-1]
    print(json.dumps({"errors": errors, "prompts": prompts, "alone": alone, "padded": padded}))


if __name__ == "__main__":
    main()
