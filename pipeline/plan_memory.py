"""What stages and servers take of a machine's memory, estimated from the base model's shape, and what can't fit.

Standard library only: `tunegate check` asks it every time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import hardware
from pipeline.errors import ConfigError, Problem

PROMOTE = "promote (old and new side by side)"
KEYS = {  # what sets each figure most
    "finetune": "data.sequence_len",
    "quantize": "quantize.num_calibration_samples",
    "serve": "serve.kv_cache_memory",
    PROMOTE: "serve.kv_cache_memory",
}
# As finetune_memory has it: a batch goes through the model in parts, of a row or so many tokens at least.
TOKENS_A_PASS = 1024
KEPT, KEPT_CHECKPOINTED = 34, 2


def estimates(config: Mapping[str, Any], record: Mapping[str, Any] | None, device: hardware.Device) -> dict[str, int]:
    """Estimated peak bytes of fine-tuning (a process), quantizing and serving (a GPU); empty without the base's `record`.

    Weights: 0.55 bytes a parameter in NF4 with double quantization, 2 in bf16. Activations: 34 bytes a token, layer and hidden
    unit without checkpointing (Korthikanti et al. 2022, eq. 2, without the attention scores, which sdpa doesn't keep), 2 with it.
    AWQ computes in float32 on a CPU without bf16, 4 bytes a parameter.
    """
    if record is None:
        return {}
    shape, parameters = _shape(record), int(record["detail"]["parameters"])
    hidden, quantize = int(shape["hidden_size"]), config["quantize"]
    serve = config["serve"]
    parts = serve["tensor_parallel_size"] if device.kind == "cuda" else 1
    served = served_weights(config, parameters, device) // parts + bytes_of(serve["kv_cache_memory"])
    calibration = quantize["num_calibration_samples"] * quantize["max_calibration_tokens"]
    return {
        "finetune": _training(config, parameters, hidden, int(shape["num_hidden_layers"]), device),
        "quantize": parameters * (4 if device.kind == "cpu" and not device.bf16 else 2) + calibration * hidden * 4,
        "serve": served,
        PROMOTE: 2 * served,
    }


def _training(config: Mapping[str, Any], parameters: int, hidden: int, layers: int, device: hardware.Device) -> int:
    """Weights, adapter, and the activations of the shortest pass; `auto` checkpoints on a GPU that is too small without."""
    train, sequence_len = config["finetune"], config["data"]["sequence_len"]
    processes, checkpointing = train["num_processes"], train["gradient_checkpointing"]
    batch = train["micro_batch_size"] * sequence_len // processes
    units = min(batch, max(TOKENS_A_PASS, sequence_len)) * layers * hidden
    weights = int(parameters * (0.55 if train["load_in_4bit"] else 2) / (processes if train["fsdp_version"] else 1))
    # adapter weights with gradients and two moments in fp32; 7 linear layers of about 3 times the hidden size a side
    fixed = weights + layers * 7 * 4 * hidden * train["lora_r"] * 16
    full = 0 < device.memory < fixed + units * KEPT
    checkpointed = checkpointing is True or (checkpointing == "auto" and device.kind == "cuda" and full)
    return int(fixed + units * (KEPT_CHECKPOINTED if checkpointed else KEPT))


def served_weights(config: Mapping[str, Any], parameters: int, device: hardware.Device) -> int:
    """Bytes of the served weights: 0.6 a parameter in 4 bits with their scales, unless the device unpacks them."""
    dtype = config["serve"]["dtype"]
    plain = parameters * (4 if (device.serving_dtype if dtype == "auto" else dtype) == "float32" else 2)
    packed = config["quantize"]["method"] != "none" and device.device_class not in hardware.WITHOUT_BF16
    return int(parameters * 0.6) if packed else plain


def bytes_of(size: str) -> int:
    """A size such as 1.5GiB as a number of bytes."""
    number = size.rstrip("BKMGi ")
    return int(float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[size[len(number) :].strip()])


def too_large(
    config: Mapping[str, Any], memory: Mapping[str, int], device: hardware.Device, path: Path
) -> Iterator[Problem]:
    """What can't fit into this machine's memory, as warnings: the config may be for another one.

    The KV cache alone is known before the base model's shape is. A server that doesn't fit isn't told once more as two.
    """
    found = memory or {"serve": bytes_of(config["serve"]["kv_cache_memory"])}
    larger = [what for what, size in found.items() if size > device.memory > 0]
    for what in larger:
        if what != PROMOTE or "serve" not in larger:
            yield Problem(
                f"{what} would take about {gib(found[what])}, and {_here(device)} has {gib(device.memory)}",
                file=str(path),
                key=KEYS[what],
                remedy="lower it, or build on a larger machine",
            )


def raise_for_too_long(config: Mapping[str, Any], record: Mapping[str, Any] | None) -> None:
    """Raise ConfigError when more positions are to be served than the base model was made for, where its files are here.

    vLLM would refuse, hours later. Models with scaled positions are left to vLLM, and so is who allows it what it refuses.
    """
    serve, shape = config["serve"], _shape(record) if record else _local_shape(Path(config["base_model"]))
    most, wanted = shape.get("max_position_embeddings"), serve["max_model_len"]
    scaled = any((shape.get(name) or {}).get("factor") for name in ("rope_scaling", "rope_parameters"))
    allowed = "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in serve["env"] or any("hf" in name for name in serve["extra_args"])
    if isinstance(most, int) and wanted > most and not scaled and not allowed:
        raise ConfigError(
            f"{wanted} is more than the base model was made for (max_position_embeddings in its config.json)",
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
