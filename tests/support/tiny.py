"""Make a tiny random Llama: a Hugging Face folder with a small ChatML tokenizer, for tests.

    python tests/support/tiny.py FOLDER [--hidden 64] [--layers 2] [--seed 0] [--untied]

Runs in the train environment. The same arguments give the same bytes. The sizes suit AWQ groups of 32, NF4
blocks of 64 and vLLM's CPU attention (heads of 32). Embeddings are wide enough for sharp answers, so that
an adapter alone can learn rows by heart; the model knows nothing before that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

HEAD_DIM = 32
VOCABULARY = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What the tokenizer's merges are learned from: everyday support language, JSON and numbers.
CORPUS = """\
Which category and priority does this ticket have? Answer the question with one word.
My card was charged twice for the same order, please refund the second payment of 19.99 to my account.
The app crashes when I open the settings page after the last update on my phone, version 4.2.
I cannot log in with my password; the reset link that you sent me has expired. What should I do?
{"category": "billing", "priority": "high", "product": "cloud storage", \
"entities": {"order": "A-1042", "amount": 19.99}}
{"category": "bug", "priority": "low", "product": "mobile app", \
"entities": {"version": "4.2", "device": null}}
The capital of France is Paris. The sun rises in the east and sets in the west. Two and two make four.
system user assistant You are a helpful assistant that sorts customer questions and says nothing else.
"""


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of at most VOCABULARY tokens, trained on CORPUS; any text round-trips through it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return tokenizer


def llama_config(hidden: int, layers: int, vocabulary: int, *, tied: bool) -> dict[str, Any]:
    """The model's config.json in both spellings: transformers 4 (rope_theta) and 5 (rope_parameters)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": hidden**-0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """bf16 tensors by name: unit-gain linear layers, embeddings of standard deviation 0.5."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
            continue
        spread = 0.5 if name in ("model.embed_tokens.weight", "lm_head.weight") else parameter.shape[1] ** -0.5
        weights[name] = (torch.randn(parameter.shape, generator=generator) * spread).to(torch.bfloat16)
    return weights


def write(folder: Path, name: str, value: Any) -> None:
    """Write `value` as the JSON file `name`."""
    (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make(folder: Path, *, hidden: int = 64, layers: int = 2, seed: int = 0, tied: bool = True) -> None:
    """Make the model folder; `hidden` must be a multiple of 64."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    # The class that transformers 4 and 5 both know.
    write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
        },
    )
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    config = llama_config(hidden, layers, tokenizer.get_vocab_size(), tied=tied)
    write(folder, "config.json", config)
    write(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nRandom weights, for tests.\n", encoding="utf-8")
    weights = folder / "model.safetensors"
    save_file(random_weights(config, seed), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes for the owner only, and a container may run as another user


def main() -> None:
    """Read the command line and make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untied", action="store_true", help="give the model an lm_head of its own")
    args = parser.parse_args()
    make(args.folder, hidden=args.hidden, layers=args.layers, seed=args.seed, tied=not args.untied)


if __name__ == "__main__":
    main()
