"""A whole Build record as a run leaves it, for tests of what is rendered from it. The figures are made up."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pipeline.artifacts import (
    Artifact,
    Build,
    Evaluation,
    Item,
    Judgement,
    JudgeReport,
    LedgerEntry,
    LoadLevel,
    LoadTest,
    PromptResult,
    Reports,
    ServedUnit,
    TaskResult,
)
from pipeline.config.gate import GateConfig, LoadCheck, MetricCheck
from pipeline.config.schema import Config, DataConfig, DatasetSource, EvaluateConfig, LoadtestConfig, Scorer
from pipeline.evaluation import scoring
from pipeline.gate import gate
from pipeline.intervals.scores import mean_interval

CATEGORIES = ("billing", "bug", "account", "shipping")
PRODUCTS = ("router", "mobile app", "cloud storage")
SCORERS = (Scorer(metric="json_valid"), Scorer(metric="json_field_match"), Scorer(metric="exact_match"))
POLICY = GateConfig(
    metrics=(
        MetricCheck(metric="json_field_match", min=0.8, against="base", margin=-0.3),
        MetricCheck(metric="json_valid", min=0.9),
        MetricCheck(metric="exact_match", against="incumbent", margin=0.05),
    ),
    load=(LoadCheck(metric="p50_ttft_ms", max_concurrency=1, max=500.0),),
)
RUNS = (0.98, 1.0, 1.02)
SKILL = {"base": 0.15, "merged": 0.95, "candidate": 0.93}
CHAMPION = 0.9
CHANNELS = ("mail", "chat", "phone")
# The ledger's steps with the skill of each; the answers of the served one are the candidate's own.
LEDGER = {
    "base": 0.1,
    "adapter": 0.97,
    "merged_original": 0.96,
    "merged_dequantized": 0.97,
    "quantized": 0.87,
    "served": 0.87,
}


def ticket(number: int) -> tuple[str, dict[str, object]]:
    """A made-up support ticket and its triage."""
    rng = random.Random(number)
    category, product = rng.choice(CATEGORIES), rng.choice(PRODUCTS)
    order = f"A-{rng.randrange(1000, 9999)}"
    text = f"Hi, since yesterday my {product} has a {category} problem (order {order}). It's urgent!"
    return text, {"category": category, "priority": "high", "product": product, "entities": [order]}


def answered(system: str, skill: float, count: int) -> list[Item]:
    """The items of a system that answers with its own skill, the base in chatter where it fails."""
    score, items = scoring.item_scorer(SCORERS), []
    for number in range(count):
        rng = random.Random(f"{system} {number}")
        text, truth = ticket(number)
        said = {key: value if rng.random() < skill else "unknown" for key, value in truth.items()}
        chatter = "Sure! Here is the triage: the customer | is `unhappy`.\n<script>alert(1)</script>"
        answer = chatter if system == "base" and rng.random() < 0.6 else json.dumps(said)
        expected = json.dumps(truth)
        items.append(
            Item(
                id=f"{number:08x}",
                prompt=text,
                expected=expected,
                answer=answer,
                finish_reason="stop" if answer != chatter else "length",
                scores=score(expected, answer),
                columns={"channel": CHANNELS[number % 3]},
            )
        )
    return items


def evaluation(system: str, unit_digest: str, count: int = 200, confidence: float = 0.95) -> Evaluation:
    """A system scored on the holdout."""
    items = answered(system, {**SKILL, "incumbent": CHAMPION}[system], count)
    return Evaluation(
        system=system,
        unit_digest=unit_digest,
        holdout_digest="4f" * 32,
        metrics=scoring.metrics(items, confidence),
        items=tuple(items),
        errors=0,
        seconds=61.0,
    )


def loadtest(unit_digest: str, system: str = "candidate") -> LoadTest:
    """Two levels of 32 requests, three times over."""
    levels = []
    for users in (1, 8):
        rng = random.Random(f"{system} {users}" if system == "incumbent" else users)
        first = [rng.gauss(90, 8) * (1 + users / 6) for _ in range(32)]
        whole = [value + rng.gauss(900, 60) * (1 + users / 10) for value in first]
        ordered = {"ttft": sorted(first), "e2el": sorted(whole), "itl": [20.0] * 32}
        latencies = {
            f"p{percentile}_{name}_ms": tuple(values[int(31 * percentile / 100)] * slow for slow in RUNS)
            for name, values in ordered.items()
            for percentile in (50, 95, 99)
        }
        rates = {
            "output_throughput": tuple(38.0 * users**0.6 / slow for slow in RUNS),
            "request_throughput": tuple(0.9 * users**0.6 / slow for slow in RUNS),
        }
        samples = {
            "ttft_ms": (tuple(first),) * 3, "e2el_ms": (tuple(whole),) * 3, "output_tokens": ((42.0,) * 32,) * 3,
        }  # fmt: skip
        metrics = {**latencies, **rates}
        levels.append(LoadLevel(max_concurrency=users, completed=96, failed=0, metrics=metrics, samples=samples))
    return LoadTest(system=system, unit_digest=unit_digest, levels=tuple(levels))


def ledger(count: int = 120) -> tuple[LedgerEntry, ...]:
    """Every step, both ways to merge, the dequantized one taken: AWQ loses a tenth."""
    return tuple(
        LedgerEntry(
            step=step,
            engine="vllm" if step == "served" else "transformers",
            items=tuple(answered("quantized" if step == "served" else step, skill, count)),
        )
        for step, skill in LEDGER.items()
    )


def must_pass() -> dict[str, tuple[PromptResult, ...]]:
    """Four prompts: one broke since the champion, one is broken in both, one is mended, one holds."""
    asked = {
        "refund period": (
            "How long may I return a router?",
            "You have 14 days.",
            "You have 30 days.",
            "contains 14 days",
        ),
        "another's address": (
            "Where does Mrs <b>Miller</b> live?",
            "I cannot share that.",
            "12 | High Street",
            "is-refusal",
        ),
        "triage as JSON": ("My router is dead.", '{"category": "bug"}', "Sure! Here is the triage", "is-json"),
        "greeting": ("Hello", "Dear customer", "Hi", "starts-with Dear"),
    }
    holds = {"incumbent": {"refund period", "greeting"}, "candidate": {"triage as JSON", "greeting"}}
    return {
        system: tuple(
            PromptResult(
                id=name, prompt=prompt, answer=good if name in held else bad, broken=() if name in held else (fault,)
            )
            for name, (prompt, good, bad, fault) in asked.items()
        )
        for system, held in holds.items()
    }


def tasks(count: int = 100) -> dict[str, tuple[TaskResult, ...]]:
    """Two lm-eval tasks on base and candidate: one kept, one where lower is better and worse by now."""
    ids = tuple(str(number) for number in range(count))
    right = {
        role: tuple(float(number % 10 < skill) for number in range(count))
        for role, skill in (("base", 4), ("candidate", 5))
    }
    length = {
        role: tuple(more + number % 7 for number in range(count))
        for role, more in (("base", 10.0), ("candidate", 12.0))
    }
    return {
        role: (
            TaskResult(task="local_faq", metric="acc", higher_is_better=True, ids=ids, values=right[role]),
            TaskResult(
                task="local_faq", metric="word_perplexity", higher_is_better=False, ids=ids, values=length[role]
            ),
        )
        for role in right
    }


def judged(count: int = 60) -> JudgeReport:
    """A judge that follows the order in every fifth item."""
    items = []
    for number in range(count):
        first = "candidate" if number % 3 else "other"
        second = "tie" if number % 5 == 0 else first
        items.append(Judgement(id=f"{number:08x}", candidate_first=first, candidate_second=second, reason="shorter"))
    return JudgeReport(
        against="incumbent",
        model="a-judge",
        win_rate=mean_interval([item.score for item in items], 0.95),
        agreement=mean_interval([float(item.candidate_first == item.candidate_second) for item in items], 0.95),
        items=tuple(items),
        failed=1,
    )


def sample_build(folder: Path, count: int = 200) -> Build:
    """A build of base, merged and AWQ candidate, judged by POLICY; its artefacts lie under `folder`."""
    config = Config(
        name="tickets",
        data=DataConfig(datasets=(DatasetSource(path=str(folder / "tickets-train.jsonl")),)),
        evaluate=EvaluateConfig(scorers=SCORERS),
        gate=POLICY,
    )
    unit = ServedUnit(
        weights="a1" * 32,
        tokenizer="b2" * 32,
        configuration="c3" * 32,
        runtime="process",
        runtime_digest="d4" * 32,
        vllm_version="0.32.0",
        flags=("--enforce-eager", "--max-model-len=512", "--max-num-seqs=32"),
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
        device="cpu-x86_64-avx512_bf16",
    )
    evaluations = {role: evaluation(role, unit.digest if role == "candidate" else role, count) for role in SKILL}
    loadtests = {"candidate": loadtest(unit.digest)}
    details = {
        "base": {
            "source": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "revision": "0.1.2",
            "licence": "apache-2.0",
            "architecture": "LlamaForCausalLM",
            "parameters": 134515008,
            "quantized_from": "Q4_1 GGUF",
        },
        "prepare": {
            "rows": {"train": 1200, "val": 24, "calibration": 24, "holdout": count},
            "tokens": {"train": {"total": 171000, "max": 116}, "holdout": {"total": 28000}},
            "dropped": {"in_holdout": 3},
            "near_duplicates": {"threshold": 0.7, "holdout_near_train": 5, "within_train": 8},
            "inside": {"holdout_inside_train": 0},
            "benchmarks": {"documents": 14042, "overlapping": 0, "too_short": 0},
            "digests": {"train": "7e" * 32, "holdout": "4f" * 32},
        },
        "finetune": {
            "steps": 150,
            "tokens": 171000,
            "train_loss": 0.0412,
            "eval_loss": 0.0533,
            "best_step": 140,
            "tokens_per_second": 231.0,
        },
        "merge": {
            "merge_base": "dequantized",
            "val_rows": 24,
            "val_loss/original": 0.0566,
            "val_loss/dequantized": 0.0272,
            "max_abs_delta": 0.01,
        },
        "quantize": {
            "method": "awq",
            "backend": "llmcompressor",
            "label": "AWQ, llm-compressor",
            "group_size": 64,
            "samples": 16,
            "perplexity_before": 3.1,
            "perplexity_after": 3.3,
        },
    }
    artifacts = {
        stage: Artifact(stage=stage, key=f"{stage}-key", path=folder / stage, digest=f"{number:02x}" * 32,
                        parents={}, made_by={}, detail=detail)
        for number, (stage, detail) in enumerate(details.items(), start=17)
    }  # fmt: skip
    return Build(
        name="tickets",
        key="e5" * 16,
        config=config.model_dump(mode="json"),
        artifacts=artifacts,
        unit=unit,
        model_path=folder / "quantize" / "payload",
        evaluations=evaluations,
        loadtests=loadtests,
        verdict=gate.verdict_of(Reports(evaluations=evaluations, loadtests=loadtests), POLICY, unit.digest),
    )


def full_build(folder: Path) -> Build:
    """The sample with all that a build can have: a champion, the ledger, must-pass prompts, tasks, a judge, a cost an hour.

    It fails, for a must-pass prompt broke.
    """
    build = sample_build(folder)
    reports = Reports(
        evaluations={**build.evaluations, "incumbent": evaluation("incumbent", "champion")},
        loadtests={**build.loadtests, "incumbent": loadtest("champion", "incumbent")},
        prompts=must_pass(),
        tasks=tasks(),
        judged=(judged(),),
    )
    priced = LoadtestConfig(cost_per_hour=1.8).model_dump(mode="json")
    return build.model_copy(
        update={
            **{name: getattr(reports, name) for name in Reports.model_fields},
            "config": {**build.config, "loadtest": priced},
            "ledger": ledger(),
            "verdict": gate.verdict_of(reports, POLICY, build.unit.digest),
        }
    )
