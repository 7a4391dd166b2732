"""The table of objectives, and the places that have to agree with it: config, plan, report, training and merging."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from support.sample_build import sample_build

from pipeline.config.file import load
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ConfigError
from pipeline.finetune import objectives
from pipeline.finetune.objectives import OBJECTIVES, Objective
from pipeline.plan.code import modules
from pipeline.plan.rules import problems_across_sections
from pipeline.report.facts import training_facts

ROOT = Path(__file__).parents[3]
EACH = pytest.mark.parametrize("name", OBJECTIVES)


def test_the_config_allows_the_tables_objectives() -> None:
    """Neither more nor fewer; the first is the default."""
    field = FinetuneConfig.model_fields["objective"]
    assert get_args(field.annotation) == tuple(OBJECTIVES)
    assert field.default == objectives.SFT == next(iter(OBJECTIVES))


@pytest.mark.parametrize("line", ["objective: sft", "finetune: {objective: sft}", "stage: sft"])
def test_a_config_names_its_objective(tmp_path: Path, line: str) -> None:
    """In the section, flat, or by LLaMA-Factory's key; nothing across sections speaks against it."""
    file = tmp_path / "use.yaml"
    file.write_text(f"datasets: [{{path: t.jsonl}}]\n{line}\n")
    config = load(file)
    assert config.finetune.objective == "sft"
    assert not [problem for problem in problems_across_sections(config) if "objective" in str(problem.key)]


def test_an_objective_that_is_not_in_the_table_is_refused(tmp_path: Path) -> None:
    """By axolotl's key too: the error says what there is."""
    file = tmp_path / "use.yaml"
    file.write_text("datasets: [{path: t.jsonl}]\nrl: dpo\n")
    with pytest.raises(ConfigError, match="sft"):
        load(file)


@EACH
def test_a_stages_key_holds_the_source_of_its_objective(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Modules are named by strings: a change of the loss still makes training and merging stale."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    objective = OBJECTIVES[name]
    for program in ("pipeline.finetune.train", "pipeline.merge.merge"):
        assert {objective.rows, objective.loss} <= modules(program).keys()


@EACH
def test_the_modules_have_the_functions_that_training_calls(name: str) -> None:
    """Every function that the two protocols declare."""
    pairs = (
        (OBJECTIVES[name].rows_module(), objectives.RowsModule),
        (OBJECTIVES[name].loss_module(), objectives.LossModule),
    )
    for module, protocol in pairs:
        declared = {attribute for attribute in vars(protocol) if not attribute.startswith("_")}
        assert declared
        assert declared <= {name for name, function in vars(module).items() if callable(function)}


def test_the_report_shows_the_objectives_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the metrics' own names, whichever they are."""
    sample = sample_build(tmp_path, count=20)
    shown = dict(training_facts(sample))
    assert {"train_loss", "eval_loss"} <= shown.keys()
    other = Objective(rows="", loss="", unit="", train_metric="steps_lost", eval_metric="best_step")
    monkeypatch.setitem(OBJECTIVES, objectives.SFT, other)
    assert "train_loss" not in dict(training_facts(sample))


def test_the_table_imports_the_standard_library_alone() -> None:
    """`tunegate check` and the report read it without torch and pydantic."""
    code = "import sys; from pipeline.finetune import objectives, memory, execution; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "pydantic", "numpy"} & set(loaded)
