"""Stage program: an LLM judge compares the candidate's answers with another system's, in both orders.

Talks to any OpenAI-compatible endpoint; runs in the control environment. Request: config `judge` (an entry of
evaluate.judges), `gate` (for the confidence) and `seed`; inputs `pairs`, the items as llm_judge_prompt.Pair. Payload:
report.json, a JudgeReport; extra/failed.json: the items without a usable verdict, and why.

Each item is asked about twice, the candidate's answer once as A and once as B, greedily and with the seed: a judge that prefers
a place rather than an answer ends at a win rate of 0.5 and an agreement of 0, in plain sight. Verdicts are kept in
judged.jsonl, so that a killed run goes on where it was. The key comes from the variable that the config names; it is
written nowhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any, Literal

import httpx

from pipeline import files, program
from pipeline.artifacts import Judgement, JudgeReport
from pipeline.config.gate import GateConfig
from pipeline.config.schema import JudgeConfig
from pipeline.errors import ConfigError, Problem, ServingError
from pipeline.evaluation.client import RequestFailed, connect, post
from pipeline.evaluation.llm_judge_prompt import Opinion, Pair, messages, opinion
from pipeline.evaluation.resumable import Resumable
from pipeline.intervals.proportions import wilson
from pipeline.intervals.scores import mean_interval

HIDDEN = "[key]"

Side = Literal["candidate", "other", "tie"]


def nothing_usable(failures: int, reason: str) -> ServingError:
    """The error when a judge says nothing usable: that isn't a result."""
    return ServingError(
        f"the judge gave no usable verdict on the first {failures} items, the last: {reason}",
        key="evaluate.judges",
        allowed='{"reason": "…", "winner": "A" or "B" or "tie"}',
        remedy="raise max_tokens, or take a model that follows instructions",
    )


def run(request: program.Request) -> dict[str, Any]:
    """Judge all pairs; see the module docstring.

    Raises ConfigError when the key's variable isn't set, ServingError when the endpoint is gone, refuses or says nothing usable.
    """
    config = JudgeConfig(**request.config["judge"])
    key = api_key(config.api_key_env, os.environ)
    pairs = [Pair(**pair) for pair in request.inputs["pairs"]]
    try:
        verdicts = asyncio.run(_ask(request, config, key, pairs))
    except ServingError as error:  # an endpoint may repeat the key that it refuses
        raise ServingError([Problem(**_without(key, vars(problem))) for problem in error.problems]) from None
    items = [verdicts.items[pair.id] for pair in pairs if pair.id in verdicts.items]
    report = report_of(config, items, len(verdicts.failures), GateConfig(**request.config["gate"]).confidence)
    files.write_json(request.payload / "report.json", report.model_dump(mode="json"))
    extra = request.folder / "extra"
    extra.mkdir(parents=True, exist_ok=True)
    files.write_json(extra / "failed.json", verdicts.failures)
    return {
        "items": len(items),
        "failed": report.failed,
        "win_rate": report.win_rate.value,
        "agreement": report.agreement.value,
    }


def api_key(variable: str | None, environ: Mapping[str, str]) -> str | None:
    """The endpoint's key, or None where the config names no variable; raises ConfigError when the variable isn't set or can't be a key."""
    if variable is None:
        return None
    if not environ.get(variable):
        raise ConfigError(
            f"{variable} is not set, and the judge's endpoint needs its key",
            key="evaluate.judges.api_key_env",
            remedy=f"export {variable}=…, or drop api_key_env where the endpoint needs no key",
        )
    if not environ[variable].isprintable() or " " in environ[variable]:
        raise ConfigError(
            f"{variable} holds a blank, a line end or another character that no key has",
            key="evaluate.judges.api_key_env",
            allowed="printable characters without blanks",
            remedy=f"export {variable} anew without it; a file with Windows' line ends leaves one behind",
        )
    return environ[variable]


def report_of(config: JudgeConfig, items: list[Judgement], failures: int, confidence: float) -> JudgeReport:
    """The report of these verdicts: win rate as a mean of item scores, agreement as a share (Wilson's interval)."""
    agreements = sum(item.candidate_first == item.candidate_second for item in items)
    return JudgeReport(
        against=config.against,
        model=config.model,
        win_rate=mean_interval([item.score for item in items], confidence),
        agreement=wilson(agreements, len(items), confidence),
        items=tuple(items),
        failed=failures,
    )


async def _ask(
    request: program.Request, config: JudgeConfig, key: str | None, pairs: list[Pair]
) -> Resumable[Judgement]:
    """Ask about everything that isn't judged yet, `concurrency` items at a time."""
    verdicts = Resumable[Judgement](
        request.folder / "judged.jsonl", len(pairs), lambda so_far: {"failed": len(so_far.failures)}, nothing_usable
    )
    verdicts.resume(Judgement, {pair.id for pair in pairs})
    if verdicts.items:
        program.message(f"{len(verdicts.items)} of {len(pairs)} verdicts were kept from an earlier run")
    todo = iter([pair for pair in pairs if pair.id not in verdicts.items])
    async with connect(config.base_url.rstrip("/"), key, config.concurrency, proxies=True) as http:

        async def work() -> None:
            for pair in todo:
                try:
                    verdicts.keep(await _judged(http, config, pair, request.config["seed"]))
                except RequestFailed as error:
                    verdicts.fail(pair.id, str(_without(key, {"reason": str(error)})["reason"]))

        await asyncio.gather(*(work() for _ in range(min(config.concurrency, len(pairs)))))
    return verdicts


async def _judged(http: httpx.AsyncClient, config: JudgeConfig, pair: Pair, seed: int) -> Judgement:
    """One item in both orders; raises RequestFailed when either order lacks a usable verdict."""
    first = await _opinion(http, config, pair, seed, candidate_first=True)
    second = await _opinion(http, config, pair, seed, candidate_first=False)
    sides: dict[str, tuple[Side, Side]] = {
        "A": ("candidate", "other"),
        "B": ("other", "candidate"),
        "tie": ("tie", "tie"),
    }
    return Judgement(
        id=pair.id,
        candidate_first=sides[first.winner][0],
        candidate_second=sides[second.winner][1],
        reason=first.reason,
    )


async def _opinion(
    http: httpx.AsyncClient, config: JudgeConfig, pair: Pair, seed: int, *, candidate_first: bool
) -> Opinion:
    conversation = messages(pair, config.criteria, reference=config.reference, candidate_first=candidate_first)
    body = {
        "model": config.model,
        "messages": conversation,
        "temperature": 0.0,
        "seed": seed,
        "max_tokens": config.max_tokens,
    }
    answer = await post(http, "/chat/completions", body)
    try:
        text = str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise RequestFailed(f"no chat completion: {str(answer)[:200]}") from None
    verdict = opinion(text)
    if verdict is None:
        raise RequestFailed(f"no verdict in: {text[:200]!r}")
    return verdict


def _without(key: str | None, words: Mapping[str, Any]) -> dict[str, Any]:
    """The same words without the key."""
    return {name: text.replace(key, HIDDEN) if key and isinstance(text, str) else text for name, text in words.items()}


if __name__ == "__main__":
    program.main(run)
