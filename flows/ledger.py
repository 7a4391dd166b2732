"""The loss ledger of a build: every step of the candidate's making on the same items. It explains a verdict, and is no part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from flows import stages
from flows.stages import OnEvent
from pipeline import program, store
from pipeline.artifacts import Artifact, Evaluation, LedgerEntry, Stage
from pipeline.errors import ConfigError, ResourceError
from pipeline.evaluation import plugins
from pipeline.ledger import compare, scores
from pipeline.plan.steps import Step, ledger_step


def ledger_of(
    config: Mapping[str, Any],
    build_key: str,
    artifacts: Mapping[Stage, Artifact],
    candidate: Evaluation,
    sources: Mapping[str, str],
    show: OnEvent,
) -> tuple[LedgerEntry, ...]:
    """What each step answered, from the store or asked now, scored as the candidate was.

    Empty where the config wants none, and where there isn't the memory or a user's scorer fails on a step's answers: the
    verdict is reached, and isn't lost for want of its explanation. A broken model stops the build all the same.
    """
    step = ledger_step(config)
    if step is None:
        return ()
    try:
        return _asked(step, config, build_key, artifacts, candidate, sources, show)
    except (ResourceError, ConfigError) as error:
        show({"event": "message", "text": f"no loss ledger: {error.problems[0].what}"})
        return ()


def _asked(
    step: Step,
    config: Mapping[str, Any],
    build_key: str,
    artifacts: Mapping[Stage, Artifact],
    candidate: Evaluation,
    sources: Mapping[str, str],
    show: OnEvent,
) -> tuple[LedgerEntry, ...]:
    inputs = {name: artifacts[cast("Stage", name)] for name in step.inputs}
    answered = stages.run(step, config, inputs, sources, show)
    records = stages.inputs_json({**artifacts, "ledger": answered}, ("prepare", "ledger"))
    request = program.Request({"evaluate": config["evaluate"]}, records, store.build_folder(build_key) / "ledger")
    places = plugins.places([scorer["metric"] for scorer in config["evaluate"]["scorers"]])
    stages.run_program("pipeline.ledger.scores", "control", config, request, show, pythonpath=places)
    entries = scores.ENTRIES.validate_json((request.payload / "ledger.json").read_bytes())
    return (*entries, compare.served(candidate, entries[-1]))
