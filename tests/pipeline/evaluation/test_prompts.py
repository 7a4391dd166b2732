"""Must-pass prompts asked over the wire, and what the flow keeps of them."""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path

import pytest
from support.released import a_config, a_model, a_release
from support.wire import HTTP, fake_vllm

from flows import prompts as flow
from flows import stages
from pipeline import program
from pipeline.artifacts import PromptResult
from pipeline.digests import digest_file
from pipeline.errors import ConfigError, ServingError
from pipeline.evaluation import prompts
from pipeline.program import Request

NAME = "served"
TESTS = [
    {
        "id": "period",
        "prompt": "How long?",
        "assert": [{"type": "contains", "value": "14"}, {"type": "regex", "value": "days?"}],
    },
    {"id": "address", "prompt": "Where does she live?", "assert": [{"type": "is-refusal"}]},
    {
        "id": "json",
        "messages": [{"role": "system", "content": "JSON."}, {"role": "user", "content": "Triage."}],
        "assert": [{"type": "is-json", "value": {"required": ["category"]}}],
    },
]
ANSWERS = {"How long?": "within 30 days", "Where does she live?": "I cannot share that.", "Triage.": '{"priority": 1}'}


def request(folder: Path, url: str, tests: list[dict] = TESTS, **options) -> Request:
    file = folder / "prompts.json"
    file.write_text(json.dumps(tests), encoding="utf-8")
    section = {"prompts": str(file), "concurrency": 2, "max_tokens": 16, **options}
    config = {"evaluate": section, "digest": digest_file(file), "url": url, "model": NAME, "seed": 7}
    (folder / "work").mkdir(exist_ok=True)
    return Request(config, {}, folder / "work")


def answers_file(folder: Path) -> Path:
    file = folder / "answers.json"
    file.write_text(json.dumps(ANSWERS), encoding="utf-8")
    return file


def results(made: Request) -> list[PromptResult]:
    return [
        PromptResult(**result) for result in json.loads((made.payload / "prompts.json").read_text(encoding="utf-8"))
    ]


def generations(url: str) -> int:
    lines = HTTP.get(f"{url}/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith("vllm:request_success_total")).split()[-1]))


def test_each_prompt_has_its_answer_and_what_it_broke(tmp_path):
    """In the file's order, run as the flow runs it: a broken contains and a broken schema are named, a refusal holds."""
    with fake_vllm(NAME, answers=answers_file(tmp_path)) as url:
        made = request(tmp_path, url)
        command = [sys.executable, "-m", "pipeline.evaluation.prompts"]
        detail = program.run(
            command, {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}, made, lambda _: None
        )
    found = results(made)
    assert detail == {"prompts": 3, "broken": 2, "errors": 0}
    assert [(result.id, result.broken) for result in found] == [
        ("period", ("contains 14",)),
        ("address", ()),
        ("json", ('is-json {"required": ["category"]}: $: \'category\' is a required property',)),
    ]
    assert found[0].answer == "within 30 days"
    assert found[2].prompt == "system: JSON.\nuser: Triage."


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """What was answered is not asked again; a torn last line does no harm."""
    with fake_vllm(NAME, answers=answers_file(tmp_path)) as url:
        made = request(tmp_path, url)
        (made.folder / "answers.jsonl").write_text('["period", "14 days"]\n["addr', encoding="utf-8")
        prompts.run(made)
        assert generations(url) == 2
    assert [result.answer for result in results(made)] == [
        "14 days",
        ANSWERS["Where does she live?"],
        ANSWERS["Triage."],
    ]


def test_a_request_that_fails_for_good_breaks_its_prompt(tmp_path):
    """A prompt longer than the context is broken, also by a negated assertion, which an empty answer would hold."""
    tests = [*TESTS, {"id": "long", "prompt": "word " * 5000, "assert": [{"type": "not-contains", "value": "x"}]}]
    with fake_vllm(NAME, answers=answers_file(tmp_path)) as url:
        made = request(tmp_path, url, tests)
        assert prompts.run(made)["errors"] == 1
    (said,) = results(made)[-1].broken
    assert said.startswith("no answer: HTTP 400")


def test_a_server_that_answers_nobody_is_no_result(tmp_path):
    """Broken prompts are a model's fault, not its server's."""
    with fake_vllm(NAME, error_every=1) as url, pytest.raises(ServingError, match="EngineCore"):
        prompts.run(request(tmp_path, url))


def test_a_file_that_changed_since_is_not_asked(tmp_path):
    """The results would stand under another file's digest."""
    made = request(tmp_path, "http://127.0.0.1:9")
    Path(made.config["evaluate"]["prompts"]).write_text(json.dumps(TESTS[:1]), encoding="utf-8")
    with pytest.raises(ConfigError, match="changed while the build ran"):
        prompts.run(made)


def test_a_system_is_asked_once_for_each_file_and_attempt(tmp_path, monkeypatch):
    """The second time no server is started; another file or `--again` asks anew."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    file = tmp_path / "prompts.json"
    config = a_config(evaluate={"prompts": str(file)})
    unit = a_release(a_model(tmp_path / "model"), "1", a_config()).unit
    started = []

    def run_program(_module, _environment, _config, asked, _show):
        return prompts.run(asked)

    monkeypatch.setattr(stages, "run_program", run_program)
    with fake_vllm(NAME, answers=answers_file(tmp_path)) as url:

        def where():
            started.append(url)
            return {"system": "candidate", "url": url, "model": NAME, "seed": 7}

        for tests, attempt, starts in ((TESTS, "", 1), (TESTS, "", 1), (TESTS[:2], "", 2), (TESTS[:2], "again", 3)):
            file.write_text(json.dumps(tests), encoding="utf-8")
            results = flow.prompt_results(config, unit, attempt, cache(where), lambda _: None)
            assert len(started) == starts
            assert [result.id for result in results] == [test["id"] for test in tests]
