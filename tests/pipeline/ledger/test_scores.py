"""Answers of every step, scored as the evaluation scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import programs

from pipeline import program
from pipeline.errors import ConfigError
from pipeline.ledger import scores

ROWS = [("a", "yes"), ("b", "no")]
ANSWERS = {
    "base": [("a", "yes", "stop"), ("b", "yes", "length")],
    "adapter": [("a", "yes", "stop"), ("b", "no", "stop")],
}


@pytest.fixture
def request_of(tmp_path: Path):
    """A request for these scorers, over two items that two steps answered."""
    for name in ("prepare", "ledger"):
        (tmp_path / name / "payload").mkdir(parents=True)
    lines = [
        {"id": key, "messages": [{"role": "user", "content": f"{key}?"}, {"role": "assistant", "content": expected}]}
        for key, expected in ROWS
    ]
    (tmp_path / "prepare" / "payload" / "holdout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, answers in ANSWERS.items():
        records = [{"id": key, "answer": answer, "finish_reason": reason} for key, answer, reason in answers]
        (tmp_path / "ledger" / "payload" / f"{step}.json").write_text(json.dumps(records))
    inputs = {
        "prepare": programs.artifact(tmp_path / "prepare", "prepare", {}),
        "ledger": programs.artifact(tmp_path / "ledger", "ledger", {"steps": list(ANSWERS)}),
    }

    def ask(*scorers: dict) -> program.Request:
        return program.Request({"evaluate": {"scorers": list(scorers)}}, inputs, tmp_path / "scored")

    return ask


def test_every_step_is_scored_on_the_same_items(request_of) -> None:
    """In the ledger's order, with expected answers, finish reasons and the config's own metrics."""
    request = request_of({"metric": "exact_match"})
    assert scores.run(request) == {"steps": 2}
    base, adapter = scores.ENTRIES.validate_json((request.payload / "ledger.json").read_bytes())
    assert (base.step, base.engine, adapter.step) == ("base", "transformers", "adapter")
    assert [item.scores["exact_match"] for item in base.items] == [1.0, 0.0]
    assert [item.scores["exact_match"] for item in adapter.items] == [1.0, 1.0]
    assert [(item.id, item.expected, item.finish_reason) for item in base.items] == [
        ("a", "yes", "stop"),
        ("b", "no", "length"),
    ]


def test_an_unknown_scorer_is_a_mistake_of_the_config(request_of) -> None:
    """Told before anything is scored."""
    with pytest.raises(ConfigError, match="nothing_like_it"):
        scores.run(request_of({"metric": "nothing_like_it"}))
