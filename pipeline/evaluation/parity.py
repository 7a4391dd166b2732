"""Checks before anything is scored: the server sees the tokens that training saw, and a trained answer ends.

A chat template with one blank more, a BOS token put in front twice, an end token that isn't the one of training: each makes a good
model look bad, or a bad pipeline look good, and none raises an error by itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from pipeline.errors import DataError, ModelError
from pipeline.evaluation.client import Message, complete, detokenize, tokenize

SHOWN_BEFORE = 8
ENDING_TRIED = 4


@dataclass(frozen=True)
class Conversation:
    """A conversation as training saw it: `input_ids` in all, of them `prompt_length` before the answer.

    `truncated`: cut at sequence_len, so that it lacks its end, or even part of its prompt.
    """

    messages: tuple[Message, ...]
    input_ids: tuple[int, ...]
    prompt_length: int
    truncated: bool = False

    @property
    def answer_length(self) -> int:
        """Tokens of the answer, its end token among them."""
        return len(self.input_ids) - self.prompt_length


def read_seen(file: Path) -> list[Conversation]:
    """The conversations of finetune's seen_tokens.jsonl; rows of plain text aren't chats and are left out.

    Raises DataError when the file isn't there or isn't what finetune writes.
    """
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [
            Conversation(
                tuple(row["messages"]),
                tuple(row["input_ids"]),
                int(row["prompt_length"]),
                bool(row.get("truncated")),
            )
            for row in rows
            if row.get("messages")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the token ids that training saw can't be read: {type(error).__name__} {error}",
            file=str(file),
            remedy="run the finetune stage again",
        ) from None


async def check_tokens(http: httpx.AsyncClient, model: str, conversations: Sequence[Conversation]) -> None:
    """Compare the server's /tokenize, and the prompt of a real completion, with the token ids of training.

    The prompt must be equal id by id. So must the whole conversation, with two exceptions that no served model can notice:
    - white space that the template adds behind the end of the answer,
    - an answer tokenized differently in training, where one token would have crossed the prompt boundary.

    Raises ModelError with the first difference, decoded.
    """
    prompts = await asyncio.gather(*(tokenize(http, model, talk.messages[:-1], prompt=True) for talk in conversations))
    wholes = await asyncio.gather(*(tokenize(http, model, talk.messages, prompt=False) for talk in conversations))
    for number, (talk, prompt, whole) in enumerate(zip(conversations, prompts, wholes, strict=True), start=1):
        trained_ids = list(talk.input_ids)
        served_prompt = prompt[: len(trained_ids)] if talk.truncated else prompt
        if served_prompt != trained_ids[: talk.prompt_length]:
            place = f"prompt of conversation {number}"
            raise await _difference(http, model, place, trained_ids[: talk.prompt_length], served_prompt)
        if not talk.truncated and not await _says_the_same(http, model, trained_ids, whole):
            raise await _difference(http, model, f"conversation {number}", trained_ids, whole)
    await asyncio.gather(*(_check_completion(http, model, talk) for talk in conversations if not talk.truncated))


async def _says_the_same(http: httpx.AsyncClient, model: str, trained_ids: list[int], served_ids: list[int]) -> bool:
    """Whether two rows of ids are one text, but for white space that the server's has at the end."""
    if served_ids == trained_ids:
        return True
    ours, theirs = await detokenize(http, model, trained_ids), await detokenize(http, model, served_ids)
    return theirs.startswith(ours) and not theirs[len(ours) :].strip()


async def _check_completion(http: httpx.AsyncClient, model: str, conversation: Conversation) -> None:
    """The same on the path that clients take: a completion's own prompt ids, or at least their number."""
    answer = await complete(http, model, conversation.messages[:-1], max_tokens=1, return_token_ids=True)
    trained_ids = list(conversation.input_ids[: conversation.prompt_length])
    served_ids, prompt_tokens = answer.get("prompt_token_ids"), answer["usage"]["prompt_tokens"]
    if served_ids is not None and served_ids != trained_ids:
        raise await _difference(http, model, "prompt of a completion", trained_ids, served_ids)
    if prompt_tokens != len(trained_ids):
        raise ModelError(
            f"a completion's prompt has {prompt_tokens} tokens where training saw {len(trained_ids)}",
            remedy="take flags that touch the chat template or special tokens out of serve.extra_args",
        )


