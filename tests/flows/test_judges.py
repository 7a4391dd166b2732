"""The build's calls of lm-eval's tasks and LLM judges: what is kept, what is skipped, what is told before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes.fake_judge import KEY, endpoint, honest, verdict
from support.stored import all_artifacts

from flows import judges, stages
from pipeline.artifacts import Evaluation, Item
from pipeline.config.file import load
from pipeline.config.schema import Config
from pipeline.environments.interpreters import Environment
from pipeline.errors import ConfigError, EnvironmentMissing
from pipeline.plan import plan, resolve, rules


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A store of a test's own; the judge's stage program runs without Prefect around it."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(judges, "_judge", judges._judge.fn)
    return tmp_path / "home"


def config(base_url: str = "http://127.0.0.1:9/v1", **entry) -> dict:
    """A resolved config with one LLM judge."""
    section = {"against": "base", "base_url": base_url, "model": "judge-1", **entry}
    data = {"datasets": [{"path": "rows.jsonl"}]}
    made = Config.model_validate({"name": "t", "data": data, "evaluate": {"judges": [section]}})
    return made.model_dump(mode="json")


def evaluation(system: str, answer: str, count: int = 4) -> Evaluation:
    """A system that always says the same."""
    items = tuple(
        Item(
            id=f"{number}", prompt="?", expected="yes", answer=answer, finish_reason="stop", scores={"exact_match": 0.0}
        )
        for number in range(count)
    )
    return Evaluation(
        system=system, unit_digest=system, holdout_digest="h", metrics={}, items=items, errors=0, seconds=1.0
    )


BOTH = {"base": evaluation("base", "perhaps"), "candidate": evaluation("candidate", "yes, indeed")}


def judged(asked: dict, evaluations: dict = BOTH, attempt: str = "") -> tuple:
    """The reports, and what was said."""
    said: list[dict] = []
    return judges.judged(asked, evaluations, attempt, said.append), said


def test_the_same_comparison_is_not_paid_for_twice(home):
    """The same answers come from the store, whatever the key and the concurrency; other criteria or --again ask anew."""
    with endpoint(honest) as there:
        first, _ = judged(config(there.base_url, max_items=3))
        assert (first[0].win_rate.value, len(first[0].items)) == (1.0, 3)
        assert len(there.asked) == 6
        assert judged(config(there.base_url, max_items=3, concurrency=1))[0] == first
        assert len(there.asked) == 6
        judged(config(there.base_url, max_items=3, criteria="Prefer the shorter one."))
        judged(config(there.base_url, max_items=3), attempt="again")
        assert len(there.asked) == 18
    assert {artifact.stage for artifact in all_artifacts()} == {"judge"}


def test_without_an_incumbent_there_is_nothing_to_compare(home):
    """It is said, and nobody is asked."""
    reports, said = judged(config(against="incumbent"))
    assert reports == ()
    assert [event["text"] for event in said] == ["judge-1 has nothing to compare: there is no incumbent"]


def test_the_key_reaches_the_judge_and_nothing_in_the_store(home, monkeypatch):
    """Other stage programs don't see it; this one is handed it by the variable's name."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with endpoint(lambda *_: verdict("tie")) as there:
        judged(config(there.base_url, api_key_env="JUDGE_API_KEY"))
    assert {head[1] for head in there.heads} == {f"Bearer {KEY}"}
    written = [file.read_text(encoding="utf-8") for file in home.rglob("*") if file.is_file()]
    assert any("JUDGE_API_KEY" in text for text in written)
    assert not any(KEY in text for text in written)


def test_a_key_that_is_missing_is_told_before_training(monkeypatch):
    """By the build itself, and as a warning by the check."""
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    asked = config(api_key_env="JUDGE_API_KEY")
    with pytest.raises(ConfigError, match="JUDGE_API_KEY is not set"):
        judges.need_keys(asked)
    said = [str(problem) for problem in resolve.warnings(asked, Path("use.yaml"))]
    assert any("use.yaml: evaluate.judges[0].api_key_env: JUDGE_API_KEY is not set here" in each for each in said)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    judges.need_keys(asked)
    assert not any("JUDGE_API_KEY" in str(problem) for problem in resolve.warnings(asked, Path("use.yaml")))


