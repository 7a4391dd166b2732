"""The loss ledger of a build: every step of the candidate's making on the same items. It explains a verdict, and is no part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from flows import stages
from flows.stages import OnEvent
from pipeline import ledger, plan, scoring
from pipeline.artifacts import Artifact, Evaluation, LedgerEntry, Stage
from pipeline.config import Config, GateConfig


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
    settings = Config.model_validate(config)
    score = scoring.item_scorer(settings.evaluate.scorers)
    entries = ledger.entries(answered.payload, answered.detail["steps"], candidate, score)
    for line in summary(entries, settings.gate):
        show({"event": "message", "text": line})
    return entries


def summary(entries: Sequence[LedgerEntry], policy: GateConfig) -> Iterator[str]:
    """For each metric that the policy names, the step that lost most of it."""
    measured = scoring.metric_names(entries[-1].items)
    for metric in dict.fromkeys(check.metric for check in policy.metrics if check.metric in measured):
        found = ledger.culprit(entries, metric, policy.confidence)
        if found is None:
            yield f"{metric}: no step lost measurably"
        else:
            lost = found.change
            yield f"{metric}: {found.step} lost most, {lost.value:+.3f} ({lost.low:+.3f} to {lost.high:+.3f}) from {found.before}"