async def _difference(
    http: httpx.AsyncClient, model: str, place: str, trained_ids: list[int], served_ids: list[int]
) -> ModelError:
    """The first difference of two rows of ids, in text, with the usual cause of such a difference."""
    at = first_difference(trained_ids, served_ids)
    before = await detokenize(http, model, trained_ids[max(0, at - SHOWN_BEFORE) : at]) if at else ""

    async def shown(ids: list[int]) -> str:
        if at >= len(ids):
            return "nothing more"
        return f"{ids[at]} {await detokenize(http, model, ids[at : at + 1])!r}"

    return ModelError(
        f"{place}, token {at + 1}: training saw {await shown(trained_ids)}, the server has {await shown(served_ids)}"
        f" (after {before!r}; {len(trained_ids)} and {len(served_ids)} tokens)",
        allowed="the same token ids in training and in serving",
        remedy=_cause(trained_ids, served_ids)
        + "compare chat_template.jinja and tokenizer_config.json of the served folder with the base model's,"
        " and take flags that touch them out of serve.extra_args",
    )


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """The first index at which two rows differ, the shorter's length where it begins the longer."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _cause(trained_ids: list[int], served_ids: list[int]) -> str:
    if len(served_ids) > 1 and served_ids[1:] == trained_ids:
        how_often = "twice" if served_ids[0] == served_ids[1] else "where training had none"
        return f"the server puts the BOS token {served_ids[0]} in front {how_often}; "
    if len(trained_ids) > 1 and trained_ids[1:] == served_ids:
        how_often = "twice" if trained_ids[0] == trained_ids[1] else "where the server has none"
        return f"training put the BOS token {trained_ids[0]} in front {how_often}; "
    return ""


async def check_ending(
    http: httpx.AsyncClient, model: str, conversations: Sequence[Conversation], max_tokens: int
) -> None:
    """Prove that the model ends an answer by itself on some trained conversation, the shortest tried first.

    Raises ModelError when every one of up to ENDING_TRIED ran into `max_tokens`, or when one ended with another token than
    the one that training taught.
    """
    whole = [talk for talk in conversations if not talk.truncated]
    shortest = sorted(whole, key=lambda talk: talk.answer_length)[:ENDING_TRIED]
    if not shortest:
        return None
    if shortest[0].answer_length > max_tokens:
        raise ModelError(
            f"the shortest trained answer has {shortest[0].answer_length} tokens, max_tokens is {max_tokens}",
            key="evaluate.max_tokens",
            remedy=f"raise evaluate.max_tokens to {max(talk.answer_length for talk in whole)} or more",
        )
    options = {"max_tokens": max_tokens, "return_token_ids": True}
    answers = await asyncio.gather(*(complete(http, model, talk.messages[:-1], **options) for talk in shortest))
    choices = [answer["choices"][0] for answer in answers]
    end = await _end_token(http, model, shortest[0])
    stops = [choice for choice in choices if choice["finish_reason"] == "stop"]
    if stops:
        return await _check_stop_token(http, model, end, [choice.get("token_ids") or [] for choice in stops])
    text = str(choices[0]["message"]["content"])
    raise ModelError(
        f"no trained answer ends: all of {len(shortest)} ran into max_tokens ({max_tokens}),"
        f" the first as …{text[-80:]!r}; training ended it with token {end[0]} {end[1]!r}",
        allowed="finish_reason stop on a conversation that the model was trained on",
        remedy=f"eos_token_id in the served generation_config.json must name {end[0]}; if it does, the model"
        " has not learned to stop: train longer, or check that the end token carries loss",
    )


async def _check_stop_token(
    http: httpx.AsyncClient, model: str, end: tuple[int, str], answers: Sequence[Sequence[int]]
) -> None:
    """Compare the token that the server stopped at with the trained one, where it reports ids."""
    for ids in answers:
        if ids and ids[-1] != end[0]:
            text = await detokenize(http, model, ids[-1:])
            raise ModelError(
                f"the server ends an answer at token {ids[-1]} {text!r}; training ended it with {end[0]} {end[1]!r}",
                allowed="the stop token that training saw",
                remedy=f"eos_token_id in the served generation_config.json must name {end[0]} alone",
            )


async def _end_token(http: httpx.AsyncClient, model: str, conversation: Conversation) -> tuple[int, str]:
    """The token that ends a trained answer, and its text: the last that is more than white space."""
    for token in reversed(conversation.input_ids):
        text = await detokenize(http, model, [token])
        if text.strip():
            return token, text
    return conversation.input_ids[-1], ""
