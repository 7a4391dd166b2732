"""The table of stages."""

from __future__ import annotations

from pathlib import Path

from pipeline.plan import steps
from pipeline.plan.plan import Plan, PlannedStep, render


def config(method="llmcompressor", items=100):
    """As much of a resolved config as decides what is made."""
    return {"quantize": {"method": method}, "evaluate": {"ledger_items": items}}


def test_the_ledger_takes_all_that_was_made_and_is_asked_last():
    """It isn't among the stages that the candidate is made by; 0 items turn it off."""
    assert "ledger" not in [step.stage for step in steps.steps(config())]
    ledger = steps.all_steps(config())[-1]
    assert ledger.inputs == ("base", "prepare", "finetune", "merge", "quantize")
    assert ledger.program == "pipeline.ledger.answers"
    assert steps.all_steps(config("none"))[-1].inputs == ("base", "prepare", "finetune", "merge")
    assert steps.all_steps(config(items=0)) == steps.steps(config(items=0))


def test_the_merge_depends_on_the_rows_that_it_is_chosen_by():
    """Other validation rows, or longer ones, may choose the other way."""
    merge = next(step for step in steps.steps(config()) if step.stage == "merge")
    assert "prepare" in merge.inputs
    assert "data.sequence_len" in merge.sections


def test_a_plan_tells_what_of_the_model_is_made():
    """By stage, with the digest, or None for what is still to do; the ledger makes no model."""
    first, *others = steps.all_steps(config())
    planned = (PlannedStep(first, "k", {"digest": "d"}), *(PlannedStep(step, None, None) for step in others))
    made = Plan("tickets", "key", planned, None).digests
    assert made == {"base": "d", "prepare": None, "finetune": None, "merge": None, "quantize": None}


def test_the_plan_lists_the_ledger_after_the_gate():
    """In the order in which a build does it."""
    planned = [PlannedStep(step, None, None) for step in steps.all_steps(config())]
    lines = []
    render(Plan("tiny", "0" * 32, tuple(planned), None), Path("tiny.yaml"), lines.append)
    stages = [line.split()[0] for line in lines[2:-1]]
    assert stages[-5:] == ["evaluate", "loadtest", "gate", "ledger", "register"]
    assert stages[:5] == ["base", "prepare", "finetune", "merge", "quantize"]
