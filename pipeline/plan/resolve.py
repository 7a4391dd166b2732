"""A config file as resolved JSON, remembered by the digest of all it was read from.

Reading a config needs pydantic, which takes longer to import than all the rest of `tunegate check`. A config that was right
once is not read again until the file or its readers' code changes. The standard library is enough then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import hardware, store
from pipeline.digests import digest_file, digest_of
from pipeline.environments import interpreters
from pipeline.errors import ConfigError, Problem
from pipeline.files import write_json
from pipeline.kubernetes import manifests
from pipeline.plan.code import source_digest

# The modules that decide whether a config is right: a remembered config is read again when one changes.
READERS = ("pipeline.config.file", "pipeline.plan.rules")


def resolve(path: Path, overrides: Sequence[str] = (), data_dir: Path | None = None) -> dict[str, Any]:
    """The resolved config as JSON, every default filled in and every path absolute.

    Raises ConfigError with all mistakes of the file.
    """
    memory = _memory(path, overrides, data_dir) if path.is_file() else None
    if memory and store.holds(memory):
        return dict(json.loads(memory.read_text(encoding="utf-8")))
    from pipeline.config.file import load
    from pipeline.plan.rules import problems_across_sections

    config = load(path, overrides, data_dir, problems_across_sections).model_dump(mode="json")
    if memory:
        with suppress(OSError):  # a store that can't be written costs time only
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, config)
    return config


def warnings(config: Mapping[str, Any], path: Path) -> list[Problem]:
    """Settings that are allowed, and still keep a build from passing its gate or from starting here."""
    return [*_undecided(config, path), *_keyless(config, path), *_short_of_gpus(config, path)]


def _short_of_gpus(config: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    """More GPUs wanted than are here, for training or for serving: a build would refuse to start.

    Nothing where a cluster's pod asks for its own.
    """
    from pipeline.finetune import launch
    from pipeline.plan import plan

    cluster = config["kubernetes"]
    flow = cluster["flow"] if cluster else None
    checks: tuple[tuple[Mapping[str, Any] | None, Callable[[], None]], ...] = (
        (cluster["jobs"].get("finetune", flow) if cluster else None,
         lambda: launch.check(config["finetune"]["num_processes"], hardware.device())),
        (flow, lambda: plan.raise_for_too_few_gpus(config)),
    )  # fmt: skip
    for pod, check in checks:
        if pod and manifests.devices(pod):
            continue
        try:
            check()
        except ConfigError as error:
            yield from (replace(problem, file=str(path)) for problem in error.problems)


def _keyless(config: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    """LLM judges whose key isn't in this environment: a build would refuse to start in it."""
    for index, entry in enumerate(config["evaluate"]["judges"]):
        variable = entry["api_key_env"]
        if variable and not os.environ.get(variable):
            yield Problem(
                f"{variable} is not set here, and a build needs it",
                file=str(path),
                key=f"evaluate.judges[{index}].api_key_env",
                remedy=f"export {variable}=… where builds run",
            )


def _undecided(config: Mapping[str, Any], path: Path) -> list[Problem]:
    """No check at all, or none before there is an incumbent: the gate calls it inconclusive."""
    checks = config["gate"]["metrics"]
    if any(check["min"] is not None or check["against"] == "base" for check in checks):
        return []
    why = (
        "every check compares with the incumbent, and before the first promotion there is none"
        if checks
        else "no quality is asked for"
    )
    metric = next((scorer["metric"] for scorer in config["evaluate"]["scorers"]), "exact_match")
    return [
        Problem(
            f"{why}: the verdict can't be pass, and nothing would be registered",
            file=str(path),
            key="gate.metrics",
            allowed="at least one check with min, or against: base",
            remedy=f"add one, such as {{metric: {metric}, min: 0.5}}",
        )
    ]


def _memory(path: Path, overrides: Sequence[str], data_dir: Path | None) -> Path:
    code = [source_digest(reader, ()) for reader in READERS]
    root = (data_dir or path.parent).resolve()
    key = digest_of({"file": digest_file(path), "root": str(root), "stem": path.stem, "overrides": list(overrides), "code": code,
                     "there": sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []})  # fmt: skip
    return store.home() / "work" / "configs" / f"{key[:32]}.json"


def sources(config: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what comes from outside: the base model's under "base", the data files' under "prepare", must-pass prompts'.

    Task files of lm-eval stand under "tasks" where the config has tasks.

    Raises ModelError, DataError or ConfigError when one isn't there or, of prompts and tasks, is wrong; EnvironmentMissing where
    the environment that tasks run in isn't made.
    """
    from pipeline.data import sources as data_sources
    from pipeline.model import base as model

    train = interpreters.find("train", interpreters.settings(config))
    base = model.locate(config["base_model"], config["base_model_revision"], Path.cwd(), train)
    digests = {"base": base.digest, "prepare": data_sources.sources_digest(config["data"])}
    if config["evaluate"]["prompts"]:
        from pipeline.evaluation import prompts_file

        digests["prompts"] = prompts_file.sources_digest(config["evaluate"]["prompts"])
    if config["evaluate"]["tasks"]:
        from pipeline.evaluation import lm_eval_files

        judges = interpreters.find("judges", interpreters.settings(config))
        digests["tasks"] = lm_eval_files.judged(config["evaluate"]["tasks"], judges)
    return digests
