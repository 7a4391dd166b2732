"""vLLM's command line and environment, made from a ServeConfig, and the part of them that is in the served unit.

Each of vLLM's flags is either in the unit or in LEFT_OUT: where it listens, where the folder lies, how long it may take to
stop.
"""

from __future__ import annotations

from pipeline.config.schema import ServeConfig
from pipeline.config.sizes import size_in_bytes
from pipeline.errors import ConfigError, Problem
from pipeline.serving.refusals import argument_problems, env_problems

MODULE = "vllm.entrypoints.openai.api_server"
# Flags outside the served unit: they don't change an answer.
LEFT_OUT = (
    "--model", "--host", "--port", "--shutdown-timeout", "--disable-uvicorn-access-log", "--gpu-memory-utilization",
)  # fmt: skip
# vLLM on CUDA refuses to start unless this share of the GPU is free, by default 92 %. It does so even where the KV cache is
# given in bytes and nothing else reads the share: a new server would never start beside the one that it follows.
NO_SHARE = "--gpu-memory-utilization=0.01"
# No telemetry and no hub: the model folder is all there is. Outside the unit, too.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

# A CPU's cores are few: the engine runs in one process less, and every core computes.
CPU_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def unit_flags(serve: ServeConfig, name: str, auto_dtype: str = "bfloat16") -> tuple[str, ...]:
    """The flags that belong to the served unit, sorted, each `--flag` or `--flag=value`.

    `auto_dtype` is the meaning of `dtype: auto` on the device that serves. Raises ConfigError with every refused argument.
    """
    _raise(list(argument_problems(serve.extra_args)))
    flags = {
        "--dtype": auto_dtype if serve.dtype == "auto" else serve.dtype,
        "--kv-cache-memory-bytes": str(size_in_bytes(serve.kv_cache_memory)),
        "--max-model-len": str(serve.max_model_len),
        "--max-num-seqs": str(serve.max_num_seqs),
        "--served-model-name": serve.served_model_name or name,
        "--tensor-parallel-size": str(serve.tensor_parallel_size),
        "--load-format": "safetensors",
        # the base's own temperature and repetition penalty must not change answers; its end tokens still count
        "--generation-config": "vllm",
    }
    bare = ["--enforce-eager"] if serve.enforce_eager else []
    for key, argument in serve.extra_args.items():
        flag = "--" + key.replace("_", "-")
        if argument is True:
            bare.append(flag)
        elif argument is not False:
            flags[flag] = str(argument)
    return tuple(sorted([*bare, *(f"{flag}={argument}" for flag, argument in flags.items())]))


def unit_env(serve: ServeConfig, *, on_cpu: bool) -> dict[str, str]:
    """The environment that belongs to the served unit; raises ConfigError with every refused variable."""
    _raise(list(env_problems(serve.env)))
    return {**(CPU_ENV if on_cpu else {}), **serve.env}


def arguments(flags: tuple[str, ...], model: str, host: str, port: int, shutdown_timeout: int) -> list[str]:
    """The whole command line after the module's name: the unit's flags, and those of LEFT_OUT."""
    here = [f"--model={model}", f"--host={host}", f"--port={port}", f"--shutdown-timeout={shutdown_timeout}"]
    share = [] if any(flag.startswith("--gpu-memory-utilization=") for flag in flags) else [NO_SHARE]
    return [*here, "--disable-uvicorn-access-log", *share, *flags]


def name_in(flags: tuple[str, ...]) -> str:
    """The name that clients ask for, from a unit's flags."""
    return next(flag for flag in flags if flag.startswith("--served-model-name=")).partition("=")[2]


def _raise(problems: list[Problem]) -> None:
    if problems:
        raise ConfigError(problems)
