"""Write tiny random models as GGUF files, in llama.cpp's layout, beside the folders they come from.

    python tests/support/make_gguf.py FOLDER

Runs in the train environment. Makes llama/, qwen2/ and qwen3/ with a model.gguf each (F32, so that nothing
is lost), llama/q8.gguf, and files with one fault each under broken/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from support import tiny
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A Llama's q or k with each head's rotary halves interleaved, as llama.cpp keeps them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return torch.stack(list(halves.unbind(1)), 2).reshape(weight.shape)


def name_of(name: str) -> str:
    """llama.cpp's name of a tensor."""
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def write(
    path: Path,
    kind: str,
    folder: Path,
    weights: dict[str, torch.Tensor],
    config: dict[str, Any],
    **changes: Any,
) -> None:
    """Write the model; `changes` replace metadata, None leaves one out; quantized: True asks for Q8_0."""
    quantized = changes.pop("quantized", False)
    writer = gguf.GGUFWriter(path, kind)
    words = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    metadata = {
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.rope.freq_base": 50000.0,
        f"{kind}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{kind}.attention.key_length": config["head_dim"],
        "general.license": "mit",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in words["merges"]],
        "tokenizer.ggml.token_type": [3 if token in tiny.SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tiny.CHATML,
        **changes,
    }
    for key, value in metadata.items():
        if value is not None:
            add(writer, key, value)
    for name, weight in weights.items():
        values = weight.float()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = interleaved(values, heads)
        if quantized and values.dim() == 2:
            packed = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name_of(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name_of(name) if name != "stray" else "rope_freqs.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata value by its Python type."""
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def main() -> None:
    """Make all the files."""
    root = Path(sys.argv[1])
    folder = root / "llama"
    tiny.make(folder)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    write(folder / "model.gguf", "llama", folder, weights, config)
    write(folder / "q8.gguf", "llama", folder, weights, config, quantized=True)
    broken = root / "broken"
    broken.mkdir()
    write(broken / "rope.gguf", "llama", folder, weights | {"stray": torch.ones(16)}, config,
          **{"llama.rope.scaling.type": "yarn", "tokenizer.chat_template": None})  # fmt: skip
    write(
        broken / "experts.gguf",
        "llama",
        folder,
        weights,
        config,
        **{"llama.expert_count": 8, "llama.context_length": None},
    )
    write(broken / "cut.gguf", "llama", folder, weights, config, **{"tokenizer.ggml.pre": "chatglm-bpe"})
    write(broken / "sentencepiece.gguf", "llama", folder, weights, config, **{"tokenizer.ggml.model": "llama"})
    write(broken / "ids.gguf", "llama", folder, weights, config, **{"tokenizer.ggml.eos_token_id": 9999})
    write(broken / "mamba.gguf", "mamba", folder, weights, config)
    write(
        broken / "lost.gguf",
        "llama",
        folder,
        {n: w for n, w in weights.items() if "layers.1.mlp.down" not in n},
        config,
    )
    (broken / "noise.gguf").write_bytes(b"no GGUF at all" * 10)
    qwen3 = Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)
    others = {"qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES)), "qwen3": Qwen3ForCausalLM(qwen3)}
    for kind, made in others.items():
        torch.manual_seed(0)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.data.bfloat16().float()  # what bf16 holds exactly
        (root / kind).mkdir()
        made.config.rope_parameters["rope_theta"] = 50000.0
        made.save_pretrained(root / kind)
        names = dict(made.named_parameters())
        sizes = {**SIZES, "head_dim": 32 if kind == "qwen3" else 16}
        write(root / kind / "model.gguf", kind, folder, {n: p.data for n, p in names.items()}, sizes,
              **{"tokenizer.ggml.pre": "qwen2"})  # fmt: skip


if __name__ == "__main__":
    main()
