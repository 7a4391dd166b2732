"""Why a model server died: the telling line of its log, and a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import Problem, ServingError

START = "=== tunegate starts vLLM"  # a line before each start, so that an old death isn't told again
PREFIX = re.compile(r"^(\([^)]*pid=\d+\) )?((ERROR|WARNING|INFO|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]+\] ?)?")
RAISED = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b(:|$)")
# vLLM's words about a death that another line explains.
SECOND_HAND = re.compile(
    r"See root cause above|initialization failed due to|Engine core initialization failed|^KeyboardInterrupt"
)
OUT_OF_MEMORY = re.compile(r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError")
# Remedies for a full GPU, by the function in vLLM's traceback that asked for more memory.
AT_WORK = {
    "load_model": "the weights don't fit: free the GPU, quantize, choose a smaller base_model, or raise "
    "serve.tensor_parallel_size",
    "profile_run": "no room for the activations: lower serve.max_num_seqs, serve.max_model_len or "
    "serve.extra_args.max_num_batched_tokens, or raise serve.tensor_parallel_size",
    "initialize_kv_cache": "the KV cache doesn't fit beside the weights: lower serve.kv_cache_memory, free the GPU, or raise "
    "serve.tensor_parallel_size",
    "compile_or_warm_up_model": "no room for CUDA graphs, which are captured for up to twice serve.max_num_seqs: lower that "
    "or serve.kv_cache_memory",
}
# Pattern and remedy; the first pattern that matches counts.
KNOWN: tuple[tuple[str, str], ...] = (
    (r"Address already in use|Errno 98", "another program took the port; run the same command again"),
    (
        r"Free memory on device",
        "remove serve.extra_args.gpu_memory_utilization (serve.kv_cache_memory says what is needed), or free the GPU",
    ),
    (r"No available memory for the cache blocks", "free the GPU, or raise serve.tensor_parallel_size"),
    (
        r"less than (requested memory for kv|desired CPU)|Cannot allocate memory|[^f]MemoryError",
        "free some memory, or lower serve.kv_cache_memory",
    ),
    (
        r"larger than the (maximum number of tokens|available KV cache memory)|KV cache is needed",
        "raise serve.kv_cache_memory, or lower serve.max_model_len",
    ),
    (
        r"max_model_len .* is greater than the derived max_model_len",
        "lower serve.max_model_len to what the model was made for",
    ),
    (
        r"Model architectures .* not supported|not supported for now|architecture .* failed to be inspected",
        "this vLLM doesn't serve that architecture: choose another base_model, or another vLLM",
    ),
    (
        r"unrecognized arguments|invalid choice|error: argument",
        "this vLLM doesn't know a flag: correct serve.extra_args, or the vLLM under environments.serve",
    ),
    (
        r"No module named|cannot import name|cannot open shared object file|undefined symbol",
        "the serving environment is broken: make setup",
    ),
    (
        r"must be divisible by tensor parallel|is not divisible by",
        "choose a serve.tensor_parallel_size that divides the model's attention heads",
    ),
    (
        r"World size .* is larger than",
        "lower serve.tensor_parallel_size to the number of devices",
    ),
    (
        r"Not enough allowed NUMA nodes",
        (
            "lower serve.tensor_parallel_size to the number of NUMA nodes, or give each part its cores in "
            "serve.env.VLLM_CPU_OMP_THREADS_BIND, such as 0-3|4-7"
        ),
    ),
    (r"No space left on device", "free some disk: tunegate gc"),
    (
        r"safetensors_rust\.|SafetensorError|size mismatch|shape mismatch|KeyError: '(model|lm_head)",
        "the model's files don't fit each other: run the build again",
    ),
)


def last_run(log: Path) -> list[str]:
    """The log's lines since the server was last started."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    begin = max((index for index, line in enumerate(lines) if line.startswith(START)), default=-1)
    return lines[begin + 1 :]


def of_death(log: Path, how: str) -> ServingError:
    """The error for a server that ended by itself; `how` says with which status or signal."""
    telling, remedy = _telling(last_run(log), how)
    description = f"vLLM {how}" + (f": {telling}" if telling else " without a word")
    return ServingError(Problem(description, file=str(log), remedy=remedy))


def of_silence(log: Path, seconds: int) -> ServingError:
    """The error for a server that wasn't ready in time."""
    words = [line for line in map(_bare, last_run(log)) if line.strip()]
    return ServingError(
        f"vLLM was not ready within {seconds} s; its last words: {words[-1][:300] if words else 'none'}",
        file=str(log),
        key="serve.startup_timeout",
        remedy="raise it if the log shows progress; the first start on a machine is the slowest",
    )


def _telling(lines: list[str], how: str) -> tuple[str, str]:
    bare = [_bare(line) for line in lines]
    if full := [line for line in bare if OUT_OF_MEMORY.search(line)]:
        telling = next((line for line in full if RAISED.match(line)), full[0])
        return telling.strip()[:500], _remedy_for_full_gpu(bare)
    for pattern, remedy in KNOWN:
        for line in bare:
            if re.search(pattern, line):
                return line.strip()[:500], remedy
    if "signal 9" in how:
        return (
            "killed, most often by the system when memory ran out",
            "free some memory, or lower serve.kv_cache_memory",
        )
    last_words = list(_raised(bare)) or [line for line in bare if line.strip()][-1:]
    return (last_words[0].strip()[:500] if last_words else ""), "read the log"


def _remedy_for_full_gpu(lines: list[str]) -> str:
    """The setting to change so that vLLM finds room on the GPU, by the function that ran out of it."""
    text = "\n".join(lines)
    remedies = [remedy for name, remedy in AT_WORK.items() if re.search(rf", in {name}$", text, re.MULTILINE)]
    return (
        remedies[0] if remedies else "stop what else uses the GPU, or lower serve.kv_cache_memory or serve.max_num_seqs"
    )


def _raised(lines: list[str]) -> Iterator[str]:
    """Lines that end a traceback, the first cause first, without those that only repeat it."""
    yield from (line for line in lines if RAISED.match(line) and not SECOND_HAND.search(line))


def _bare(line: str) -> str:
    return PREFIX.sub("", line, count=1)
