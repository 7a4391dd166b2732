"""A model folder made of bytes alone, for tests of what is checked before anything is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

BYTES = {"BF16": 2, "F32": 4, "U8": 1, "I32": 4}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4, "hidden_size": 2,
    "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


def safetensors(path: Path, shapes: dict[str, tuple[str, list[int]]], data: bytes | None = None) -> Path:
    """Write tensors with the given names, name -> (dtype, shape), and these bytes in all, else zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    path.write_bytes(safetensors_bytes(json.dumps(header).encode(), bytes(offset) if data is None else data))
    return path


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file of just these bytes, even if they contradict each other."""
    return len(header).to_bytes(8, "little") + header + data


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Everything in a safetensors file by name, whatever the order in it: dtype, shape and bytes."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def make(folder: Path, **config: Any) -> Path:
    """A folder that passes every check; keyword arguments change its config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "auto_map": 1}}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}, indent=1))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    safetensors(folder / "model.safetensors", {"model.embed_tokens.weight": ("BF16", [4, 2])})
    return folder
