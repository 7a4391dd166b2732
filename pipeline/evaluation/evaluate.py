"""Stage program: greedy answers of a served model on the holdout, scored item by item.

Talks HTTP to a running vLLM; runs in the control environment.

- Request: config `evaluate`, `gate` (for the confidence), `system`, `url`, `model`, `unit_digest`, optionally `seed`; inputs
  `prepare` and, where the system was trained, `finetune`.
- Payload: report.json, an Evaluation. extra/failed.json: the requests that failed, and how.

Finished answers are kept in items.jsonl, so that a killed run goes on where it was. A failed request is tried again a little, then
counted and scored 0. Limit: greedy answers can differ from run to run, because vLLM's sums depend on the rest of the batch.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pipeline import files, program
from pipeline.artifacts import Evaluation, Item
from pipeline.config.gate import GateConfig
from pipeline.config.schema import EvaluateConfig
from pipeline.digests import digest_file
from pipeline.errors import ConfigError, DataError, ServingError
from pipeline.evaluation import parity, scoring
from pipeline.evaluation.client import Message, RequestFailed, complete, connect, shown
from pipeline.evaluation.plugins import ScorerBroken
from pipeline.evaluation.resumable import Resumable

FAILED = "error"


@dataclass(frozen=True)
class Row:
    """A holdout row: the prompt's messages, the answer expected, and the further columns that it keeps."""

    id: str
    prompt: tuple[Message, ...]
    expected: str
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The prompt as a person reads it in a report."""
        return shown(self.prompt)


def means(answers: Resumable[Item]) -> dict[str, float]:
    """Failed requests so far, and the mean of the first score, in which they count 0."""
    failures = len(answers.failures)
    first = next(iter(next(iter(answers.items.values())).scores), None) if answers.items else None
    if first is None:
        return {"errors": failures}
    scores = [item.scores[first] for item in answers.items.values()]
    return {"errors": failures, first: sum(scores) / (len(scores) + failures)}


def nothing_answered(failures: int, reason: str) -> ServingError:
    """The error when a server answers nothing: that isn't a result."""
    return ServingError(
        f"all of the first {failures} requests failed, the last with: {reason}",
        remedy="read the server's log; too long prompts need a higher serve.max_model_len",
    )


def run(request: program.Request) -> dict[str, Any]:
    """Score one served system; see the module docstring.

    Raises ModelError when training and serving disagree on tokens, or a trained answer never ends. Raises DataError or ConfigError
    when holdout and scorers don't fit, or a user's own scorer fails. Raises ServingError when the server is gone.
    """
    config = EvaluateConfig(**request.config["evaluate"])
    holdout = Path(request.inputs["prepare"]["path"], "payload", "holdout.jsonl")
    rows = read_holdout(holdout)[: config.max_items]
    if problems := scoring.unfit(config.scorers, ((row.id, row.expected) for row in rows)):
        raise DataError(problems)
    score = scoring.item_scorer(config.scorers)
    start = time.monotonic()
    answers = asyncio.run(_answer(request, config, rows, score))
    items = [answers.items.get(row.id) or answered(row, None, FAILED, score) for row in rows]
    report = Evaluation(
        system=request.config["system"],
        unit_digest=request.config["unit_digest"],
        holdout_digest=digest_file(holdout),
        metrics=scoring.metrics(items, GateConfig(**request.config["gate"]).confidence),
        items=tuple(items),
        errors=len(answers.failures),
        seconds=time.monotonic() - start,
    )
    files.write_json(request.payload / "report.json", report.model_dump(mode="json"))
    _write_failures(request.folder / "extra", answers.failures)
    means = {name: interval.value for name, interval in report.metrics.items()}
    return {"items": len(items), "errors": report.errors, "seconds": report.seconds, "metrics": means}


def read_holdout(file: Path) -> list[Row]:
    """The holdout's rows in their order. Raises DataError when there are none or one isn't a conversation."""
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            messages = row.get("messages") or []
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise DataError(
                    "a holdout row needs messages that end in the assistant's answer",
                    file=str(file),
                    line=number,
                    remedy="give conversations, not plain text, in test_datasets",
                )
            rows.append(Row(row["id"], tuple(messages[:-1]), messages[-1]["content"], row.get("columns", {})))
    if len({row.id for row in rows}) < max(1, len(rows)):
        fault = "two rows share an id" if rows else "the holdout is empty"
        raise DataError(fault, file=str(file), remedy="raise data.holdout_size, then run the prepare stage again")
    return rows


async def _answer(
    request: program.Request,
    config: EvaluateConfig,
    rows: list[Row],
    score: scoring.Score,
) -> Resumable[Item]:
    """Preflight, then ask for everything that isn't answered yet, `concurrency` requests at a time."""
    model, seed = request.config["model"], int(request.config.get("seed", 0))
    answers = Resumable[Item](request.folder / "items.jsonl", len(rows), means, nothing_answered)
    answers.resume(Item, {row.id for row in rows})
    async with connect(request.config["url"], None, config.concurrency) as http:
        await preflight(http, model, request, config)
        if answers.items:
            program.message(f"{len(answers.items)} of {len(rows)} answers were kept from an earlier run")
        todo = iter([row for row in rows if row.id not in answers.items])

        async def work() -> None:
            for row in todo:
                try:
                    completion = await complete(http, model, row.prompt, max_tokens=config.max_tokens, seed=seed)
                except RequestFailed as error:
                    answers.fail(row.id, str(error))
                else:
                    choice = completion["choices"][0]
                    text, reason = choice["message"]["content"] or "", choice["finish_reason"] or ""
                    answers.keep(answered(row, text, reason, score))

        await asyncio.gather(*(work() for _ in range(min(config.concurrency, len(rows)))))
    return answers


async def preflight(http: httpx.AsyncClient, model: str, request: program.Request, config: EvaluateConfig) -> None:
    """For a trained system: check token parity, and that an answer ends."""
    if "finetune" not in request.inputs:
        program.message("token parity: not applicable, this system was not trained here")
        return
    conversations = parity.read_seen(Path(request.inputs["finetune"]["path"], "extra", "seen_tokens.jsonl"))
    try:
        await parity.check_tokens(http, model, conversations)
        await parity.check_ending(http, model, conversations, config.max_tokens)
    except RequestFailed as error:
        raise ServingError(f"the check before scoring got no answer: {error}", remedy="read the server's log") from None
    program.message(
        f"token parity: {len(conversations)} trained conversations have the same ids as served, and an answer ends"
    )


def answered(row: Row, answer: str | None, finish_reason: str, score: scoring.Score) -> Item:
    """The answered row; raises ConfigError naming it where a user's own scorer fails."""
    try:
        scores = score(row.expected, answer, row.prompt)
    except ScorerBroken as error:
        raise ConfigError(
            f"item {row.id}: {error}",
            key=f"evaluate.scorers.{error.name}",
            allowed="a number from 0 to 1, or a dict of such numbers with the same keys for every item",
            remedy="mend the scorer and install it again; with a new version every item is answered anew",
        ) from error
    return Item(
        id=row.id,
        prompt=row.shown,
        expected=row.expected,
        answer=answer or "",
        finish_reason=finish_reason,
        scores=scores,
        columns=row.columns,
    )


def _write_failures(extra: Path, failures: dict[str, str]) -> None:
    extra.mkdir(parents=True, exist_ok=True)
    files.write_json(extra / "failed.json", failures)
    for identity, reason in list(failures.items())[:3]:
        program.message(f"request {identity} failed: {reason}")


if __name__ == "__main__":
    program.main(run)
