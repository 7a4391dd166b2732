"""The stages of a build as a table: program, environment, inputs, sections of the config, packages.

Standard library only. Every stage has a place in the store under a key that `plan` makes of this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import methods


@dataclass(frozen=True)
class Step:
    """One stage of a build.

    `program` is the dotted name of the module that runs it. `sections` are dotted places of the resolved config, `inputs` the
    stages whose artefacts it takes. The versions of `packages` decide its result.
    """

    stage: str
    program: str
    environment: str
    inputs: tuple[str, ...]
    sections: tuple[str, ...]
    packages: tuple[str, ...]
    parts: tuple[str, ...] = ()  # further programs that the config chooses and the program imports by name
    retries: int = 0
    timeout_hours: float = 24


def steps(config: Mapping[str, Any]) -> tuple[Step, ...]:
    """The artefact-making steps of a config, in order."""
    torch = ("torch", "transformers", "safetensors")
    table = [
        Step(
            "base", "pipeline.model.base", "train", (), ("base_model", "base_model_revision"), (*torch, "gguf"),
            retries=2, timeout_hours=6,
        ),
        Step(
            "prepare", "pipeline.data.prepare", "train", ("base",), ("data", "seed"),
            ("transformers", "tokenizers", "datasketch"), timeout_hours=6,
        ),
        Step(
            "finetune", "pipeline.finetune.train", "train", ("base", "prepare"),
            ("finetune", "data.sequence_len", "seed"), (*torch, "peft", "bitsandbytes"), retries=1, timeout_hours=168,
        ),
        Step(
            "merge", "pipeline.merge.merge", "train", ("base", "prepare", "finetune"),
            ("merge", "finetune", "data.sequence_len"), (*torch, "bitsandbytes"), retries=1,
        ),
    ]  # fmt: skip
    method = methods.of(config["quantize"])
    if method:
        table.append(
            Step(
                "quantize", "pipeline.quantize.quantize", method.environment, ("merge", "prepare"), ("quantize", "seed"),
                (*torch, *method.packages), parts=(method.program,), retries=1,
            )
        )  # fmt: skip
    return tuple(table)


def ledger_step(config: Mapping[str, Any]) -> Step | None:
    """The stage that asks every step of the model's making, once the candidate is evaluated; None where it is off."""
    if not config["evaluate"]["ledger_items"]:
        return None
    inputs = tuple(step.stage for step in steps(config))
    sections = ("finetune", "evaluate.ledger_items", "evaluate.max_items", "evaluate.max_tokens")
    packages = ("torch", "transformers", "safetensors", "peft", "bitsandbytes")
    return Step("ledger", "pipeline.ledger.answers", "train", inputs, sections, packages, retries=1)


def all_steps(config: Mapping[str, Any]) -> tuple[Step, ...]:
    """Every stage with a place in the store, in order."""
    ledger = ledger_step(config)
    return (*steps(config), ledger) if ledger else steps(config)


def served_stage(config: Mapping[str, Any]) -> str:
    """The stage whose folder is judged and served."""
    return "quantize" if methods.of(config["quantize"]) else "merge"


def section(config: Mapping[str, Any], place: str) -> Any:
    """The value at a dotted place of the resolved config."""
    value: Any = config
    for part in place.split("."):
        value = value[part]
    return value
