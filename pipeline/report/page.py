"""A report's content in a reviewer's order: every renderer renders it, and report.json is its dump."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.artifacts import Build, Check, Interval
from pipeline.report import content, facts, gate, judges
from pipeline.report import ledger as report_ledger
from pipeline.report import load as report_load
from pipeline.report import prompts as report_prompts
from pipeline.report import slices as report_slices

EXAMPLES = 20
SLICES = 9

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """A build as its reviewer reads it; scores, checks and changes come with intervals at `confidence`.

    `outcome` is the gate's or "not judged", `why` explains it in one sentence. `scores` holds the metrics by system, `deltas`
    the changes of the headline metric by training and quantization, `next` commands with their effects.
    """

    name: str
    outcome: str
    why: str
    summary: str
    unit: str
    confidence: float
    prompts: report_prompts.Prompts | None
    checks: list[Check]
    ledger: report_ledger.Ledger | None
    scores: dict[str, dict[str, Interval]]
    deltas: list[content.Delta]
    slices: report_slices.Slices | None
    tasks: list[judges.Task]
    judged: list[judges.Judged]
    load: list[report_load.Level]
    shared_prompt: str
    examples: list[content.Example]
    model: Facts
    data: Facts
    training: Facts
    serving: Facts
    digests: Facts
    costs: list[report_load.Cost]
    next: Facts
    notes: tuple[str, ...]


def page(build: Build) -> Page:
    """The page of a build."""
    load = report_load.levels(build)
    return Page(
        name=build.name,
        outcome=build.verdict.outcome if build.verdict else "not judged",
        why=gate.why(build),
        summary=content.summary(build),
        unit=build.unit.digest,
        confidence=content.confidence(build),
        prompts=report_prompts.prompts(build),
        checks=gate.checks(build.verdict),
        ledger=report_ledger.ledger(build),
        scores={role: dict(evaluation.metrics) for role, evaluation in content.evaluated(build).items()},
        deltas=content.deltas(build),
        slices=report_slices.extremes(build, SLICES),
        tasks=judges.tasks(build),
        judged=judges.judged(build),
        load=load,
        shared_prompt=content.shared_prompt(build).removesuffix(content.USER_TURN),
        examples=content.examples(build, EXAMPLES),
        model=facts.model_facts(build),
        data=facts.data_facts(build),
        training=facts.training_facts(build),
        serving=facts.serving_facts(build),
        digests=facts.digests(build),
        costs=report_load.costs(build, load),
        next=facts.next_steps(build),
        notes=facts.NOTES,
    )
