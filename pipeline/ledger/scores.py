"""Stage program: what the steps of a model's making answered, scored as the evaluation scores the candidate.

    python -m pipeline.ledger.scores REQUEST.json

Runs in the control environment, where the scorers are, a user's own too. Request: config `evaluate`; inputs `prepare` and
`ledger` (what ledger_answers made). Payload: ledger.json, a list of LedgerEntry in the ledger's order, as far as
transformers was asked.
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
    """Score every step's answers. Raises ConfigError naming the item where a user's own scorer fails."""
    score = scoring.item_scorer(EvaluateConfig(**request.config["evaluate"]).scorers)
    prepared, answered = (Artifact(**request.inputs[name]) for name in ("prepare", "ledger"))
    rows = {row.id: row for row in evaluate.read_holdout(prepared.payload / "holdout.jsonl")}
    entries = []
    for step in answered.detail["steps"]:
        said = json.loads((answered.payload / f"{step}.json").read_text(encoding="utf-8"))
        items = [evaluate.answered(rows[one["id"]], one["answer"], one["finish_reason"], score) for one in said]
        entries.append(LedgerEntry(step=step, engine="transformers", items=tuple(items)))
    files.write_json(request.payload / "ledger.json", ENTRIES.dump_python(tuple(entries), mode="json"))
    return {"steps": len(entries)}


if __name__ == "__main__":
    program.main(run)
