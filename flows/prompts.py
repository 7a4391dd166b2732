"""Must-pass prompts sent to a system while it is served; kept by the digests of the served unit and the prompts file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows import stages
from flows.stages import OnEvent
from pipeline import program
from pipeline.artifacts import PromptResult, ServedUnit
from pipeline.config.schema import Config
from pipeline.digests import digest_of
from pipeline.file_digests import remembered
from pipeline.plan import code

PROGRAM = "pipeline.evaluation.prompts"


def prompt_results(
    config: Config, unit: ServedUnit, attempt: str, where: Callable[[], dict[str, Any]], show: OnEvent
) -> tuple[PromptResult, ...]:
    """The results of the prompts of the config's file, in the file's order; () where the config names no file.

    `where` starts the system's server and describes it; it is called only when the prompts were not sent before.
    """
    if not config.evaluate.prompts:
        return ()
    digest = remembered(Path(config.evaluate.prompts))

    def make(folder: Path) -> stages.Origin:
        server = where()
        show({"event": "stage", "stage": "prompts", "state": "running", "log": server["system"]})
        settings = {"evaluate": config.evaluate.model_dump(mode="json"), "digest": digest, **server}
        detail = stages.run_program(PROGRAM, "control", config, program.Request(settings, {}, folder), show)
        return stages.Origin({"unit": unit.digest, "prompts": digest}, {"vllm": unit.vllm_version}, detail)

    artifact = stages.kept("prompts", _key(config, unit, digest, attempt), make, where)
    return tuple(map(PromptResult.model_validate, json.loads((artifact.payload / "prompts.json").read_text("utf-8"))))


def _key(config: Config, unit: ServedUnit, file_digest: str, attempt: str) -> str:
    """The key of a system's results."""
    parts = {
        "unit": unit.digest,
        "prompts": file_digest,
        "config": {"max_tokens": config.evaluate.max_tokens, "concurrency": config.evaluate.concurrency},
        "seed": config.seed,
        "source": code.source_digest(PROGRAM),
        "attempt": attempt,
    }
    return digest_of(parts)[:32]
