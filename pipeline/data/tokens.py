"""Lengths of rows in tokens, by the base model's own tokenizer and chat template, and the defects that follow from them.

The tokenizer comes from the base model's folder; nothing is downloaded, and code in that folder doesn't run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.data.checks import special_tokens_pattern
from pipeline.data.defects import Defect
from pipeline.data.formats import Body, Message
from pipeline.errors import ModelError


@dataclass(frozen=True)
class Length:
    """Tokens of a row, including those that the template adds: of the whole row, and of its answer (0 for a text).

    The answer is counted by itself, which may differ by a token from its part of the whole.
    A row to `drop` is too long; the config leaves it out without calling it a defect.
    """

    tokens: int
    answer: int
    drop: bool = False


class TokenCounter:
    """Counts tokens with the base model's tokenizer, in batches."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @cached_property
    def special(self) -> re.Pattern[str]:
        """A pattern of the tokens that mean something to the model and must not be in a text."""
        decoder = self._tokenizer.added_tokens_decoder
        special = [token.content for token in decoder.values() if token.special]
        return special_tokens_pattern([*special, *self._tokenizer.all_special_tokens])

    def lengths(self, bodies: Sequence[Body]) -> list[Length | Defect]:
        """The length of each row, or the defect if the chat template refuses it.

        Raises ModelError for conversations when the base model lacks a chat template.
        """
        texts: list[str] = []
        defects: dict[int, Defect] = {}
        for place, body in enumerate(bodies):
            try:
                texts += [body, ""] if isinstance(body, str) else self._rendered(body)
            except _Refused as error:
                defects[place] = Defect("template_refused", f"the chat template refuses it: {error}")
                texts += ["", ""]
        counts = self._count(texts)
        lengths = [Length(tokens, answer) for tokens, answer in zip(counts[::2], counts[1::2], strict=True)]
        return [defects.get(place) or length for place, length in enumerate(lengths)]

    def _count(self, texts: list[str]) -> list[int]:
        """Tokens of each text, from the Rust tokenizer itself: lists of ids would be most of the work."""
        if not self._tokenizer.is_fast:
            return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _rendered(self, messages: list[Message]) -> list[str]:
        """The whole conversation, and the part behind the prompt and the start of the answer's turn."""
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ModelError(
                "the base model's chat template is missing; without one, conversations can't be rendered",
                file=str(self.folder),
                remedy="use its -instruct or -chat version, or train on rows of type: text",
            )
        render = self._tokenizer.apply_chat_template
        try:
            prompt = render(messages[:-1], tokenize=False, add_generation_prompt=True)
            whole = render(messages, tokenize=False)
        except TemplateError as error:
            raise _Refused(str(error)) from error
        # Some templates write a turn otherwise once it is answered; then the bare answer is counted.
        return [whole, whole[len(prompt) :] if whole.startswith(prompt) else messages[-1]["content"]]


class _Refused(Exception):
    """The chat template raised an error."""


def length_or_defect(length: Length, *, sequence_len: int, strategy: str) -> Length | Defect:
    """The length, with `drop` set if the row is to be dropped, or the defect if the row is too long to train on.

    Training cuts a row after `sequence_len` tokens; if the prompt alone is that long, the row loses its answer.
    """
    if length.tokens <= sequence_len or strategy == "drop":
        return replace(length, drop=length.tokens > sequence_len)
    prompt = length.tokens - length.answer if length.answer else 0
    size = f"has {length.tokens} tokens" + (f", {prompt} of them before the answer" if prompt else "")
    limit = f"sequence_len: {sequence_len}"
    if prompt >= sequence_len:
        return Defect("answer_cut_off", f"{size}, so all of the answer would be cut off", allowed=limit)
    return Defect("too_long", size, allowed=limit) if strategy == "raise" else length
