"""The vLLM flags and variables that a config may add, and the reason why each of the others is refused.

An allowed setting is complete in its value. Any other could make the served unit differ from the judged one: other weights,
code, a file, or a port of its own. The lists were read from vLLM 0.26 to 0.32.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.errors import Problem

ALLOWED = frozenset([
    "async-scheduling", "attention-backend", "attention-config", "block-size",
    "chat-template-content-format", "compilation-config", "cpu-offload-gb", "cudagraph-capture-sizes",
    "default-chat-template-kwargs", "disable-cascade-attn", "disable-custom-all-reduce",
    "disable-hybrid-kv-cache-manager", "disable-sliding-window", "enable-auto-tool-choice",
    "enable-chunked-prefill", "enable-expert-parallel", "enable-force-include-usage",
    "enable-prefix-caching", "enable-prompt-tokens-details", "exclude-tools-when-tool-choice-none",
    "gpu-memory-utilization", "hf-overrides", "kv-cache-dtype", "kv-offloading-backend",
    "kv-offloading-size", "limit-mm-per-prompt", "logprobs-mode", "long-prefill-token-threshold",
    "max-cudagraph-capture-size", "max-logprobs", "max-num-batched-tokens", "max-num-partial-prefills",
    "max-long-partial-prefills", "max-num-queued-reqs", "max-num-queued-tokens", "mm-processor-kwargs",
    "moe-backend", "no-async-scheduling", "no-enable-chunked-prefill", "no-enable-prefix-caching",
    "num-gpu-blocks-override", "optimization-level", "override-generation-config", "performance-mode",
    "pipeline-parallel-size", "prefix-caching-hash-algo", "quantization", "reasoning-parser",
    "response-role", "return-tokens-as-token-ids", "safetensors-load-strategy",
    "scheduler-reserve-full-isl", "scheduling-policy", "seed", "stream-interval",
    "structured-outputs-config", "tokenizer-mode", "tool-call-parser", "tool-strict-level",
])  # fmt: skip
OWNED = {
    "dtype": "serve.dtype",
    "enforce-eager": "serve.enforce_eager",
    "kv-cache-memory-bytes": "serve.kv_cache_memory",
    "max-model-len": "serve.max_model_len",
    "max-num-seqs": "serve.max_num_seqs",
    "served-model-name": "serve.served_model_name",
    "tensor-parallel-size": "serve.tensor_parallel_size",
    "shutdown-timeout": "serve.shutdown_timeout",
}
OTHER_MODEL = "would serve something that was not judged"
OTHER_DOOR = "is the proxy's business: promote.host, promote.port and promote.api_key_env"
OTHER_CODE = "would run code that is in no digest"
OTHER_FILE = "names a file that is in no digest"
REFUSED = {
    **dict.fromkeys([
        "model", "tokenizer", "revision", "tokenizer-revision", "code-revision", "hf-config-path",
        "speculative-config", "spec-model", "spec-method", "lora-modules", "enable-lora",
        "default-mm-loras", "kv-transfer-config", "ec-transfer-config", "weight-transfer-config",
        "download-dir",
    ], OTHER_MODEL),
    **dict.fromkeys([
        "host", "port", "uds", "grpc-port", "api-key", "root-path", "ssl-keyfile", "ssl-certfile",
        "ssl-ca-certs", "ssl-cert-reqs", "allowed-origins", "allowed-methods", "allowed-headers",
        "allow-credentials", "headless",
    ], OTHER_DOOR),
    **dict.fromkeys([
        "trust-remote-code", "trust-request-chat-template", "worker-cls", "worker-extension-cls",
        "scheduler-cls", "middleware", "logits-processors", "distributed-executor-backend",
        "tool-parser-plugin", "reasoning-parser-plugin", "io-processor-plugin", "tool-server",
        "load-format", "model-loader-extra-config", "model-class-overrides", "additional-config",
        "model-impl",
    ], OTHER_CODE),
    **dict.fromkeys([
        "config", "chat-template", "generation-config", "allowed-local-media-path", "log-config-file", "logging-config",
        "pt-load-map-location",
    ], OTHER_FILE),
    "hf-token": "is a secret: export HF_TOKEN instead (serving needs no hub)",
    "disable-log-stats": "would hide the requests in flight, and draining needs them",
}  # fmt: skip

# Variables decide how vLLM computes, never its files, its address or its telemetry.
PREFIXES = (
    "VLLM", "OMP", "KMP", "GOMP", "MKL", "TORCHINDUCTOR", "NCCL", "GLOO", "MALLOC", "TOKENIZERS",
)  # fmt: skip
ALLOWED_ENV = re.compile(rf"({'|'.join(PREFIXES)})_[A-Z0-9_]+")
REFUSED_ENV = re.compile(
    r"VLLM_(API_KEY|CACHE_ROOT|CONFIG_ROOT|PLUGINS|USE_MODELSCOPE|SERVER_DEV_MODE|ALLOW_\w+|HOST_IP|PORT|RPC_BASE_PATH"
    r"|LOGGING_CONFIG_PATH|CONFIGURE_LOGGING|NO_USAGE_STATS|DO_NOT_TRACK|USAGE_\w+|MODEL_REDIRECT_PATH|XLA_CACHE_PATH"
    r"|ASSETS_CACHE|TRACE_FUNCTION|S3_\w+|TUNED_CONFIG_FOLDER|CPU_KVCACHE_SPACE|CPU_CI_ENV|TARGET_DEVICE)"
    r"|TORCHINDUCTOR_CACHE_DIR|\w*(TOKEN|KEY|KEYS|SECRET|PASSWORD|CREDENTIALS)"
)


def argument_problems(arguments: Mapping[str, str | int | float | bool]) -> Iterator[Problem]:
    """The problems of `serve.extra_args`."""
    for key, value in arguments.items():
        flag = key.removeprefix("--").replace("_", "-").partition("=")[0].partition(".")[0]
        where = f"serve.extra_args.{key}"
        if flag in OWNED:
            yield Problem("must be set by its own key", key=where, remedy=f"set {OWNED[flag]}")
        elif flag.removeprefix("no-") in REFUSED:
            yield Problem(REFUSED[flag.removeprefix("no-")], key=where, remedy="remove it from the config")
        elif key.replace("_", "-") not in ALLOWED:
            close = difflib.get_close_matches(flag, ALLOWED, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            yield Problem(
                "is not on the list of allowed vLLM flags",
                key=where,
                allowed=f"{hint}one of: {', '.join(sorted(ALLOWED))}",
                remedy="correct or remove it",
            )
        elif isinstance(value, str) and _names_a_file(value):
            yield Problem(f"{value!r}: {OTHER_FILE}", key=where, remedy="write the value itself")


def _names_a_file(value: str) -> bool:
    return value.startswith(("/", "./", "../", "~")) or (len(value) < 200 and Path(value).is_file())


def env_problems(env: Mapping[str, str]) -> Iterator[Problem]:
    """The problems of `serve.env`."""
    for key, value in env.items():
        where = f"serve.env.{key}"
        if re.fullmatch(REFUSED_ENV, key):
            yield Problem(
                "would change what is loaded, where the server listens or what it tells, or is a secret",
                key=where,
                remedy="remove it; secrets come from the environment of the command, never from the config",
            )
        elif not re.fullmatch(ALLOWED_ENV, key):
            yield Problem(
                "is not an allowed environment variable",
                key=where,
                allowed=" ".join(f"{prefix}_*" for prefix in PREFIXES),
                remedy="remove it",
            )
        elif "\0" in value or "\n" in value:
            yield Problem("must be one line", key=where, remedy="remove the line break")
