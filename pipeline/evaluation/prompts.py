"""Stage program: must-pass prompts asked of a served model, greedily, and which assertions its answers break.

Talks HTTP to a running vLLM; runs in the control environment. Request: config `evaluate` (prompts, max_tokens, concurrency),
`digest` of the prompts file, `url`, `model`, optionally `seed` and `api_key_env`; no inputs. Payload: prompts.json, a
PromptResult for each prompt in the file's order.

Answers are kept in answers.jsonl, so that a killed run goes on where it was. A request that fails for good breaks its prompt.
"""

from __future__ import annotations

import asyncio
import json
import os
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
    answers, failed = asyncio.run(_ask(request, config, prompts))
    if len(failed) == len(prompts):
        raise ServingError(
            f"all {len(failed)} must-pass prompts got no answer, the last with: {list(failed.values())[-1]}",
            remedy="read the server's log",
        )
    results = [_result(prompt, answers.get(prompt.id), failed.get(prompt.id)) for prompt in prompts]
    files.write_json(request.payload / "prompts.json", [result.model_dump(mode="json") for result in results])
    return {"prompts": len(results), "broken": sum(bool(result.broken) for result in results), "errors": len(failed)}


async def _ask(
    request: program.Request, config: EvaluateConfig, prompts: tuple[Prompt, ...]
) -> tuple[dict[str, str], dict[str, str]]:
    """Answers by prompt id, those of a killed run among them, and why the others failed; `concurrency` requests at a time."""
    model, seed = request.config["model"], int(request.config.get("seed", 0))
    kept = request.folder / "answers.jsonl"
    answers: dict[str, str] = dict(json.loads(line) for line in files.finished_lines(kept))
    failed: dict[str, str] = {}
    todo = iter([prompt for prompt in prompts if prompt.id not in answers])
    api_key = os.environ.get(request.config.get("api_key_env") or "")

    async def work() -> None:
        for prompt in todo:
            try:
                said = await complete(http, model, prompt.messages, max_tokens=config.max_tokens, seed=seed)
            except RequestFailed as error:
                failed[prompt.id] = str(error)
            else:
                answers[prompt.id] = said["choices"][0]["message"]["content"] or ""
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([prompt.id, answers[prompt.id]]) + "\n")
            program.progress(len(answers) + len(failed), len(prompts), "prompts", errors=len(failed))

    async with connect(request.config["url"], api_key, config.concurrency) as http:
        await asyncio.gather(*(work() for _ in range(min(config.concurrency, len(prompts)))))
    return answers, failed


def _result(prompt: Prompt, answer: str | None, failure: str | None) -> PromptResult:
    said = [broken(one, answer) for one in prompt.assertions] if answer is not None else [f"no answer: {failure}"]
    return PromptResult(
        id=prompt.id, prompt=shown(prompt.messages), answer=answer or "", broken=tuple(filter(None, said))
    )


if __name__ == "__main__":
    program.main(run)
