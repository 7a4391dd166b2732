"""Stage program: scores the answers of every step of a model's making as the evaluation scores the candidate's.

    python -m pipeline.ledger.scores REQUEST.json

Runs in the control environment, with the scorers, a user's own too. Request: config `evaluate`; inputs `prepare` and `ledger` (the
payload of ledger/answers.py). Payload: ledger.json, a list of LedgerEntry in the ledger's order, up to the last step in transformers.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from pipeline import files, program
from pipeline.artifacts import Artifact, LedgerEntry
from pipeline.config.schema import EvaluateConfig
from pipeline.evaluation import evaluate, scoring

ENTRIES = TypeAdapter(tuple[LedgerEntry, ...])


def run(request: program.Request) -> dict[str, Any]:
    """Score every step's answers; raises ConfigError naming the item where a user's own scorer fails."""
    score = scoring.item_scorer(EvaluateConfig(**request.config["evaluate"]).scorers)
    splits, answers = (Artifact(**request.inputs[name]) for name in ("prepare", "ledger"))
    rows = {row.id: row for row in evaluate.read_holdout(splits.payload / "holdout.jsonl")}
    entries = []
    for step in answers.detail["steps"]:
        records = json.loads((answers.payload / f"{step}.json").read_text(encoding="utf-8"))
        items = [
            evaluate.answered(rows[entry["id"]], entry["answer"], entry["finish_reason"], score) for entry in records
        ]
        entries.append(LedgerEntry(step=step, engine="transformers", items=tuple(items)))
    files.write_json(request.payload / "ledger.json", ENTRIES.dump_python(tuple(entries), mode="json"))
    return {"steps": len(entries)}


if __name__ == "__main__":
    program.main(run)
