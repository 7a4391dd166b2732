"""The build's calls of the must-pass prompts' program."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.released import a_config

from flows import prompts, stages


def test_prompts_are_sent_once_for_a_served_unit_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file or another unit sends them anew; a config without a file starts no server."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    file = tmp_path / "prompts.yaml"
    file.write_text("- prompt: hello\n")
    config = a_config(evaluate={"prompts": str(file)})
    requests: list[dict] = []

    def run_program(_module, _environment, _config, request, _show):
        requests.append(request.config)
        record = {"id": "0", "prompt": "hello", "answer": f"answer {len(requests)}", "broken": []}
        (request.payload / "prompts.json").write_text(json.dumps([record]))
        return {}

    monkeypatch.setattr(stages, "run_program", run_program)

    def answers(unit: str, settings=config) -> list[str]:
        where = lambda: {"system": "candidate", "url": "http://127.0.0.1:9", "model": "t"}  # noqa: E731
        served = SimpleNamespace(digest=unit, vllm_version="0.1")
        results = prompts.prompt_results(settings, served, "", where, lambda _event: None)
        return [result.answer for result in results]

    assert [answers("u"), answers("u"), answers("v")] == [["answer 1"], ["answer 1"], ["answer 2"]]
    file.write_text("- prompt: hello there\n")
    assert answers("u") == ["answer 3"]
    assert requests[0]["digest"] != requests[2]["digest"]
    assert answers("u", a_config()) == []
