"""A Llama of 7.4 B random weights as a Hugging Face folder: good for speed and memory, and for nothing else.

    python benchmarks/make_llama.py TOKENIZER_FOLDER OUT [--layers 32] [--hidden 4096]

Runs in the train environment. The shape is a Llama 3 8B's (hidden 4096, inner 14336, 32 heads, 8 of them for keys),
or that made narrower (a head stays 128 wide), with the tokenizer, chat template and vocabulary of TOKENIZER_FOLDER,
so that every stage can take it as its base.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

SPREAD = 0.02
TOKENIZER_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab.json", "merges.txt")


def config_for(tokenizer_folder: Path, layers: int, hidden: int = 4096) -> LlamaConfig:
    """The shape, with the tokenizer's vocabulary and special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    heads = hidden // 128
    return LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", vocab_size=len(tokenizer),
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def layer_weights(config: LlamaConfig, number: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of one decoder layer's weights."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (hidden // config.num_attention_heads)
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


def main() -> None:
    """Write the folder, one shard a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 128")
    args = parser.parse_args()
    config = config_for(args.tokenizer, args.layers, args.hidden)
    args.out.mkdir(parents=True)
    vocabulary = (config.vocab_size, config.hidden_size)
    shards = [layer_weights(config, number) for number in range(args.layers)]
    shards.append({"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary})
    shards[-1]["model.norm.weight"] = (config.hidden_size,)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    placed, size = {}, 0
    for at, shapes in enumerate(shards, 1):
        weights = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, device=device) * SPREAD).bfloat16().cpu()
            for name, shape in shapes.items()
        }
        file = f"model-{at:05d}-of-{len(shards):05d}.safetensors"
        save_file(weights, args.out / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(weights, file)
        size += sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config.save_pretrained(args.out)
    GenerationConfig(eos_token_id=config.eos_token_id, bos_token_id=config.bos_token_id).save_pretrained(args.out)
    for pattern in TOKENIZER_FILES:
        for file in args.tokenizer.glob(pattern):
            shutil.copy(file, args.out / file.name)
    print(f"{args.out}: {size / 2e9:.2f} B parameters, {size / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
