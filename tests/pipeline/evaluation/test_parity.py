from __future__ import annotations

import asyncio
import json

import pytest
from support.wire import fake_vllm

from pipeline.errors import DataError, ModelError
from pipeline.evaluation import parity
from pipeline.evaluation.client import connect, tokenize

MODEL = "m"
MESSAGES = (
    {"role": "user", "content": "where is my card?"},
    {"role": "assistant", "content": "card arrival"},
)


@pytest.fixture(scope="module")
def server():
    with fake_vllm(MODEL) as url:
        yield url


def seen(url: str, *, drop_tail: bool = False) -> parity.Conversation:
    """A conversation with the ids that the server has for it, as a faithful training would have seen it."""

    async def ids() -> tuple[list[int], list[int]]:
        async with connect(url, None, 4) as http:
            return (
                await tokenize(http, MODEL, MESSAGES[:-1], prompt=True),
                await tokenize(http, MODEL, MESSAGES, prompt=False),
            )

    prompt, whole = asyncio.run(ids())
    return parity.Conversation(MESSAGES, tuple(whole[:-1] if drop_tail else whole), len(prompt))


def check(url: str, *conversations: parity.Conversation) -> None:
    async def work() -> None:
        async with connect(url, None, 4) as http:
            await parity.check_tokens(http, MODEL, conversations)

    asyncio.run(work())


def check_ending(url: str, max_tokens: int, *conversations: parity.Conversation) -> None:
    async def work() -> None:
        async with connect(url, None, 4) as http:
            await parity.check_ending(http, MODEL, conversations, max_tokens)

    asyncio.run(work())


def test_equal_tokens_pass(server):
    """What the server itself reports is accepted."""
    check(server, seen(server), seen(server))


def test_white_space_behind_the_answers_end_does_not_matter(server):
    """Training that stops at the end token is equal to a template that adds a line break behind it."""
    check(server, seen(server, drop_tail=True))


def test_a_missing_end_token_matters(server):
    """More than white space missing at the end is a difference, shown decoded."""
    whole = seen(server)
    cut = parity.Conversation(whole.messages, whole.input_ids[: -len("<|im_end|>\n")], whole.prompt_length)
    with pytest.raises(ModelError, match=r"training saw nothing more, the server has 60 '<' \(after ' arrival'"):
        check(server, cut)


def test_white_space_that_only_training_saw_matters(server):
    """A line break that no server sends is a token that the model waits for in vain."""
    whole = seen(server)
    more = parity.Conversation(whole.messages, (*whole.input_ids, 10), whole.prompt_length)
    with pytest.raises(ModelError, match=r"training saw 10 '\\n', the server has nothing more"):
        check(server, more)


def test_a_truncated_row_is_compared_as_far_as_it_goes(server):
    """A row that was cut at sequence_len is no difference, whether in its answer or in its prompt."""
    whole = seen(server)
    for length in (whole.prompt_length + 2, whole.prompt_length - 3):
        check(server, parity.Conversation(whole.messages, whole.input_ids[:length], whole.prompt_length, True))
    wrong = parity.Conversation(whole.messages, (1, *whole.input_ids[1:20]), whole.prompt_length, truncated=True)
    with pytest.raises(ModelError, match="prompt of conversation 1, token 1"):
        check(server, wrong)


def test_the_first_difference_is_shown_decoded(server):
    """A prompt that differs in one token is named with its place, both tokens and what stands before them."""
    whole = seen(server)
    at = len("<|im_start|>user\nwhere is my ")
    ids = (*whole.input_ids[:at], ord("C"), *whole.input_ids[at + 1 :])
    with pytest.raises(ModelError) as error:
        check(server, whole, parity.Conversation(whole.messages, ids, whole.prompt_length))
    text = str(error.value)
    assert f"prompt of conversation 2, token {at + 1}: training saw 67 'C', the server has 99 'c'" in text
    assert "(after 'e is my '" in text
    assert "chat_template.jinja" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: (1, *ids), "training put the BOS token 1 in front where the server has none"),
        (lambda ids: (ids[0], *ids), "training put the BOS token 60 in front twice"),
        (lambda ids: ids[1:], "the server puts the BOS token 60 in front where training had none"),
    ],
)
def test_a_bos_token_too_many_is_named_as_such(server, change, words):
    """The usual cause of a difference in the first token is said in words."""
    whole = seen(server)
    ids = change(whole.input_ids)
    moved = parity.Conversation(whole.messages, ids, whole.prompt_length + len(ids) - len(whole.input_ids))
    with pytest.raises(ModelError, match=words):
        check(server, moved)


def test_an_answer_that_ends_passes(server):
    """The fake answers in one word and stops."""
    check_ending(server, 64, seen(server))


def test_an_answer_that_never_ends_stops_the_run():
    """A model that runs into max_tokens on all that it was trained on is refused, naming the end token."""
    with fake_vllm(MODEL, answer="new " * 500) as url, pytest.raises(ModelError) as error:
        check_ending(url, 64, seen(url))
    assert "ran into max_tokens (64)" in str(error.value)
    assert "training ended it with token 62 '>'" in str(error.value)
    assert "eos_token_id" in str(error.value)


def test_too_small_a_limit_is_not_blamed_on_the_model(server):
    """Answers longer than max_tokens can't end; the error names the setting."""
    with pytest.raises(ModelError, match=r"evaluate.max_tokens: the shortest trained answer has \d+ tokens"):
        check_ending(server, 4, seen(server))


def test_rows_of_text_are_left_out_and_junk_is_refused(tmp_path):
    """A text row has no conversation to compare; a file that isn't finetune's is named."""
    file = tmp_path / "seen_tokens.jsonl"
    chat = {"messages": list(MESSAGES), "input_ids": [1, 2, 3], "labels": [-100, 2, 3], "prompt_length": 1}
    file.write_text("\n".join(json.dumps(row) for row in (chat, {"text": "once", "input_ids": [4]})), encoding="utf-8")
    (found,) = parity.read_seen(file)
    assert (found.input_ids, found.answer_length) == ((1, 2, 3), 2)
    file.write_text('{"messages": [{}], "prompt_length": 1}', encoding="utf-8")
    with pytest.raises(DataError, match=r"seen_tokens.jsonl: .*input_ids"):
        parity.read_seen(file)
    with pytest.raises(DataError, match="FileNotFoundError"):
        parity.read_seen(tmp_path / "none.jsonl")


def test_a_completion_that_counts_other_tokens_is_refused(server):
    """The path that clients take is held against training by itself, not through /tokenize."""
    whole = seen(server)

    async def work() -> None:
        async with connect(server, None, 1) as http:
            short = parity.Conversation(whole.messages, whole.input_ids[1:], whole.prompt_length - 1)
            await parity._check_completion(http, MODEL, short)

    with pytest.raises(ModelError, match="prompt of a completion, token 1"):
        asyncio.run(work())
