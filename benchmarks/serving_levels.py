"""One side of serving_cuda.py in a process of its own: level after level, one JSON line each on standard output.

    python benchmarks/serving_levels.py REQUEST.json

`url` in the request means load by vLLM's own bench, whose `benchmark` is called as pipeline/evaluation/loadtest.py calls it, with
random ids and `ignore_eos`: 3 requests a user and 16 at least. Without it the folder is loaded by transformers and one
batch of as many rows is generated greedily: each row's first token counts as its TTFT, each further step as an ITL. A
level that is expected to end after `time_limit` seconds, at the speed of the level before, is skipped and said to be.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PERCENTILES = (50, 95, 99)
EVERY_S = 0.2
Figures = dict[str, Any]
Level = Callable[[int], Figures]


@contextmanager
def watched_gpu(figures: Figures) -> Iterator[None]:
    """Note the mean utilisation in % and the most GiB in use of the first visible GPU; nothing where there is none."""
    look = gpu_probe()
    if look is None:
        yield
        return
    seen: list[tuple[float, float]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(EVERY_S):
            seen.append(look())

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    if seen:
        figures["gpu_utilisation"] = round(sum(used for used, _ in seen) / len(seen), 1)
        figures["gpu_gib"] = round(max(memory for _, memory in seen) / 2**30, 2)


def gpu_probe() -> Callable[[], tuple[float, float]] | None:
    """What asks NVML for utilisation in % and bytes in use; None without NVML or a GPU."""
    try:
        try:
            import pynvml
        except ImportError:
            from vllm.third_party import pynvml
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        card = (
            pynvml.nvmlDeviceGetHandleByIndex(int(visible))
            if visible.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(visible)
        )
    except Exception as error:  # noqa: BLE001 - NVML's errors have no common base that is there without it
        print(f"no GPU is watched: {error}", file=sys.stderr)
        return None
    return lambda: (pynvml.nvmlDeviceGetUtilizationRates(card).gpu, pynvml.nvmlDeviceGetMemoryInfo(card).used)


def percentiles(name: str, seconds: list[float]) -> Figures:
    """Percentiles in ms under vLLM's names."""
    ordered = sorted(seconds)
    return {f"p{p}_{name}_ms": 1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES}


def run(request: Figures, level: Level) -> None:
    """Every level that fits into the time limit, printed as it ends."""
    until = time.monotonic() + request["time_limit"]
    expected = 0.0  # seconds a token took at the level before
    for size in request["concurrency"]:
        tokens = requests_of(request, size) * request["output_len"]
        if time.monotonic() + expected * tokens > until:
            tell(concurrency=size, skipped=f"about {expected * tokens:.0f} s don't fit into --time-limit")
            continue
        figures: Figures = {}
        began = time.monotonic()
        try:
            with watched_gpu(figures):
                figures |= level(size)
        except (RuntimeError, ValueError) as error:  # torch's out of memory, or no request came through
            tell(concurrency=size, skipped=f"{type(error).__name__}: {error}"[:300])
            continue
        expected = (time.monotonic() - began) / tokens
        tell(concurrency=size, **figures)


def requests_of(request: Figures, size: int) -> int:
    """How many requests a level takes: enough for a steady state; a batch is one of each."""
    return max(16, 3 * size) if request["url"] else size


def tell(**figures: Any) -> None:
    """One line for the parent."""
    print(json.dumps(figures), flush=True)


def served(request: Figures) -> Level:
    """Levels of a server, by vLLM's bench."""
    from vllm.benchmarks.datasets import RandomDataset
    from vllm.benchmarks.serve import TaskType, benchmark
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(request["model_path"], trust_remote_code=False)

    def level(size: int, count: int | None = None) -> Figures:
        asked = RandomDataset(random_seed=request["seed"] + size).sample(
            tokenizer,
            count or requests_of(request, size),
            input_len=request["input_len"],
            output_len=request["output_len"],
        )
        found: Figures = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION, endpoint_type="openai", api_url=f"{request['url']}/v1/completions",
                base_url=request["url"], model_id=request["model"], model_name=request["model"], tokenizer=tokenizer,
                input_requests=asked, logprobs=None, request_rate=float("inf"), burstiness=1.0, disable_tqdm=True,
                num_warmups=0, profile=False, selected_percentile_metrics=["ttft", "itl"],
                selected_percentiles=[float(p) for p in PERCENTILES], ignore_eos=True, goodput_config_dict={},
                max_concurrency=size, lora_modules=None, extra_headers=None,
                extra_body={"temperature": 0.0, "cache_salt": uuid.uuid4().hex}, ready_check_timeout_sec=0,
            )
        )  # fmt: skip
        if not found["completed"]:
            raise RuntimeError(f"no request came through: {sorted(set(found['errors']))[:2]}")
        names = [f"p{p}_{name}_ms" for name in ("ttft", "itl") for p in PERCENTILES]
        return {
            "requests": found["completed"], "failed": found["failed"], "seconds": found["duration"],
            **{name: float(found[name]) for name in ("request_throughput", "output_throughput", *names)},
        }  # fmt: skip

    level(4, 4)  # the client's and the server's first time
    gc.collect()
    gc.freeze()
    return level


def generated(request: Figures) -> Level:
    """Batches of plain transformers: bf16, sdpa, greedy, as many tokens as asked."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        request["model_path"], dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    order = random.Random(request["seed"])

    class Clock(StoppingCriteria):
        """Notes when each step ends; generate asks it after every one, and stops nothing."""

        def __init__(self) -> None:
            self.at: list[float] = []

        def __call__(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
            if device == "cuda":
                torch.cuda.synchronize()
            self.at.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def level(size: int, length: int | None = None) -> Figures:
        new = length or request["output_len"]
        rows = [order.choices(range(min(100, model.config.vocab_size // 2), model.config.vocab_size), k=request["input_len"])
                for _ in range(size)]  # fmt: skip
        ids, clock = torch.tensor(rows, device=device), Clock()
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                min_new_tokens=new, pad_token_id=0, stopping_criteria=[clock],
            )  # fmt: skip
        seconds = time.perf_counter() - began
        assert out.shape[1] == request["input_len"] + new, out.shape
        steps = [later - earlier for earlier, later in zip(clock.at, clock.at[1:], strict=False)]
        return {
            "requests": size, "failed": 0, "seconds": seconds, "request_throughput": size / seconds,
            "output_throughput": size * new / seconds,
            **percentiles("ttft", [clock.at[0] - began]), **percentiles("itl", steps),
        }  # fmt: skip

    level(1, 4)
    return level


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run(asked, (served if asked["url"] else generated)(asked))
