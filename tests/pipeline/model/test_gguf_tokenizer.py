"""pipeline.model.gguf_tokenizer, as far as it needs no tokenizers package; test_gguf.py compares the tokens of whole models."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ModelError
from pipeline.model import gguf_tokenizer

TOKENS = ["<unk>", "<s>", "</s>", "a"]


def metadata(**changes: object) -> dict:
    """A file's metadata by their names without `tokenizer.ggml.`; None leaves one out."""
    entries = {"model": "gpt2", "pre": "qwen2", "tokens": TOKENS, "merges": ["a a"], "eos_token_id": 2, **changes}
    settings = {f"tokenizer.ggml.{name}": entry for name, entry in entries.items() if entry is not None}
    return {"general.architecture": "llama", "llama.context_length": 64, **settings}


def test_special_tokens_are_those_of_the_files_ids() -> None:
    """Each role that has an id is named by its token; roles without one are left out."""
    settings = gguf_tokenizer.settings(metadata(bos_token_id=1, unknown_token_id=0))
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert "pad_token" not in settings
    assert settings["model_max_length"] == 64


@pytest.mark.parametrize(
    ("pre", "setting", "expected"),
    [
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("qwen2", True, True),
    ],
)
def test_a_beginning_token_is_added_as_the_file_says_else_by_its_cut(pre: str, setting: object, expected: bool) -> None:
    """Llama's cut adds one where the file is silent; the file's own word goes first."""
    assert gguf_tokenizer.settings(metadata(pre=pre, add_bos_token=setting))["add_bos_token"] is expected


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"model": "llama"}, ["tokenizer.ggml.model"]),
        ({"pre": "chatglm-bpe"}, ["tokenizer.ggml.pre"]),
        ({"merges": None}, ["tokenizer.ggml.merges"]),
        (
            {"eos_token_id": 4, "padding_token_id": -1},
            ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id"],
        ),
        ({"pre": None, "tokens": None, "eos_token_id": None}, ["tokenizer.ggml.pre", "tokenizer.ggml.tokens"]),
    ],
)
def test_a_tokenizer_that_would_give_other_tokens_is_refused(tmp_path: Path, changes: dict, keys: list[str]) -> None:
    """Every reason is named at once, before anything is written."""
    with pytest.raises(ModelError) as error:
        gguf_tokenizer.write(metadata(**changes), Path("model.gguf"), tmp_path)
    assert [problem.key for problem in error.value.problems] == keys
    assert all(problem.remedy for problem in error.value.problems)
    assert list(tmp_path.iterdir()) == []
