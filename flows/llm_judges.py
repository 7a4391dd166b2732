"""LLM judges, which compare the candidate's answers with those of another system; kept by the digest of the answers compared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import stages
from flows.stages import OnEvent
from pipeline import program
from pipeline.artifacts import Evaluation, JudgeReport
from pipeline.config.schema import Config, JudgeConfig
from pipeline.digests import digest_of
from pipeline.evaluation import llm_judge
from pipeline.plan import code

PROGRAM = "pipeline.evaluation.llm_judge"


def need_keys(config: Config) -> None:
    """Raise ConfigError now, not after hours of training, when the key of an LLM judge isn't in the environment."""
    for judge in config.evaluate.judges:
        llm_judge.api_key(judge.api_key_env, os.environ)


def reports(
    config: Config, evaluations: Mapping[str, Evaluation], attempt: str, show: OnEvent
) -> tuple[JudgeReport, ...]:
    """The reports of the config's LLM judges on the candidate against base and incumbent.

    A comparison is skipped, and a message says so, when the other system was not measured.
    """
    comparisons = []
    for judge in config.evaluate.judges:
        if judge.against in evaluations:
            comparisons.append(_compare(config, judge, dict(evaluations), attempt, show))
        else:
            text = f"{judge.model} compares nothing: {judge.against} was not measured"
            show({"event": "message", "text": text})
    return tuple(comparisons)


@task(name="judge", retries=1, retry_delay_seconds=10, retry_condition_fn=stages.worth_retrying, timeout_seconds=6 * 3600,
      cache_policy=NO_CACHE, persist_result=False)  # fmt: skip
def _compare(
    config: Config, judge: JudgeConfig, evaluations: dict[str, Evaluation], attempt: str, show: OnEvent
) -> JudgeReport:
    ours, theirs = evaluations["candidate"], evaluations[judge.against]
    pairs = [
        {"id": a.id, "prompt": a.prompt, "expected": a.expected, "candidate": a.answer, "other": b.answer}
        for a, b in zip(ours.items, theirs.items, strict=True)
    ][: judge.max_items]
    parents = {"candidate": ours.unit_digest, "other": theirs.unit_digest, "pairs": digest_of(pairs)}

    def make(folder: Path) -> stages.Origin:
        show({"event": "stage", "stage": "judge", "state": "running", "log": f"{judge.model}: {judge.against}"})
        sections = {"judge": judge.model_dump(mode="json"), "gate": config.gate.model_dump(mode="json")}
        request = program.Request({**sections, "seed": config.seed}, {"pairs": pairs}, folder)
        secrets = (judge.api_key_env,) if judge.api_key_env else ()
        detail = stages.run_program(PROGRAM, "control", config, request, show, keep=secrets)
        return stages.Origin(parents, {"judge": judge.model}, detail)

    artifact = stages.kept("judge", _key(config, judge, parents["pairs"], attempt), make)
    show({"event": "stage", "stage": "judge", "state": judge.against, "log": judge.model})
    return JudgeReport.model_validate_json((artifact.payload / "report.json").read_text(encoding="utf-8"))


def _key(config: Config, judge: JudgeConfig, pairs_digest: str, attempt: str) -> str:
    """The key of a comparison: neither the judge's key nor its concurrency decides the report."""
    parts = {
        "judge": judge.model_dump(mode="json", exclude={"api_key_env", "concurrency"}),
        "pairs": pairs_digest,
        "seed": config.seed,
        "confidence": config.gate.confidence,
        "source": code.source_digest(PROGRAM),
        "attempt": attempt,
    }
    return digest_of(parts)[:32]
