"""The loss ledger of a build: every step of the candidate's making on the same items. It explains a verdict, and is no part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from flows import stages
from flows.stages import OnEvent
from pipeline import ledger, plan, scoring
from pipeline.artifacts import Artifact, Evaluation, LedgerEntry, Stage
from pipeline.config import EvaluateConfig


def ledger_of(
    config: Mapping[str, Any],
    artifacts: Mapping[Stage, Artifact],
    candidate: Evaluation,
    sources: Mapping[str, str],
    show: OnEvent,
) -> tuple[LedgerEntry, ...]:
    """What each step answered, from the store or asked now, scored as the candidate was; empty where the config wants none."""
    step = plan.ledger_step(config)
    if step is None:
        return ()
    inputs = {name: artifacts[cast("Stage", name)] for name in step.inputs}
    answered = stages.run(step, config, inputs, sources, show)
    score = scoring.item_scorer(EvaluateConfig(**config["evaluate"]).scorers)
    return ledger.entries(answered.payload, answered.detail["steps"], candidate, score)
