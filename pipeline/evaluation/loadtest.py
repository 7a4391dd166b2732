"""Stage program: a closed-loop load sweep of a served model by vLLM's own `bench serve`, in this process.

Why vLLM's bench and not GuideLLM:
- It comes with the server under test, in the very same version: no further dependency or environment.
- vLLM's users know the names of its metrics.
- It gives the samples of each request, which the gate's intervals need.
- One import (10 to 40 s: it brings torch) serves all levels.

Its `benchmark` function is called rather than its command line, whose custom dataset sends one user message
and drops the system's: here each request is a holdout conversation, as evaluation sends it, ended by the
model itself or by `max_tokens`.

Runs in the serve environment. Request: config `loadtest`, `system`, `url`, `model`, `unit_digest`,
`model_path` (for its tokenizer), optionally `seed`; input `prepare`. Payload: report.json,
a LoadTest.

Evaluation has just sent the same prompts, so vLLM's prefix cache would answer from memory. Every run of a
level has a cache salt of its own: within it a shared system prompt is cached, as in production, but nothing
from before. Where the holdout has fewer rows than `num_prompts`, rows come again and are cached. The client
shares the machine with the server: on a small one it takes part of the cores that it measures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import files, program
from pipeline.artifacts import LoadLevel, LoadTest
from pipeline.config.schema import LoadtestConfig
from pipeline.errors import DataError, EnvironmentMissing, ServingError

PERCENTILES = (50, 95, 99)
LATENCIES = ("ttft", "itl", "e2el")
THROUGHPUTS = ("output_throughput", "request_throughput")
METRICS = tuple(f"p{p}_{name}_ms" for name in LATENCIES for p in PERCENTILES) + THROUGHPUTS


@dataclass(frozen=True)
class Target:
    """The server under load."""

    url: str
    model: str
    tokenizer: Any


@dataclass
class Level:
    """The runs of one level so far."""

    max_concurrency: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> LoadLevel:
        """The level in the artefact's terms; bench counts a failed request with 0 output tokens."""
        indices_of_runs = [[index for index, tokens in enumerate(run["output_lens"]) if tokens] for run in self.runs]
        samples: dict[str, list[tuple[float, ...]]] = {
            name: [] for name in ("ttft_ms", "e2el_ms", "output_tokens", "gaps", "itl_ms")
        }
        for run, indices in zip(self.runs, indices_of_runs, strict=True):
            samples["ttft_ms"].append(tuple(round(run["ttfts"][index] * 1000, 3) for index in indices))
            # until the last byte; not every version of vLLM lists it by itself
            ends = (run["ttfts"][index] + sum(run["itls"][index]) for index in indices)
            samples["e2el_ms"].append(tuple(round(end * 1000, 3) for end in ends))
            samples["output_tokens"].append(tuple(run["output_lens"][index] for index in indices))
            samples["gaps"].append(tuple(len(run["itls"][index]) for index in indices))
            samples["itl_ms"].append(tuple(round(gap * 1000, 3) for index in indices for gap in run["itls"][index]))
        return LoadLevel(
            max_concurrency=self.max_concurrency,
            completed=sum(run["completed"] for run in self.runs),
            failed=sum(run["failed"] for run in self.runs),
            metrics={name: tuple(float(run[name]) for run in self.runs) for name in METRICS},
            samples={name: tuple(repeats) for name, repeats in samples.items()},
        )


