"""Must-pass prompts asked of a system while it is served; the results are kept by the digests of the served unit and the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows import stages
from flows.stages import OnEvent
from pipeline import program, store
from pipeline.artifacts import PromptResult, ServedUnit
from pipeline.digests import digest_of
from pipeline.errors import ConfigError
from pipeline.file_digests import remembered
from pipeline.plan import code


def ask(
    config: Mapping[str, Any], unit: ServedUnit, attempt: str, where: Callable[[], dict[str, Any]], show: OnEvent
) -> None:
    """Ask a system what the config's file holds, unless it was asked before; `where` starts its server and tells of it."""
    if not config["evaluate"]["prompts"]:
        return
    key, digest = _key(config, unit, attempt)
    if store.find("prompts", key) is None:
        of_server = where()
        with store.making("prompts", key) as partial:
            show({"event": "stage", "stage": "prompts", "state": "running", "log": of_server["system"]})
            request = program.Request({"evaluate": config["evaluate"], "digest": digest, **of_server}, {}, partial)
            detail = stages.run_program("pipeline.evaluation.prompts", "control", config, request, show)
            parents = {"unit": unit.digest, "prompts": digest}
            store.finish("prompts", key, partial, parents=parents, made_by={"vllm": unit.vllm_version}, detail=detail)


def results(config: Mapping[str, Any], unit: ServedUnit, attempt: str) -> tuple[PromptResult, ...]:
    """What was kept of a system that was asked, in the file's order; nothing where the config names no prompts."""
    file = config["evaluate"]["prompts"]
    if not file:
        return ()
    found = store.find("prompts", _key(config, unit, attempt)[0])
    if found is None:  # a check on nothing would be a pass
        raise ConfigError("changed while the build ran", file=file, remedy="run the same command again")
    return tuple(map(PromptResult.model_validate, json.loads((found.payload / "prompts.json").read_text("utf-8"))))


def _key(config: Mapping[str, Any], unit: ServedUnit, attempt: str) -> tuple[str, str]:
    """The key of a system's results, and the digest of the file."""
    digest = remembered(Path(config["evaluate"]["prompts"]))
    key = digest_of(
        {
            "unit": unit.digest,
            "prompts": digest,
            "config": {name: config["evaluate"][name] for name in ("max_tokens", "concurrency")},
            "seed": config["seed"],
            "source": code.source_digest("pipeline.evaluation.prompts"),
            "attempt": attempt,
        }
    )
    return key[:32], digest
