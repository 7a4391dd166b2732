"""pipeline.model.special_tokens: which ids end an answer. How they are settled is tested by test_base.py on whole folders."""

from __future__ import annotations

from pathlib import Path

from pipeline.model import special_tokens


def test_end_tokens_come_from_generation_and_tokenizer(tmp_path: Path):
    """All ids that generation stops at end an answer, and the tokenizer's own."""

    class Tokenizer:
        eos_token_id = 7

    assert special_tokens.end_tokens(tmp_path, Tokenizer) == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert special_tokens.end_tokens(tmp_path, Tokenizer) == {2, 3, 7}
