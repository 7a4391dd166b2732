"""The memory that stages and servers take, estimated from the base model's shape, and warnings of too much.

Training's figure is finetune/memory.py's, which decides when training starts. Standard library only: `tunegate check` asks every
time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline import hardware
from pipeline.config import methods
from pipeline.config.sizes import size_in_bytes
from pipeline.errors import ConfigError, Problem

PROMOTE = "promote (old and new side by side)"
KEYS = {  # the key that sets each figure most
    "finetune": "data.sequence_len",
    "quantize": "quantize.num_calibration_samples",
    "serve": "serve.kv_cache_memory",
    PROMOTE: "serve.kv_cache_memory",
}


def estimates(config: Mapping[str, Any], record: Mapping[str, Any] | None, device: hardware.Device) -> dict[str, int]:
    """Estimated peak bytes by stage; empty without the base's `record`.

    | stage    | for       | bytes                                                           |
    |----------|-----------|-----------------------------------------------------------------|
    | finetune | a process | weights + adapter + activations of a pass: `execution.estimate` |
    | quantize | a machine | 2 · parameters (4 on a CPU without bf16) + 4 · hidden · calibration tokens |
    | serve    | a GPU     | served weights / tensor_parallel_size + kv_cache_memory         |
    | promote  | a GPU     | 2 · serve                                                       |
    """
    if record is None:
        return {}
    from pipeline.finetune import execution  # here because before the stage base there is nothing to estimate

    shape, parameters = _shape(record), int(record["detail"]["parameters"])
    quantize, serve = config["quantize"], config["serve"]
    parts = serve["tensor_parallel_size"] if device.kind == "cuda" else 1
    server = served_weights(config, parameters, device) // parts + size_in_bytes(serve["kv_cache_memory"])
    compute_bytes = 4 if device.kind == "cpu" and not device.bf16 else 2  # as AWQ computes
    calibration_tokens = quantize["num_calibration_samples"] * quantize["max_calibration_tokens"]
    return {
        "finetune": execution.estimate(
            SimpleNamespace(**config["finetune"]), SimpleNamespace(**shape), parameters, kind=device.kind,
            device_memory=device.memory, sequence_len=config["data"]["sequence_len"],
        ),
        "quantize": parameters * compute_bytes + calibration_tokens * int(shape["hidden_size"]) * 4,
        "serve": server,
        PROMOTE: 2 * server,
    }  # fmt: skip


def served_weights(config: Mapping[str, Any], parameters: int, device: hardware.Device) -> int:
    """Bytes of the served weights, scales included; a device without bf16 unpacks quantized ones."""
    dtype = config["serve"]["dtype"]
    plain = parameters * (4 if (device.serving_dtype if dtype == "auto" else dtype) == "float32" else 2)
    method = methods.of(config["quantize"])
    is_packed = method and device.device_class not in hardware.WITHOUT_BF16
    return int(parameters * method.bytes_a_parameter) if method and is_packed else plain


def too_large(
    config: Mapping[str, Any], memory: Mapping[str, int], device: hardware.Device, path: Path
) -> Iterator[Problem]:
    """Figures above this machine's memory, as warnings: the config may be for another machine.

    Before the base model's shape is known, the figure is the KV cache alone. A server that doesn't fit isn't told again as two.
    """
    sizes = memory or {"serve": size_in_bytes(config["serve"]["kv_cache_memory"])}
    larger = [stage for stage, size in sizes.items() if size > device.memory > 0]
    for stage in larger:
        if stage != PROMOTE or "serve" not in larger:
            yield Problem(
                f"{stage} would take about {gib(sizes[stage])}, and {_here(device)} has {gib(device.memory)}",
                file=str(path),
                key=KEYS[stage],
                remedy=f"lower {KEYS[stage]}, or build on a larger machine",
            )


def raise_for_too_long(config: Mapping[str, Any], record: Mapping[str, Any] | None) -> None:
    """Raise ConfigError when serve.max_model_len is above the base model's positions, where its files are here.

    vLLM would refuse, hours later. Left to vLLM: models with scaled positions, and configs that allow vLLM more by themselves.
    """
    serve, shape = config["serve"], _shape(record) if record else _local_shape(Path(config["base_model"]))
    most, length = shape.get("max_position_embeddings"), serve["max_model_len"]
    is_scaled = any((shape.get(name) or {}).get("factor") for name in ("rope_scaling", "rope_parameters"))
    is_allowed = "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in serve["env"] or any("hf" in name for name in serve["extra_args"])
    if isinstance(most, int) and length > most and not is_scaled and not is_allowed:
        raise ConfigError(
            f"{length} must be at most {most} (max_position_embeddings in the base model's config.json)",
            key="serve.max_model_len",
            allowed=f"1 to {most}",
            remedy=f"set serve.max_model_len: {most}, or lower",
        )


def gib(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.1f} GiB"


def _here(device: hardware.Device) -> str:
    return "a GPU here" if device.kind == "cuda" else "this machine"


def _shape(record: Mapping[str, Any]) -> dict[str, Any]:
    return _local_shape(Path(record["path"]) / "payload")


def _local_shape(folder: Path) -> dict[str, Any]:
    """A model folder's config.json; empty where there is none."""
    file = folder / "config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
