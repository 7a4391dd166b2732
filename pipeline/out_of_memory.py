"""Torch's words for too little memory, on a GPU or not, as an error that names the setting to change; and bitsandbytes' end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ResourceError

WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""CUDA's, the CPU's and cuBLAS's."""
LAST_WORDS = re.compile(r"Error out of memory at line \d+ in file \S+")
"""Printed by bitsandbytes before it ends the process, where others raise an exception."""
LESS = (
    "less is needed with a lower finetune.micro_batch_size (and as much more finetune.gradient_accumulation_steps) or "
    "data.sequence_len where it trained, with merge.merge_base: original where it merged, and with evaluate.ledger_items: 0 in "
    "the ledger"
)


def is_told_by(text: str) -> bool:
    """Whether it is torch's words for too little memory."""
    return any(words in text for words in WORDS)


def told(error: BaseException | None) -> str | None:
    """The words for too little memory in an error or in its causes, or None."""
    while error is not None and not is_told_by(str(error)):
        error = error.__cause__ or error.__context__
    return None if error is None else str(error)


@contextmanager
def named(activity: str, key: str, remedy: str) -> Iterator[None]:
    """Turn torch's words for too little memory into a ResourceError, which names the activity and the `key` to change.

    Where a library put its own advice in front of torch's words, torch's are told.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error.__cause__ if isinstance(error.__cause__, RuntimeError) else error)
        if isinstance(error, RuntimeError) and not is_told_by(text):
            raise
        raise ResourceError(
            f"{activity} ran out of memory: {text.splitlines()[0] if text else 'no more to be had'}",
            key=key,
            remedy=remedy,
        ) from error


def that_ended(log: Path, offset: int) -> ResourceError | None:
    """The error of a program that bitsandbytes ended because a GPU was full, or None; its log begins at byte `offset`."""
    text = log.read_bytes()[offset:].decode("utf-8", errors="replace") if log.is_file() else ""
    last_words = LAST_WORDS.search(text)
    if last_words is None:
        return None
    return ResourceError(
        f"the GPU's memory ran out, and bitsandbytes ended the program: {last_words[0]}",
        file=str(log),
        remedy=f"end what else uses the GPU (nvidia-smi names it) and run the same command again; {LESS}",
    )
