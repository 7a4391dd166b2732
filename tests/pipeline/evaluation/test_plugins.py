"""Scorers of a user's own, from a real distribution on the import path."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import plugin
from support.holdout import NAME, answers_file, report, request, rows, write_holdout
from support.programs import artifact
from support.stored import all_artifacts
from support.wire import fake_vllm

from flows import measure, stages, systems
from pipeline import program
from pipeline.artifacts import Artifact, ServedUnit
from pipeline.config.file import load
from pipeline.config.gate import GateConfig, MetricCheck
from pipeline.config.schema import EvaluateConfig, LoadtestConfig, Scorer
from pipeline.errors import ConfigError
from pipeline.evaluation import evaluate, plugins, scoring
from pipeline.gate import policy as gate_policy
from pipeline.plan.rules import problems_across_sections

ROOT = Path(__file__).parents[3]
POLITE = """
def score(prompt, expected, answer):
    assert [message["role"] for message in prompt] == ["system", "user"]
    return 0.25 if "card" in answer else 1
"""
MANY = 'def score(prompt, expected, answer):\n    return {"toxic": 0.0, "biased": 1.0}\n'
PROMPT = [{"role": "user", "content": "hello"}]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs the scorer my_safety with this code, where this process imports from."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def write(code, **options):
        plugin.install(tmp_path / "site", code, **options)
        importlib.invalidate_caches()
        sys.modules.pop("safety_of_text", None)
        return tmp_path / "site"

    yield write
    sys.modules.pop("safety_of_text", None)


def config_file(folder: Path, metric: str, **scorer: object) -> Path:
    """A config that scores by this metric alone."""
    file = folder / "use.yaml"
    more = "".join(f", {key}: {value}" for key, value in scorer.items())
    file.write_text(f"datasets: [{{path: t.jsonl}}]\nevaluate:\n  scorers:\n    - {{metric: {metric}{more}}}\n")
    return file


def test_a_scorer_of_ones_own_works_like_a_built_in(tmp_path, installed):
    """In the stage program: it sees prompt, expected and answer of each item, and its mean has an interval."""
    site = installed(POLITE)
    holdout = rows(12)
    write_holdout(tmp_path, holdout)
    scorers = [{"metric": "exact_match"}, {"metric": "my_safety"}]
    with fake_vllm(NAME, answers=answers_file(tmp_path, holdout)) as url:
        made = request(tmp_path, url, scorers=scorers)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
        program.run([sys.executable, "-m", "pipeline.evaluation.evaluate"], environ, made, lambda _event: None)
    found = report(made)
    assert [item.scores["my_safety"] for item in found.items] == [0.25, 0.25, 1.0] * 4
    assert found.metrics["exact_match"].value == 1.0
    assert found.metrics["my_safety"].low < found.metrics["my_safety"].value == 0.5 < found.metrics["my_safety"].high


def test_a_dict_of_scores_stands_under_its_keys_and_their_mean(installed):
    """As json_field_match has it, so that the name itself is always measured."""
    installed(MANY)
    score = scoring.item_scorer([Scorer(metric="my_safety")])
    assert score("", "answer", PROMPT) == {"my_safety": 0.5, "my_safety/biased": 1.0, "my_safety/toxic": 0.0}


def test_a_failed_request_scores_zero_and_is_not_shown_to_the_scorer(installed):
    """The names are known from the items before."""
    installed('def score(prompt, expected, answer):\n    assert answer\n    return {"a": 1, "b": 1}\n')
    score = scoring.item_scorer([Scorer(metric="my_safety")])
    score("", "answer", PROMPT)
    assert score("", None, PROMPT) == {"my_safety": 0.0, "my_safety/a": 0.0, "my_safety/b": 0.0}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def score(*_):\n    raise KeyError('toxicity')\n", "raised KeyError: 'toxicity'"),
        ("def score(*_):\n    return 'safe'\n", r"returned 'safe' \(str\), not a number from 0 to 1"),
        ("def score(*_):\n    return True\n", r"returned True \(bool\), not a number"),
        ("def score(*_):\n    return 1.5\n", "returned 1.5, outside 0 to 1"),
        ("def score(*_):\n    return float('nan')\n", "returned nan, outside 0 to 1"),
        ("def score(*_):\n    return {}\n", "returned {}, whose keys are no names"),
        ("def score(*_):\n    return {'toxic': -1}\n", "returned -1.0 for toxic, outside 0 to 1"),
        ("score = 3\n", "is no function but 3"),
        ("import not_there\n", "can't be imported: ModuleNotFoundError"),
    ],
)
def test_a_broken_scorer_is_named_with_its_entry_point_and_the_item(tmp_path, installed, code, words):
    """Whose it is, which version, which item: nothing is counted as a score that isn't one."""
    installed(code)
    write_holdout(tmp_path, rows(1))
    whose = r"item 0000: the scorer my_safety \(safety_of_text:score of my_safety-scorer 1.0\) "
    with fake_vllm(NAME) as url, pytest.raises(ConfigError, match=whose + words):
        evaluate.run(request(tmp_path, url, scorers=[{"metric": "my_safety"}]))


