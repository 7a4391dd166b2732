"""A holdout with a system message, a request to evaluate on it, and the report that comes back."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.artifacts import Evaluation
from pipeline.program import Request

NAME = "served"


LABELS = ["card_arrival", "lost_card", "top_up"]


def rows(count: int) -> list[dict]:
    """Holdout rows with a system message; the fake answers by what the user says."""
    return [
        {
            "id": f"{number:04x}",
            "messages": [
                {"role": "system", "content": "Name the intent."},
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": LABELS[number % 3]},
            ],
        }
        for number in range(count)
    ]


def write_holdout(folder: Path, holdout: list[dict]) -> None:
    payload = folder / "prepare" / "payload"
    payload.mkdir(parents=True, exist_ok=True)
    (payload / "holdout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in holdout), encoding="utf-8")


def answers_file(folder: Path, holdout: list[dict], wrong: int = 0) -> Path:
    """Right answers to all rows but the first `wrong`."""
    answers = {row["messages"][1]["content"]: row["messages"][2]["content"] for row in holdout[wrong:]}
    file = folder / "answers.json"
    file.write_text(json.dumps(answers), encoding="utf-8")
    return file


def request(folder: Path, url: str, **options) -> Request:
    section = {
        "scorers": [{"metric": "exact_match"}, {"metric": "accuracy"}],
        "concurrency": 4,
        "max_tokens": 16,
    }
    config = {
        "evaluate": {**section, **options}, "gate": {}, "system": "candidate", "url": url, "model": NAME,
        "unit_digest": "u", "seed": 7,
    }  # fmt: skip
    (folder / "work").mkdir(exist_ok=True)
    return Request(config, {"prepare": {"path": str(folder / "prepare")}}, folder / "work")


def report(request: Request) -> Evaluation:
    return Evaluation.model_validate_json((request.payload / "report.json").read_text(encoding="utf-8"))