def run(request: program.Request) -> dict[str, Any]:
    """Sweep the levels, each `repeats` times, and write the report.

    The repeats are the outer loop: what drifts while the sweep runs falls on all levels alike.

    Raises DataError without prompts, EnvironmentMissing without vLLM, ServingError when no request comes
    through.
    """
    config = LoadtestConfig(**request.config["loadtest"])
    prompts = read_prompts(Path(request.inputs["prepare"]["path"], "payload", "holdout.jsonl"))
    random.Random(int(request.config.get("seed", 0))).shuffle(prompts)  # noqa: S311 - an order, no secret
    os.environ["NO_PROXY"] = "*"  # bench takes proxies from the environment, through aiohttp
    program.message("load test: importing vLLM's bench")
    target = Target(request.config["url"], request.config["model"], _tokenizer(request.config["model_path"]))
    widest = max(config.max_concurrency)
    asyncio.run(_bench(target, prompts[:1], config, size=widest, count=widest))
    gc.collect()
    gc.freeze()  # as bench does: no pauses over what the imports left
    levels = {size: Level(size) for size in config.max_concurrency}
    total = config.repeats * len(levels) * config.num_prompts
    for repeat in range(config.repeats):
        for number, level in enumerate(levels.values(), start=1):
            users = level.max_concurrency
            figures = asyncio.run(_bench(target, prompts, config, size=users, count=config.num_prompts))
            level.runs.append(figures)
            requests = (repeat * len(levels) + number) * config.num_prompts
            progress = {name: float(figures[name]) for name in ("output_throughput", "p95_e2el_ms")}
            program.progress(requests, total, "requests", max_concurrency=users, **progress)
    report = LoadTest(
        system=request.config["system"],
        unit_digest=request.config["unit_digest"],
        levels=tuple(level.record() for level in levels.values()),
    )
    files.write_json(request.payload / "report.json", report.model_dump(mode="json"))
    return {"levels": list(levels), "failed": sum(level.failed for level in report.levels)}


def read_prompts(holdout: Path) -> list[list[dict[str, str]]]:
    """The messages before each holdout row's answer. Raises DataError when there are none."""
    rows = [json.loads(line) for line in holdout.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    prompts = [row["messages"][:-1] for row in rows if len(row.get("messages") or []) > 1]
    if not prompts:
        raise DataError(
            "the holdout must hold at least one conversation", file=str(holdout), remedy="raise data.holdout_size"
        )
    return prompts


def _tokenizer(model_path: str) -> Any:
    """The served folder's tokenizer, for answers without a token count; no code of the folder runs."""
    try:
        from vllm.tokenizers import get_tokenizer
    except ImportError as error:
        raise EnvironmentMissing(
            f"vLLM's bench can't be imported: {error}",
            remedy="install the serve environment: tunegate doctor",
        ) from None
    return get_tokenizer(model_path, trust_remote_code=False)


async def _bench(
    target: Target,
    prompts: Sequence[list[dict[str, str]]],
    config: LoadtestConfig,
    *,
    size: int,
    count: int,
) -> dict[str, Any]:
    """One run of vLLM's bench: `count` requests by `size` users who wait for an answer before they ask again.

    Its tables go to the log. Raises ServingError when no request comes through.
    """
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    requests = [
        SampleRequest(
            prompt="",  # the messages are sent instead
            prompt_len=0,  # the server's usage says it
            expected_output_len=config.max_tokens,
            chat_messages=prompts[index % len(prompts)],
            request_id=str(index),
        )
        for index in range(count)
    ]
    figures: dict[str, Any] = await benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="openai-chat",
        api_url=f"{target.url}/v1/chat/completions",
        base_url=target.url,
        model_id=target.model,
        model_name=target.model,
        tokenizer=target.tokenizer,
        input_requests=requests,
        logprobs=None,
        request_rate=float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=0,
        profile=False,
        selected_percentile_metrics=list(LATENCIES),
        selected_percentiles=[float(percentile) for percentile in PERCENTILES],
        ignore_eos=False,
        goodput_config_dict={},
        max_concurrency=size,
        lora_modules=None,
        extra_headers=None,
        extra_body={"temperature": 0.0, "cache_salt": uuid.uuid4().hex},
        ready_check_timeout_sec=0,
    )
    if not figures["completed"]:
        reasons = sorted({reason.strip().splitlines()[-1] for reason in figures["errors"] if reason.strip()})
        raise ServingError(
            f"all {count} requests at concurrency {size} failed: {'; '.join(reasons) or 'no reason given'}",
            remedy="read the server's log; the same command again repeats the load test",
        )
    return figures


if __name__ == "__main__":
    program.main(run)
