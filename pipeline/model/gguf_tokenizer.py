"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json: the same text gives the same tokens.

Byte-level BPE only, and only with the ways of cutting text into words in CUTS. Another cut would silently give other
tokens, so it is refused. Needs the tokenizers package.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError, Problem
from pipeline.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
REMEDY = "set base_model to the model's Hugging Face folder or hub id instead"
# One alternative a line: contractions, words, numbers, punctuation, line ends, spaces.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CUTS = {
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "qwen2": "qwen2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
}
# The cuts that add a beginning token where the file doesn't say.
ADDS_BOS = {"llama-bpe", "llama3"}


def write(metadata: dict[str, Any], source: Path, folder: Path) -> None:
    """Write the tokenizer's files into `folder`.

    Raises ModelError for a kind of tokenizer that can't be converted.
    """
    problems = _problems(metadata, str(source))
    if problems:
        raise ModelError(problems)
    tokenizer = build(metadata)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", settings(metadata))


def build(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata describe."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    cut = CUTS[metadata["tokenizer.ggml.pre"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[_pair(merge) for merge in metadata["tokenizer.ggml.merges"]],
            ignore_merges=cut == "llama3",
        )
    )
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _words(cut)
    tokenizer.decoder = decoders.ByteLevel()
    whole = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in whole if kind == CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token, kind in whole if kind == USER_DEFINED]
    )
    if _adds_bos(metadata):
        _add_bos(tokenizer, metadata)
    return tokenizer


def settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json, with the special tokens whose ids are in the file's own metadata."""
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 both know
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata),
        "model_max_length": int(metadata[f"{metadata['general.architecture']}.context_length"]),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            config[f"{role}_token"] = tokens[number]
    return config


def _problems(metadata: dict[str, Any], file: str) -> list[Problem]:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        return [
            Problem(
                f"a {model} tokenizer can't be converted",
                file=file,
                key="tokenizer.ggml.model",
                allowed="gpt2",
                remedy=REMEDY,
            )
        ]
    problems = []
    if pre not in CUTS:
        problems.append(
            Problem(
                f"the way in which {pre} cuts text into words isn't known",
                file=file,
                key="tokenizer.ggml.pre",
                allowed=", ".join(CUTS),
                remedy=REMEDY,
            )
        )
    size = len(metadata.get("tokenizer.ggml.tokens", []))
    problems += [Problem("is missing", file=file, key=f"tokenizer.ggml.{key}", remedy="fetch the file again")
              for key in ("tokens", "merges") if not metadata.get(f"tokenizer.ggml.{key}")]  # fmt: skip
    for key in ("bos", "eos", "unknown", "padding"):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and not 0 <= number < size:
            problems.append(
                Problem(
                    f"{number} isn't a token's number",
                    file=file,
                    key=f"tokenizer.ggml.{key}_token_id",
                    allowed=f"0 to {size - 1}",
                    remedy="fetch the file again",
                )
            )
    return problems


def _words(cut: str) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if cut == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut == "digits":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    pattern = Regex(QWEN2_WORDS if cut == "qwen2" else LLAMA3_WORDS)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _adds_bos(metadata: dict[str, Any]) -> bool:
    setting = metadata.get("tokenizer.ggml.add_bos_token")
    return bool(metadata.get("tokenizer.ggml.pre") in ADDS_BOS if setting is None else setting)


def _add_bos(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    from tokenizers import processors

    number = metadata["tokenizer.ggml.bos_token_id"]
    token = metadata["tokenizer.ggml.tokens"][number]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )
