"""Compare what pipeline.model.gguf made of GGUF files with their origins and with transformers' reading.

    python tests/proofs/compare_gguf.py FOLDER-OF-make_gguf OUT-FOLDER MODEL.gguf-OF-A-REAL-MODEL

Runs in the train environment; prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "Hello, world! 12345",
    "It's 2024\n\n1. first\n  2. x",
    "a  b\t\tc\n\n\n9 \u00e9\u4f60 1\u00bd",
    "<|im_start|>user\nhi<|im_end|>",
]


def logits(folder: Path, **options: Any) -> torch.Tensor:
    """float32 logits of a fixed input."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits  # type: ignore[no-any-return]


def main() -> None:
    """Print the differences."""
    made, out, real = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    found: dict[str, Any] = {}
    for kind in ("llama", "qwen2", "qwen3"):
        other = AutoModelForCausalLM.from_pretrained(made / kind, dtype=torch.float32)
        if kind == "llama":
            other.config.rope_parameters["rope_theta"] = 50000.0
            other.save_pretrained(made / "llama-theta")
        wanted = logits(made / ("llama-theta" if kind == "llama" else kind))
        found[kind] = float((logits(out / kind) - wanted).abs().max() / wanted.abs().max())
    found["q8"] = float((logits(out / "q8") - logits(made / "llama-theta")).abs().max())
    mine, theirs = AutoTokenizer.from_pretrained(out / "llama"), AutoTokenizer.from_pretrained(made / "llama")
    found["tokens"] = [mine(text).input_ids == theirs(text).input_ids for text in TEXTS]
    ours = AutoModelForCausalLM.from_pretrained(out / "real", dtype=torch.bfloat16).state_dict()
    read = AutoModelForCausalLM.from_pretrained(real.parent, gguf_file=real.name, dtype=torch.bfloat16).state_dict()
    found["real"] = [name for name in ours.keys() | read.keys() if not torch.equal(ours[name], read[name])]
    tokenizer = AutoTokenizer.from_pretrained(out / "real")
    found["real_round_trip"] = [tokenizer.decode(tokenizer(text).input_ids) == text for text in TEXTS]
    found["real_tokens"] = tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12").input_ids)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