def write_config(folder: Path, evaluate: str) -> Path:
    (folder / "use.yaml").write_text(f"datasets: [{{path: t.jsonl}}]\nevaluate:\n  {evaluate}\n")
    return folder / "use.yaml"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("base_url: api.example.com/v1", "base_url"),
        ('base_url: "https://me:secret@api.example.com/v1"', "base_url"),
        ("base_url: https://api.example.com/v1, api_key_env: sk-1234", "api_key_env"),
        ("base_url: https://api.example.com/v1, api_key: sk-1234", "did you mean api_key_env?"),
    ],
)
def test_an_endpoint_is_an_address_without_secrets(tmp_path, entry, words):
    """A key stands in a variable, never in the config."""
    with pytest.raises(ConfigError, match=r"evaluate\.judges\.0") as caught:
        load(write_config(tmp_path, f"judges: [{{model: m, {entry}}}]"))
    assert words in str(caught.value)


def test_a_judge_of_what_is_not_measured_is_refused(tmp_path):
    """With its line."""
    file = write_config(tmp_path, "compare: [merged]\n  judges: [{model: m, base_url: https://api.example.com/v1}]")
    with pytest.raises(ConfigError, match="base is not measured") as caught:
        load(file, judge=rules.problems_across_sections)
    assert (caught.value.problems[0].line, caught.value.problems[0].key) == (4, "evaluate.judges[0].against")


def test_a_task_is_named_once(tmp_path):
    """Its metrics are TASK/METRIC, whatever else is asked of it."""
    with pytest.raises(ConfigError, match="tasks names arc_easy more than once"):
        load(write_config(tmp_path, "tasks: [{task: arc_easy}, {task: arc_easy, num_fewshot: 5}]"))


def test_the_plan_names_tasks_and_judges():
    """A line each, and none where there are none."""
    asked = {**config()["evaluate"], "tasks": [{"task": "arc_easy"}, {"task": "/tasks/mine.yaml"}]}
    found = plan.judges({"evaluate": asked})
    lines: list[str] = []
    plan.render(plan.Plan("t", "0" * 32, (), None, judges=found), Path("use.yaml"), lines.append)
    assert "  tasks     judges+serve   to do                 arc_easy, mine.yaml" in lines
    assert "  judge     control        to do                 judge-1 against base" in lines
    assert plan.judges({"evaluate": {"tasks": [], "judges": []}}) == {}


def test_tasks_without_their_environment_are_refused_with_the_command_that_makes_it(tmp_path, monkeypatch):
    """Before anything is read or trained."""
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path / "venvs"))
    asked = {"evaluate": {"tasks": [{"task": "arc_easy"}], "scorers": []}, "environments": {}}
    with pytest.raises(EnvironmentMissing, match="the judges environment isn't there") as caught:
        plan._judged_by(asked)
    assert caught.value.problems[0].remedy == "python3 -m pipeline.environments judges"


def test_a_task_is_run_once_for_a_served_unit(home, tmp_path, monkeypatch):
    """Whatever its role, so that an incumbent keeps what it got as a candidate; other data or another lm-eval runs it anew."""
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: mine.jsonl}\n")
    asked = config()
    asked["evaluate"] |= {"tasks": [{"task": str(tmp_path / "mine.yaml")}], "judges": []}
    site = tmp_path / "site"
    for package in ("lm_eval-0.4.13", "transformers-5.17.0"):
        (site / f"{package}.dist-info").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "pyvenv.cfg").write_text("")
    there = Environment("judges", tmp_path / "bin" / "python", (site,))
    monkeypatch.setattr(judges.interpreters, "find", lambda *_: there)
    record = {"task": "mine", "metric": "acc", "higher_is_better": True, "ids": ["0"], "values": [1.0]}
    ran = []

    def program(module, environment, _config, request, _show):
        ran.append((module, environment, request.config["max_model_len"]))
        (request.payload / "records.json").write_text(json.dumps([record]))
        return {}

    monkeypatch.setattr(stages, "run_program", program)
    unit = SimpleNamespace(digest="u", vllm_version="0.1")
    server = SimpleNamespace(url="http://127.0.0.1:9", model="t")

    def results(role: str) -> dict:
        system = SimpleNamespace(role=role, unit=unit, model=tmp_path, config={"serve": {"max_model_len": 64}})
        judges.run_tasks(asked, system, "", lambda: server, lambda _event: None)
        return judges.task_results(asked, system, "")

    first = results("candidate")["candidate"]
    assert (first[0].metric, first[0].values) == ("acc", (1.0,))
    assert results("incumbent") == {"incumbent": first}
    assert ran == [(judges.TASKS, "judges", 64)]
    (tmp_path / "mine.jsonl").write_text('{"other": 1}\n')
    results("candidate")
    (site / "lm_eval-0.4.13.dist-info").rename(site / "lm_eval-0.4.14.dist-info")
    results("candidate")
    assert len(ran) == 3
    assert {artifact.made_by["lm-eval"] for artifact in all_artifacts()} == {"0.4.13", "0.4.14"}
