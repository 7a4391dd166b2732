"""The loss ledger of a build: every step of the candidate's making on the same items. It explains a verdict and isn't part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from flows import stages
from flows.stages import OnEvent
from pipeline import program, store
from pipeline.artifacts import Artifact, Evaluation, LedgerEntry, Stage
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, ResourceError
from pipeline.evaluation import plugins
from pipeline.ledger import compare, scores
from pipeline.plan.steps import Step, ledger_step


def ledger_of(
    config: Config,
    build_key: str,
    artifacts: Mapping[Stage, Artifact],
    candidate: Evaluation,
    sources: Mapping[str, str],
    show: OnEvent,
) -> tuple[LedgerEntry, ...]:
    """The answers of each step, from the store or made now, scored as the candidate's were.

    Empty where the config wants none, and where memory is short or a user's scorer fails on a step's answers: the verdict
    is reached, and must not be lost for want of its explanation. A broken model stops the build all the same.
    """
    step = ledger_step(config.model_dump(mode="json"))
    if step is None:
        return ()
    try:
        return _asked(step, config, build_key, artifacts, candidate, sources, show)
    except (ResourceError, ConfigError) as error:
        show({"event": "message", "text": f"no loss ledger: {error.problems[0].what}"})
        return ()


def _asked(
    step: Step,
    config: Config,
    build_key: str,
    artifacts: Mapping[Stage, Artifact],
    candidate: Evaluation,
    sources: Mapping[str, str],
    show: OnEvent,
) -> tuple[LedgerEntry, ...]:
    inputs = {name: artifacts[cast("Stage", name)] for name in step.inputs}
    answers = stages.run(step, config, inputs, sources, show)
    records = stages.inputs_json({**artifacts, "ledger": answers}, ("prepare", "ledger"))
    request = program.Request(
        {"evaluate": config.evaluate.model_dump(mode="json")}, records, store.build_folder(build_key) / "ledger"
    )
    places = plugins.places([scorer.metric for scorer in config.evaluate.scorers])
    stages.run_program("pipeline.ledger.scores", "control", config, request, show, pythonpath=places)
    entries = scores.ENTRIES.validate_json((request.payload / "ledger.json").read_bytes())
    return (*entries, compare.served(candidate, entries[-1]))
