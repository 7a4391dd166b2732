"""How the ledger asks: which rows, in which batches, and what a killed run finds; answers of real models are test_compare's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import ModelError, ResourceError
from pipeline.ledger import answers
from pipeline.ledger.models import Speaker


class Letters:
    """A tokenizer of letters."""

    def apply_chat_template(self, messages: list, *, tokenize: bool, add_generation_prompt: bool) -> str:
        """The contents, and a sign where an answer belongs."""
        assert not tokenize
        return "".join(message["content"] for message in messages) + ("?" if add_generation_prompt else "")

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict:
        """An id a letter."""
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int], **_: object) -> str:
        """The letters."""
        return "".join(map(chr, ids))


@pytest.fixture
def speaker() -> Speaker:
    return Speaker(SimpleNamespace(device=SimpleNamespace(type="cpu")), Letters(), (0,))


def row(content: str) -> dict:
    return {"id": content, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]}


def test_batches_hold_prompts_of_like_length_within_the_budget() -> None:
    """The shortest first, each row once; a prompt above the budget goes alone."""
    lengths = [5, 90, 7, 5, 300, 6]
    batches = answers.cut(lengths, 10, 50)
    assert batches == [[0, 3, 5], [2], [1], [4]]
    assert all(len(batch) == 1 or len(batch) * (max(lengths[at] for at in batch) + 10) <= 50 for batch in batches)


def test_the_ledger_takes_the_first_rows_of_the_evaluations(tmp_path: Path) -> None:
    """No more than ledger_items, and none that the evaluation leaves out."""
    file = tmp_path / "holdout.jsonl"
    file.write_text("".join(json.dumps({"id": number}) + "\n" for number in range(9)))
    ids = [
        [entry["id"] for entry in answers.read_rows(file, {"max_items": most, "ledger_items": items})]
        for most, items in ((None, 4), (3, 4), (None, 100))
    ]
    assert ids == [[0, 1, 2, 3], [0, 1, 2], list(range(9))]


def test_a_batch_that_lies_there_is_not_asked_again(
    tmp_path: Path, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers come in the rows' order with their ids, and a second run asks the model nothing."""
    asked: list[list[str]] = []

    def generate(_speaker: Speaker, prompts: list[list[int]], _max_tokens: int) -> list[dict[str, str]]:
        texts = ["".join(map(chr, prompt)) for prompt in prompts]
        asked.append(texts)
        return [{"answer": text.upper(), "finish_reason": "stop"} for text in texts]

    monkeypatch.setattr(answers, "generate", generate)
    monkeypatch.setitem(answers.BATCH_TOKENS, "cpu", 30)
    rows, counts = [row("long one"), row("a"), row("b")], []
    found = answers.ask(speaker, rows, 10, tmp_path, counts.append)
    assert [(entry["id"], entry["answer"]) for entry in found] == [("long one", "LONG ONE?"), ("a", "A?"), ("b", "B?")]
    assert asked == [["a?", "b?"], ["long one?"]]
    assert counts == [2, 3]
    (tmp_path / "1.json").unlink()
    assert answers.ask(speaker, rows, 10, tmp_path, counts.append) == found
    assert asked[2:] == [["long one?"]]


def test_an_answer_ends_at_its_end_token(speaker: Speaker) -> None:
    """Without one it was cut off by the number of tokens."""
    assert answers._answer(speaker, [104, 105, 0, 120]) == {"answer": "hi", "finish_reason": "stop"}
    assert answers._answer(speaker, [104, 105]) == {"answer": "hi", "finish_reason": "length"}


def test_an_error_names_its_step_and_a_way_to_go_without() -> None:
    """A broken model's own problems stand behind the step; too little memory has the same way out."""
    with (
        pytest.raises(ModelError, match="the ledger stops at the step quantized") as broken,
        answers._step_named("quantized"),
    ):
        raise ModelError("holds NaN", key="w", remedy="mend it")
    first, second = broken.value.problems
    assert "evaluate.ledger_items: 0" in str(first.remedy)
    assert second.key == "w"
    with pytest.raises(ResourceError, match="the ledger's step base") as full, answers._step_named("base"):
        raise MemoryError
    assert "evaluate.ledger_items: 0" in str(full.value.problems[0].remedy)