def test_every_item_has_the_same_keys(installed):
    """A metric that only some items have would be a mean over other items than the rest."""
    installed("def score(prompt, expected, answer):\n    return {answer: 1}\n")
    score = scoring.item_scorer([Scorer(metric="my_safety")])
    score("", "a", PROMPT)
    with pytest.raises(plugins.ScorerBroken, match="gave my_safety, my_safety/b here"):
        score("", "b", PROMPT)


def test_without_a_prompt_it_is_not_asked(installed):
    """Whoever scores without the conversation learns it at once."""
    installed(POLITE)
    with pytest.raises(plugins.ScorerBroken, match="needs a prompt"):
        scoring.item_scorer([Scorer(metric="my_safety")])("", "answer")


def test_a_name_that_nobody_registers_is_refused_with_those_there_are(tmp_path, installed):
    """With its line, what was probably meant, and the built-in names beside the installed ones."""
    installed(POLITE)
    with pytest.raises(ConfigError) as caught:
        load(config_file(tmp_path, "my_saftey"), judge=problems_across_sections)
    (problem,) = caught.value.problems
    assert (problem.line, problem.key) == (4, "evaluate.scorers[0].metric")
    assert problem.allowed.startswith("did you mean my_safety?")
    for name in (*plugins.BUILT_IN, "my_safety"):
        assert name in problem.allowed


def test_the_check_never_imports_it(tmp_path, installed):
    """A registered name is enough; the module would leave a mark."""
    mark = tmp_path / "imported"
    installed(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n{POLITE}")
    load(config_file(tmp_path, "my_safety"), judge=problems_across_sections)
    assert plugins.versions(["exact_match", "my_safety"]) == {"my_safety": "my_safety-scorer 1.0"}
    assert not mark.exists()
    scoring.item_scorer([Scorer(metric="my_safety")])("", "answer", [{"role": "system"}, {"role": "user"}])
    assert mark.exists()


def test_two_packages_with_one_name_are_no_scorer(tmp_path, installed):
    """Which of them scores must not depend on the order of folders."""
    site = installed(POLITE)
    twin = site / "other_scorer-2.0.dist-info"
    twin.mkdir()
    (twin / "METADATA").write_text("Metadata-Version: 2.1\nName: other-scorer\nVersion: 2.0\n")
    (twin / "entry_points.txt").write_text("[tunegate.scorers]\nmy_safety = safety_of_text:score\n")
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="several packages register a scorer my_safety") as caught:
        load(config_file(tmp_path, "my_safety"), judge=problems_across_sections)
    assert caught.value.problems[0].allowed == "my_safety-scorer 1.0 and other-scorer 2.0"


def test_the_gate_may_ask_for_its_name_and_for_its_keys():
    """Which keys there are is known when it was asked; other metrics stay unknown."""
    asked = EvaluateConfig(scorers=(Scorer(metric="my_safety"),))
    for metric, wrong in [("my_safety", 0), ("my_safety/toxic", 0), ("my_safetyx", 1), ("exact_match", 1)]:
        policy = GateConfig(metrics=(MetricCheck(metric=metric, min=0.5),))
        assert len(gate_policy.problems(policy, asked, LoadtestConfig())) == wrong


def test_a_new_version_is_measured_anew(tmp_path, installed, monkeypatch):
    """The package and its version are part of the evaluation's key and stand in its record."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    write_holdout(tmp_path, rows(3))
    prepared = Artifact(**artifact(tmp_path / "prepare", "prepare", {}))
    unit = ServedUnit(
        weights="w", tokenizer="t", configuration="c", runtime="process", runtime_digest="r", vllm_version="0.1",
        flags=(), env={}, device="cpu",
    )  # fmt: skip
    monkeypatch.setattr(
        stages.interpreters, "find", lambda *_: stages.interpreters.Environment("control", Path(sys.executable))
    )
    asked = {"scorers": [{"metric": "my_safety"}], "max_tokens": 8, "concurrency": 2, "tasks": [], "judges": []}
    secrets = {"promote": {"api_key_env": "A_KEY"}, "notify": {"webhook_env": None}}
    config = {"evaluate": asked, "gate": {"confidence": 0.95}, "seed": 1, **secrets}
    system = systems.System("base", tmp_path, unit, config)
    with fake_vllm(NAME) as url:
        server = type("Server", (), {"url": url, "model": NAME})
        starts: list[str] = []

        def start():
            starts.append(plugins.versions(["my_safety"])["my_safety"])
            return server

        for version in ("1.0", "1.0", "1.1"):
            installed(POLITE, version=version)
            measure._evaluate(config, {"prepare": prepared}, system, "", start, lambda _event: None)
    assert starts == ["my_safety-scorer 1.0", "my_safety-scorer 1.1"]
    made = {artifact.made_by["my_safety"] for artifact in all_artifacts()}
    assert made == set(starts)


def test_the_module_costs_little_to_import():
    """`tunegate check` imports it, and most configs name no scorer that isn't built in."""
    code = "import sys, pipeline.evaluation.plugins; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"pydantic", "importlib.metadata", "email", "difflib"} & set(shown.stdout.split())
