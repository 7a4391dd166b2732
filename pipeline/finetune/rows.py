"""The rows of supervised fine-tuning (sft): prepared rows as token rows, and a record of the first ones.

Runs in the train environment (the base model's tokenizer).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config.schema import FinetuneConfig
from pipeline.errors import DataError
from pipeline.files import write_lines
from pipeline.finetune.packing import Row, encode
from pipeline.model import special_tokens

SEEN_ROWS = 16


@dataclass(frozen=True)
class Rows:
    """The rows to train and to validate on, as token rows; how many were cut, and how many were left without an answer."""

    train: list[Row]
    validation: list[Row]
    cut: int
    without_answer: int


def read(base: Path, splits: Path, extra: Path | None, settings: FinetuneConfig, sequence_len: int) -> Rows:
    """The prepared `splits` as the base model's chat template and tokenizer write them.

    The first of them go to extra/seen_tokens.jsonl, token by token, where `extra` is given. Raises DataError when no row carries
    loss.
    """
    encode_file = encoder(base, settings, sequence_len)
    train, validation = encode_file(splits / "train.jsonl"), encode_file(splits / "val.jsonl")
    if extra:
        write_lines(extra / "seen_tokens.jsonl", _seen(_lines(splits / "train.jsonl"), train))
    with_loss = [row for row in train if row.trained]
    if not with_loss:
        raise DataError(
            f"none of {len(train)} training rows carries loss within {sequence_len} tokens",
            file=str(splits / "train.jsonl"),
            key="data.sequence_len",
            remedy="raise data.sequence_len, or set finetune.train_on_inputs: true",
        )
    return Rows(
        train=with_loss,
        validation=[row for row in validation if row.trained],
        cut=sum(row.is_cut for row in train),
        without_answer=len(train) - len(with_loss),
    )


def encoder(base: Path, settings: FinetuneConfig, sequence_len: int) -> Callable[[Path], list[Row]]:
    """A function from a file of prepared rows to token rows, by the base model's chat template and tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    ends = special_tokens.end_tokens(base, tokenizer)

    def encode_file(file: Path) -> list[Row]:
        lines, inputs = _lines(file), settings.train_on_inputs
        return list(encode(lines, tokenizer, end_tokens=ends, sequence_len=sequence_len, train_on_inputs=inputs))

    return encode_file


def _seen(lines: Iterator[dict[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first conversations exactly as trained, to compare a server's tokens with."""
    chats = ((line, row) for line, row in zip(lines, rows, strict=True) if "messages" in line)
    return [
        {
            "messages": line["messages"],
            "input_ids": row.input_ids.tolist(),
            "labels": row.labels.tolist(),
            "prompt_length": row.prompt_length,
            "truncated": row.is_cut,
        }
        for line, row in islice(chats, SEEN_ROWS)
    ]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
