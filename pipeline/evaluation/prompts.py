"""Stage program: greedy answers of a served model to must-pass prompts, and the assertions that they break.

Talks HTTP to a running vLLM; runs in the control environment. Request: config `evaluate` (prompts, max_tokens, concurrency),
`digest` of the prompts file, `url`, `model`, optionally `seed`; no inputs. Payload: prompts.json, a
PromptResult for each prompt in the file's order.

Answers are kept in answers.jsonl, so that a killed run goes on where it was. A request that fails for good breaks its prompt.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from pipeline import files, program
from pipeline.artifacts import PromptResult
from pipeline.config.schema import EvaluateConfig
from pipeline.digests import digest_file
from pipeline.errors import ConfigError, ServingError
from pipeline.evaluation.assertions import broken
from pipeline.evaluation.client import RequestFailed, complete, connect, shown
from pipeline.evaluation.prompts_file import Prompt, read


def run(request: program.Request) -> dict[str, Any]:
    """Ask one served system; see the module docstring.

    Raises ConfigError when the file is wrong or another than the build began with, ServingError when the server is gone or
    answers nobody.
    """
    config = EvaluateConfig(**request.config["evaluate"])
    file = Path(config.prompts or "")
    prompts = read(file)
    if digest_file(file) != request.config["digest"]:
        raise ConfigError("changed while the build ran", file=str(file), remedy="run the same command again")
    answers, failures = asyncio.run(_ask(request, config, prompts))
    if len(failures) == len(prompts):
        raise ServingError(
            f"all {len(failures)} must-pass prompts got no answer, the last with: {list(failures.values())[-1]}",
            remedy="read the server's log; too long prompts need a higher serve.max_model_len",
        )
    results = [_result(prompt, answers.get(prompt.id), failures.get(prompt.id)) for prompt in prompts]
    files.write_json(request.payload / "prompts.json", [result.model_dump(mode="json") for result in results])
    return {"prompts": len(results), "broken": sum(bool(result.broken) for result in results), "errors": len(failures)}


async def _ask(
    request: program.Request, config: EvaluateConfig, prompts: tuple[Prompt, ...]
) -> tuple[dict[str, str], dict[str, str]]:
    """Answers by prompt id, those of a killed run among them, and why the others failed; `concurrency` requests at a time."""
    model, seed = request.config["model"], int(request.config.get("seed", 0))
    answers_file = request.folder / "answers.jsonl"
    answers: dict[str, str] = dict(json.loads(line) for line in files.finished_lines(answers_file))
    failures: dict[str, str] = {}
    todo = iter([prompt for prompt in prompts if prompt.id not in answers])

    async def work() -> None:
        for prompt in todo:
            try:
                completion = await complete(http, model, prompt.messages, max_tokens=config.max_tokens, seed=seed)
            except RequestFailed as error:
                failures[prompt.id] = str(error)
            else:
                answers[prompt.id] = completion["choices"][0]["message"]["content"] or ""
                with answers_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([prompt.id, answers[prompt.id]]) + "\n")
            program.progress(len(answers) + len(failures), len(prompts), "prompts", errors=len(failures))

    async with connect(request.config["url"], None, config.concurrency) as http:
        await asyncio.gather(*(work() for _ in range(min(config.concurrency, len(prompts)))))
    return answers, failures


def _result(prompt: Prompt, answer: str | None, failure: str | None) -> PromptResult:
    if answer is None:
        faults: list[str | None] = [f"no answer: {failure}"]
    else:
        faults = [broken(assertion, answer) for assertion in prompt.assertions]
    return PromptResult(
        id=prompt.id, prompt=shown(prompt.messages), answer=answer or "", broken=tuple(filter(None, faults))
    )


if __name__ == "__main__":
    program.main(run)
