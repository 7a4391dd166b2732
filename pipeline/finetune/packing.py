"""Conversations → token rows with labels, and rows → the steps of an epoch.

- The model's own chat template renders a conversation. Each assistant turn carries loss, from the end of the template's prompt
  to the token that ends the answer. Text behind that token is cut off.
- A text row carries loss everywhere, with an end token.
- Packing fills bins with whole rows and never splits one. finetune/attention.py keeps packed rows from seeing each other.

Needs no torch; the tokenizer is handed in.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.errors import DataError, ModelError

IGNORED = -100
OPEN_BINS = 32
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Row:
    """One row in training: token ids, and labels that are the id itself or IGNORED.

    `prompt_length` counts the tokens before the last answer, exactly as a server sees them; 0 for text.
    """

    input_ids: array[int]
    labels: array[int]
    prompt_length: int
    is_cut: bool

    @property
    def length(self) -> int:
        """Tokens that go through the model."""
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """Tokens that carry loss; no token predicts a row's first one."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    rows: Iterator[Mapping[str, Any]],
    tokenizer: Any,
    *,
    end_tokens: Collection[int],
    sequence_len: int,
    train_on_inputs: bool = False,
) -> Iterator[Row]:
    """Token rows of prepared rows ({"messages": …} or {"text": …}), in order; long ones lose their end.

    `tokenizer` is a Hugging Face tokenizer, `end_tokens` the ids that end an answer for the model.

    Raises ModelError without a chat template, or when it doesn't end answers with an end token. Raises DataError, with the row's id,
    when the template refuses or rewrites a row.
    """
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        texts = [_texts(row, tokenizer) for row in chunk]
        chats = [text for several in texts for text in several]
        ids = iter(tokenizer(chats, add_special_tokens=False)["input_ids"] if chats else [])
        for row, several in zip(chunk, texts, strict=True):
            if "messages" in row:
                whole, *prompts = (next(ids) for _ in several)
                spans = _chat(row, tokenizer, several, whole, prompts, end_tokens)
            else:
                spans = _text(row, tokenizer)
            yield _labelled(*spans, sequence_len=sequence_len, train_on_inputs=train_on_inputs)


Spans = tuple[list[int], list[tuple[int, int]], int]
"""Token ids, the spans [start, end) that are answers, and the prompt's length."""


def _texts(row: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """The whole conversation, then the prompt of each assistant turn; nothing of a text row."""
    if "messages" not in row:
        return []
    if not tokenizer.chat_template:
        raise ModelError(
            "the base model comes without a chat template: it can't be trained on conversations",
            remedy="set base_model to its -instruct or -chat version, or use rows of type: text",
        )
    from jinja2 import TemplateError

    messages, render = row["messages"], tokenizer.apply_chat_template
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        whole = render(messages, tokenize=False)
        prompts = [render(messages[:at], tokenize=False, add_generation_prompt=True) for at in turns]
    except TemplateError as error:
        raise _refused(row, f"the chat template refuses it: {error}") from error
    for prompt in prompts:
        if not whole.startswith(prompt):
            raise _refused(row, "the chat template must write a question as it does before the answer")
    return [whole, *prompts]


def _refused(row: Mapping[str, Any], reason: str) -> DataError:
    return DataError(
        f"row {row.get('id')}: {reason}", remedy="take the row out, or give it one answer and no earlier ones"
    )


def _chat(
    row: Mapping[str, Any],
    tokenizer: Any,
    texts: list[str],
    whole: list[int],
    prompts: list[list[int]],
    end_tokens: Collection[int],
) -> Spans:
    if prompts and whole[: len(prompts[-1])] != prompts[-1]:
        # A token spans the end of the prompt. A server never sees that token, so training doesn't either.
        answer = texts[0][len(texts[-1]) :]
        whole = prompts[-1] + tokenizer(answer, add_special_tokens=False)["input_ids"]
    starts = [_common(whole, prompt) for prompt in prompts]
    spans = []
    for start, limit in zip(starts, [*starts[1:], len(whole)], strict=True):
        end = next((at for at in range(start, limit) if whole[at] in end_tokens), None)
        if end is None:
            raise ModelError(
                f"the chat template puts no end token behind an answer (row {row.get('id')}):"
                " the model would never learn to stop",
                allowed=f"one of the end tokens {sorted(end_tokens)} behind each assistant turn",
                remedy="correct eos_token_id in the base's generation_config.json, or its chat template",
            )
        spans.append((start, end + 1))
    return whole[: spans[-1][1]] if spans else whole, spans, starts[-1] if starts else 0


def _common(whole: list[int], prompt: list[int]) -> int:
    """The answer's first token: behind the prompt's tokens, and behind a token that spans the border."""
    if whole[: len(prompt)] == prompt:
        return len(prompt)
    same = next(at for at, (token, expected) in enumerate(zip(whole, prompt, strict=False)) if token != expected)
    return same + 1


def _text(row: Mapping[str, Any], tokenizer: Any) -> Spans:
    ids = list(tokenizer(row["text"])["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids, [(0, len(ids))], 0


def _labelled(
    ids: list[int],
    spans: list[tuple[int, int]],
    prompt_length: int,
    *,
    sequence_len: int,
    train_on_inputs: bool,
) -> Row:
    labels = list(ids) if train_on_inputs else [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return Row(
        array("i", ids[:sequence_len]),
        array("i", labels[:sequence_len]),
        prompt_length,
        len(ids) > sequence_len,
    )


def steps_of_epoch(
    lengths: Sequence[int], *, seed: int, epoch: int, batch: int, capacity: int | None
) -> list[list[int]]:
    """The rows of each optimizer step of an epoch, by number, shuffled by seed and epoch alone.

    A step takes `batch` bins of at most `capacity` tokens (a longer row has a bin to itself), or `batch` rows where `capacity` is
    None; the last step takes the rest.
    """
    order = list(range(len(lengths)))
    random.Random(f"{seed}:{epoch}").shuffle(order)  # noqa: S311 - an order, not a secret
    bins = [[row] for row in order] if capacity is None else _fill(order, lengths, capacity)
    return [[row for rows in bins[start : start + batch] for row in rows] for start in range(0, len(bins), batch)]


def _fill(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit into the newest OPEN_BINS bins: order stays nearly random, and time linear."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in order:
        need = lengths[row]
        at = next((at for at in range(max(0, len(bins) - OPEN_BINS), len(bins)) if room[at] >= need), None)
        if at is None:
            bins.append([row])
            room.append(capacity - need)
        else:
            bins[at].append(row)
            room[at] -= need
    return bins


def passes(rows: Sequence[int], lengths: Sequence[int], *, tokens: int, most: int | None = None) -> list[list[int]]:
    """A step's rows cut into passes of at most `tokens` tokens and `most` rows, at least one row each."""
    parts: list[list[int]] = []
    load = 0
    for row in rows:
        if not parts or load + lengths[row] > tokens or len(parts[-1]) == most:
            parts.append([])
            load = 0
        parts[-1].append(row)
        load += lengths[row]
    return parts


def shared_prefix(rows: Sequence[Row]) -> int:
    """How many tokens all of several rows begin with, short of the token before the first one with loss."""
    if len(rows) < 2:
        return 0
    first, last = min(row.input_ids for row in rows), max(row.input_ids for row in rows)
    pairs = zip(first, last, strict=False)
    same = next((at for at, (low, high) in enumerate(pairs) if low != high), min(len(first), len(last)))
    starts = (next((at for at, label in enumerate(row.labels) if label != IGNORED), len(row.labels)) for row in rows)
    return max(0, min(same, min(starts) - 1))
