"""The build's calls of LLM judges: kept comparisons, skipped ones, and the errors before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.fake_judge import KEY, endpoint, honest, verdict
from support.stored import all_artifacts

from flows import llm_judges
from pipeline.artifacts import Evaluation, Item
from pipeline.config.file import load
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.plan import plan, resolve, rules


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A store of a test's own; the judge's stage program runs without Prefect around it."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(llm_judges, "_compare", llm_judges._compare.fn)
    return tmp_path / "home"


def config(base_url: str = "http://127.0.0.1:9/v1", **entry) -> Config:
    """A config with one LLM judge."""
    section = {"against": "base", "base_url": base_url, "model": "judge-1", **entry}
    data = {"datasets": [{"path": "rows.jsonl"}]}
    return Config.model_validate({"name": "t", "data": data, "evaluate": {"judges": [section]}})


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


def compare(settings: Config, evaluations: dict = BOTH, attempt: str = "") -> tuple:
    """The reports, and the events."""
    events: list[dict] = []
    return llm_judges.reports(settings, evaluations, attempt, events.append), events


def test_the_same_comparison_is_not_paid_for_twice(home):
    """The same answers come from the store, whatever the key and the concurrency; other criteria or --again ask anew."""
    with endpoint(honest) as there:
        first, _ = compare(config(there.base_url, max_items=3))
        assert (first[0].win_rate.value, len(first[0].items)) == (1.0, 3)
        assert len(there.asked) == 6
        assert compare(config(there.base_url, max_items=3, concurrency=1))[0] == first
        assert len(there.asked) == 6
        compare(config(there.base_url, max_items=3, criteria="Prefer the shorter one."))
        compare(config(there.base_url, max_items=3), attempt="again")
        assert len(there.asked) == 18
    assert {artifact.stage for artifact in all_artifacts()} == {"judge"}


def test_without_an_incumbent_there_is_nothing_to_compare(home):
    """It is said, and nobody is asked."""
    reports, events = compare(config(against="incumbent"))
    assert reports == ()
    assert [event["text"] for event in events] == ["judge-1 compares nothing: incumbent was not measured"]


def test_the_key_reaches_the_judge_and_nothing_in_the_store(home, monkeypatch):
    """Other stage programs don't see it; this one is handed it by the variable's name."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with endpoint(lambda *_: verdict("tie")) as there:
        compare(config(there.base_url, api_key_env="JUDGE_API_KEY"))
    assert {head[1] for head in there.heads} == {f"Bearer {KEY}"}
    written = [file.read_text(encoding="utf-8") for file in home.rglob("*") if file.is_file()]
    assert any("JUDGE_API_KEY" in text for text in written)
    assert not any(KEY in text for text in written)


def test_a_key_that_is_missing_is_told_before_training(monkeypatch):
    """By the build itself, and as a warning by the check."""
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    with_key = config(api_key_env="JUDGE_API_KEY")
    with pytest.raises(ConfigError, match="JUDGE_API_KEY is not set"):
        llm_judges.need_keys(with_key)
    said = [str(problem) for problem in resolve.warnings(with_key.model_dump(mode="json"), Path("use.yaml"))]
    assert any("use.yaml: evaluate.judges[0].api_key_env: JUDGE_API_KEY is not set here" in each for each in said)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    llm_judges.need_keys(with_key)
    assert not any(
        "JUDGE_API_KEY" in str(problem)
        for problem in resolve.warnings(with_key.model_dump(mode="json"), Path("use.yaml"))
    )


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


def test_the_plan_names_tasks_and_judges():
    """A line each, and none where there are none."""
    section = {
        **config().model_dump(mode="json")["evaluate"],
        "tasks": [{"task": "arc_easy"}, {"task": "/tasks/mine.yaml"}],
    }
    found = plan.judges({"evaluate": section})
    lines: list[str] = []
    plan.render(plan.Plan("t", "0" * 32, (), None, judges=found), Path("use.yaml"), lines.append)
    assert "  tasks     judges+serve   to do                 arc_easy, mine.yaml" in lines
    assert "  judge     control        to do                 judge-1 against base" in lines
    assert plan.judges({"evaluate": {"tasks": [], "judges": []}}) == {}
