"""Converts a GGUF file into a Hugging Face folder: configuration, weights in bf16, special tokens, template, licence.

The file's own metadata are read, not through transformers: its 5.17 takes eos and bos from the wrong keys.
Limits: one file, dense Llama, Mistral, Qwen2 and Qwen3 models without RoPE scaling. Quantized tensors are
dequantized; the precision that the file lost stays lost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError, Problem
from pipeline.files import write_json
from pipeline.model import weights

if TYPE_CHECKING:
    import torch

HF_REMEDY = "set base_model to the model's Hugging Face folder or hub id instead"
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NEEDED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
UNQUANTIZED = {"F16", "BF16", "F32", "F64"}


class GgufModel:
    """An open GGUF file, complete and of a kind that this module can convert.

    Raises ModelError with every reason against it.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        try:
            self._reader = GGUFReader(path)
            self.metadata = {name: field.contents() for name, field in self._reader.fields.items()}
        except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"isn't a readable GGUF file: {error}", file=str(path), remedy="fetch the file again"
            ) from error
        self.path = path
        problems = list(self._problems())
        if problems:
            raise ModelError(problems)
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in self._reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value below the architecture's name."""
        return self.metadata.get(f"{self.metadata['general.architecture']}.{key}", default)

    @property
    def licence(self) -> str | None:
        """The licence in the file's metadata."""
        name = self.metadata.get("general.license")
        return str(name) if name else None

    @property
    def quantized_from(self) -> str | None:
        """The type of most weights, such as "Q4_1 GGUF"; None at full precision."""
        sizes: Counter[str] = Counter()
        for tensor in self._reader.tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements) if len(tensor.shape) > 1 else 0
        kind = sizes.most_common(1)[0][0]
        return None if kind in UNQUANTIZED else f"{kind} GGUF"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its Hugging Face name, outermost dimension first (GGUF has it last)."""
        return {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by its Hugging Face name, as float32, its rows as transformers orders them."""
        import numpy as np
        import torch
        from gguf import dequantize

        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        heads = {"attn_q": self._heads, "attn_k": self._kv_heads}.get(tensor.name.split(".")[-2])
        if heads and self.metadata["general.architecture"] == "llama":
            values = _unpermute(values, heads)
        return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))

    def config(self) -> dict[str, Any]:
        """The content of config.json, in the spelling of transformers 4 and of 5."""
        model_type, architecture = ARCHITECTURES[self.metadata["general.architecture"]]
        hidden_size, heads = int(self.get("embedding_length")), self._heads
        theta = _shortest(self.get("rope.freq_base", 10000.0))
        return {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": hidden_size,
            "intermediate_size": int(self.get("feed_forward_length")),
            "num_hidden_layers": int(self.get("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": self._kv_heads,
            "head_dim": int(self.get("attention.key_length", hidden_size // heads)),
            "hidden_act": "silu",
            "max_position_embeddings": int(self.get("context_length")),
            "initializer_range": 0.02,
            "rms_norm_eps": _shortest(self.get("attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._tensors,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata["tokenizer.ggml.eos_token_id"],
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }

    @property
    def _heads(self) -> int:
        return int(self.get("attention.head_count"))

    @property
    def _kv_heads(self) -> int:
        return int(self.get("attention.head_count_kv", self._heads))

    def _hf_name(self, name: str) -> str:
        if name in NAMES:
            return NAMES[name]
        part = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if part is None or part[2] not in IN_BLOCK:
            raise KeyError(name)
        return f"model.layers.{part[1]}.{IN_BLOCK[part[2]]}.{part[3]}"

    def _problems(self) -> Iterator[Problem]:
        file = str(self.path)
        architecture = self.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            yield Problem(
                f"architecture {architecture} can't be converted",
                file=file,
                key="general.architecture",
                allowed=", ".join(ARCHITECTURES),
                remedy=HF_REMEDY,
            )
            return
        if int(self.metadata.get("split.count", 0)) > 1:
            yield Problem("is one part of several", file=file, key="split.count",
                          remedy="join them with llama.cpp's `llama-gguf-split --merge`")  # fmt: skip
        for key in NEEDED:
            if self.get(key) is None:
                yield Problem("is missing", file=file, key=f"{architecture}.{key}", remedy="fetch the file again")
        if self.get("expert_count"):
            yield Problem(
                "a mixture of experts can't be converted",
                file=file,
                key=f"{architecture}.expert_count",
                remedy=HF_REMEDY,
            )
        if self.get("rope.scaling.type", "none") != "none":
            yield Problem(f"RoPE scaling {self.get('rope.scaling.type')} can't be converted", file=file,
                          key=f"{architecture}.rope.scaling.type", remedy=HF_REMEDY)  # fmt: skip
        yield from self._token_problems(file)
        yield from self._tensor_problems(file)

    def _token_problems(self, file: str) -> Iterator[Problem]:
        eos = self.metadata.get("tokenizer.ggml.eos_token_id")
        if eos is None:
            yield Problem("the end token is missing", file=file, key="tokenizer.ggml.eos_token_id", remedy=HF_REMEDY)
        if not self.metadata.get("tokenizer.chat_template"):
            yield Problem("the chat template is missing", file=file, key="tokenizer.chat_template",
                          remedy="take the -Instruct version of the model")  # fmt: skip

    def _tensor_problems(self, file: str) -> Iterator[Problem]:
        from gguf.quants import _type_traits

        for tensor in self._reader.tensors:
            kind = tensor.tensor_type
            if kind.name not in UNQUANTIZED and kind not in _type_traits:
                yield Problem(
                    f"type {kind.name} can't be read",
                    file=file,
                    key=tensor.name,
                    remedy="take the model's file in another quantization",
                )
            try:
                self._hf_name(tensor.name)
            except KeyError:
                # rope_freqs.weight scales positions, and the metadata don't say how.
                yield Problem("isn't a tensor that this conversion knows", file=file, key=tensor.name, remedy=HF_REMEDY)
        if "token_embd.weight" not in {tensor.name for tensor in self._reader.tensors}:
            yield Problem("is missing", file=file, key="token_embd.weight", remedy="fetch the file again")


def convert(path: Path, folder: Path, on_progress: Callable[[int, int], None]) -> GgufModel:
    """Write the model in the GGUF file `path` as a Hugging Face folder, and return the open file.

    `special_tokens` writes generation_config.json and checks the special tokens.
    Raises ModelError for a file that can't be converted correctly, ResourceError when the disk is too small.
    """
    from pipeline.model import checkpoint, gguf_tokenizer

    model = GgufModel(path)
    gguf_tokenizer.write(model.metadata, path, folder)
    (folder / "chat_template.jinja").write_text(model.metadata["tokenizer.chat_template"], encoding="utf-8")
    write_json(folder / "config.json", model.config())
    checkpoint.check_tensors(folder, model.shapes, path)
    weights.write(folder, model.shapes, model.tensor, on_progress)
    return model


def _unpermute(values: Any, heads: int) -> Any:
    """Undo llama.cpp's order of rotary pairs: it has them interleaved, transformers in two halves a head."""
    pairs = values.shape[0] // heads // 2
    return values.reshape(heads, pairs, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _shortest(value: Any) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))
