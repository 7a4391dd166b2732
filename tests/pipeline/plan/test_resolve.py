"""A config that was found right is remembered, and what can't end well is told before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import fake_smi

from pipeline.errors import ConfigError, Problem
from pipeline.plan import resolve

DATA = "datasets:\n  - path: train.jsonl\n"
PASSABLE = "gate:\n  metrics:\n    - {metric: exact_match, min: 0.5}\n"


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, away from the config: what lies beside that is looked at."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("TUNEGATE_HOME", str(folder))
    return folder


def written(folder: Path, text: str) -> Path:
    """A config file with this text after two lines of data."""
    file = folder / "use.yaml"
    file.write_text(DATA + text, encoding="utf-8")
    return file


def problems(folder: Path, text: str, *overrides: str) -> list[Problem]:
    """What is wrong with it."""
    with pytest.raises(ConfigError) as caught:
        resolve.resolve(written(folder, text), overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("gate:\n  metrics:\n    - metric: exact_match\n      min: 0.5\n    - metric: accuracy\n      min: 0.5\n",
         7, "gate.metrics[1].metric: accuracy is not measured"),
        ("gate:\n  metrics:\n    - metric: exact_match\n      against: base\nevaluate: {compare: [merged]}\n",
         6, "gate.metrics[0].against: base is not measured"),
        ("evaluate:\n  max_items: 20\n" + PASSABLE, 5, "gate.min_items: 100 scored items must be there"),
        (PASSABLE + "  load:\n    - {metric: p99_ttft_ms, max_concurrency: 8, max: 100}\n",
         7, "can't be bounded by 96 requests"),
        (PASSABLE + "  load:\n    - {metric: p50_ttft_ms, max_concurrency: 3, max: 100}\n", 7, "3 is not measured"),
        ("serve:\n  max_model_len: 256\n" + PASSABLE, 4, "evaluate.max_tokens: 256 leaves a prompt no room"),
        ("loadtest:\n  max_tokens: 2048\n" + PASSABLE, 4, "loadtest.max_tokens: 2048 leaves a prompt no room"),
        ("serve:\n  extra_args:\n    host: 0.0.0.0\n" + PASSABLE, 5, "serve.extra_args.host: "),
        ("serve:\n  env:\n    HF_TOKEN: x\n" + PASSABLE, 5, "serve.env.HF_TOKEN: "),
        ("evaluate:\n  scorers:\n    - {metric: json_valid, json_schema: {type: 3}}\n",
         4, "json_schema is not a JSON Schema"),
    ],
)  # fmt: skip
def test_what_would_be_found_hours_later_has_its_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    """A check that can't be decided, a flag that can't be served, a scorer that can't score: file, line and remedy."""
    (problem,) = problems(tmp_path, text)
    assert (problem.file, problem.line) == (str(tmp_path / "use.yaml"), line)
    assert what in str(problem)
    assert problem.remedy


def test_an_override_that_makes_a_policy_undecidable_is_named_as_such(tmp_path: Path) -> None:
    """The file is right; the problem stands on the command line."""
    (problem,) = problems(tmp_path, PASSABLE, "gate.metrics.0.metric=rougeL")
    assert (problem.file, problem.line) == ("--set", None)


def test_all_of_them_come_at_once(tmp_path: Path) -> None:
    """One run shows every mistake, in the order of the file."""
    text = (
        "serve: {extra_args: {port: 1}}\n"
        + PASSABLE
        + "    - {metric: rougeL, min: 0.1}\n  min_items: 300\nevaluate: {max_items: 9}\n"
    )
    assert [problem.line for problem in problems(tmp_path, text)] == [3, 7, 8]


def test_a_broken_config_is_not_remembered_and_a_right_one_is(tmp_path: Path, home: Path) -> None:
    """The second look at a file is at its digest alone."""
    problems(tmp_path, "gate:\n  metrics:\n    - {metric: accuracy, min: 0.5}\n")
    assert [file.name for file in home.rglob("*.json")] == ["sources.json"]  # the readers, and no config
    first = resolve.resolve(written(tmp_path, PASSABLE))
    (memory,) = (file for file in (home / "work" / "configs").iterdir() if file.name != "sources.json")
    memory.write_text(memory.read_text().replace('"exact_match"', '"token_f1"'))
    again = resolve.resolve(written(tmp_path, PASSABLE))
    assert first["gate"]["metrics"][0]["metric"] == "exact_match"
    assert again["gate"]["metrics"][0]["metric"] == "token_f1"


@pytest.mark.parametrize(
    ("text", "why", "metric"),
    [
        ("", "no quality is asked for", "exact_match"),
        ("evaluate:\n  scorers:\n    - metric: token_f1\n", "no quality is asked for", "token_f1"),
        (
            "gate:\n  metrics:\n    - {metric: exact_match, against: incumbent}\n",
            "compares with the incumbent",
            "exact_match",
        ),
    ],
)
def test_a_policy_that_cannot_pass_is_warned_of(tmp_path: Path, text: str, why: str, metric: str) -> None:
    """It is allowed, so that one may look first, but what to add is said."""
    file = written(tmp_path, text)
    (warning,) = resolve.warnings(resolve.resolve(file), file)
    assert why in str(warning)
    assert "the verdict can't be pass" in str(warning)
    assert f"{{metric: {metric}, min: 0.5}}" in str(warning.remedy)


@pytest.mark.parametrize("check", ["min: 0.5", "against: base", "against: incumbent, min: 0.1"])
def test_a_policy_that_can_pass_is_not(tmp_path: Path, check: str) -> None:
    """A floor or a comparison with the base applies to the first build too."""
    file = written(tmp_path, f"gate:\n  metrics:\n    - {{metric: exact_match, {check}}}\n")
    assert resolve.warnings(resolve.resolve(file), file) == []


GPUS = "serve: {tensor_parallel_size: 4}\nfinetune: {num_processes: 4, micro_batch_size: 4}\n"
POD = "{resources: {limits: {nvidia.com/gpu: 4}}}"


@pytest.mark.parametrize(
    ("pods", "keys"),
    [
        (None, ["finetune.num_processes", "serve.tensor_parallel_size"]),
        ("", ["finetune.num_processes", "serve.tensor_parallel_size"]),
        (f", flow: {POD}", []),
        (f", jobs: {{finetune: {POD}}}", ["serve.tensor_parallel_size"]),
        (f", flow: {POD}, jobs: {{finetune: {{}}}}", ["finetune.num_processes"]),
    ],
)
def test_too_few_gpus_here_are_a_warning_unless_a_clusters_pod_asks_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pods: str | None, keys: list[str]
) -> None:
    """The plan of a cluster's config can be read on a workstation with one GPU."""
    fake_smi.install(monkeypatch, tmp_path, 80000)
    cluster = "" if pods is None else f"kubernetes: {{image: 'x@sha256:{'0' * 64}'{pods}}}\n"
    file = written(tmp_path, f"{PASSABLE}{GPUS}{cluster}")
    assert [warning.key for warning in resolve.warnings(resolve.resolve(file), file)] == keys
