"""The build's calls of lm-eval: a task runs once for a served unit, and its environment is looked for before anything starts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support.released import a_config
from support.stored import all_artifacts

from flows import lm_eval, stages
from pipeline.config.file import load
from pipeline.environments.interpreters import Environment
from pipeline.errors import ConfigError, EnvironmentMissing
from pipeline.plan import plan


def test_a_task_is_named_once(tmp_path):
    """Its metrics are TASK/METRIC, whatever else is asked of it."""
    file = tmp_path / "use.yaml"
    file.write_text(
        "datasets: [{path: t.jsonl}]\nevaluate:\n  tasks: [{task: arc_easy}, {task: arc_easy, num_fewshot: 5}]\n"
    )
    with pytest.raises(ConfigError, match="tasks names arc_easy more than once"):
        load(file)


def test_tasks_without_their_environment_are_refused_with_the_command_that_makes_it(tmp_path, monkeypatch):
    """Before anything is read or trained."""
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path / "venvs"))
    asked = {"evaluate": {"tasks": [{"task": "arc_easy"}], "scorers": []}, "environments": {}}
    with pytest.raises(EnvironmentMissing, match="the judges environment isn't there") as caught:
        plan._judged_by(asked)
    assert caught.value.problems[0].remedy == "python3 -m pipeline.environments judges"


def test_a_task_is_run_once_for_a_served_unit(tmp_path, monkeypatch):
    """Whatever its role, so that an incumbent keeps what it got as a candidate; other data or another lm-eval runs it anew."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: mine.jsonl}\n")
    config = a_config(evaluate={"tasks": [{"task": str(tmp_path / "mine.yaml")}]}, serve={"max_model_len": 64})
    site = tmp_path / "site"
    for package in ("lm_eval-0.4.13", "transformers-5.17.0"):
        (site / f"{package}.dist-info").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "pyvenv.cfg").write_text("")
    there = Environment("judges", tmp_path / "bin" / "python", (site,))
    monkeypatch.setattr(lm_eval.interpreters, "find", lambda *_: there)
    record = {"task": "mine", "metric": "acc", "higher_is_better": True, "ids": ["0"], "values": [1.0]}
    ran = []

    def program(module, environment, _config, request, _show):
        ran.append((module, environment, request.config["max_model_len"]))
        (request.payload / "records.json").write_text(json.dumps([record]))
        return {}

    monkeypatch.setattr(stages, "run_program", program)
    unit = SimpleNamespace(digest="u", vllm_version="0.1")
    server = SimpleNamespace(url="http://127.0.0.1:9", model="t")

    def results(role: str) -> tuple:
        system = SimpleNamespace(role=role, unit=unit, model=tmp_path, config=config)
        return lm_eval.task_results(config, system, "", lambda: server, lambda _event: None)

    first = results("candidate")
    assert (first[0].metric, first[0].values) == ("acc", (1.0,))
    assert results("incumbent") == first
    assert ran == [(lm_eval.PROGRAM, "judges", 64)]
    (tmp_path / "mine.jsonl").write_text('{"other": 1}\n')
    results("candidate")
    (site / "lm_eval-0.4.13.dist-info").rename(site / "lm_eval-0.4.14.dist-info")
    results("candidate")
    assert len(ran) == 3
    assert {artifact.made_by["lm-eval"] for artifact in all_artifacts()} == {"0.4.13", "0.4.14"}
