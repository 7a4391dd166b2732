"""Token rows, labels and steps, with a tokenizer of words; test_train.py has the real ones."""

from __future__ import annotations

import re

import jinja2
import pytest

from pipeline.errors import DataError, ModelError
from pipeline.finetune.packing import IGNORED, encode, passes, shared_prefix, steps_of_epoch

CHATML = (
    "{% for m in messages %}{{ '<im> ' + m.role + ' : ' + m.content + ' <end> \\n ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<im> assistant : ' }}{% endif %}"
)
END = "<end>"


class Words:
    """A tokenizer of words; `glued` are strings that are one token wherever they occur."""

    def __init__(self, chat_template: str | None = CHATML, glued: tuple[str, ...] = ()) -> None:
        self.chat_template = chat_template
        self.words: dict[str, int] = {}
        self.pattern = re.compile("|".join([*map(re.escape, glued), r"\n|[^\s]+"]))
        self.eos_token_id = self.number(END)

    def number(self, word: str) -> int:
        """The id of a word."""
        return self.words.setdefault(word, len(self.words) + 1)

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict:
        """Ids, as Hugging Face tokenizers give them."""
        several = [text] if isinstance(text, str) else text
        ids = [[self.number(word) for word in self.pattern.findall(one)] for one in several]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool = False) -> str:
        """The rendered conversation."""
        template = jinja2.Environment().from_string(self.chat_template)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    def decode(self, ids: list[int]) -> str:
        """The words again; / is a line break."""
        names = {number: word for word, number in self.words.items()}
        return " ".join(names[one] for one in ids).replace("\n", "/")


def chat(*contents: str, system: str | None = None) -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]
    return {
        "id": "a1",
        "messages": [{"role": "system", "content": system}, *messages] if system else messages,
    }


def one(row: dict, tokenizer: Words, **settings: object):
    chosen = {"end_tokens": {tokenizer.eos_token_id}, "sequence_len": 1000, **settings}
    return next(encode(iter([row]), tokenizer, **chosen))


def trained(row, tokenizer: Words) -> str:
    """The words that carry loss."""
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


def test_only_the_answer_and_its_end_token_carry_loss():
    """Prompt and template are seen but not learned, and what stands behind the end token is cut off."""
    tokenizer = Words()
    row = one(chat("how much ?", "two", system="be brief"), tokenizer)
    assert trained(row, tokenizer) == "two <end>"
    assert tokenizer.decode(row.input_ids).endswith("<im> assistant : two <end>")
    prompt = tokenizer.decode(row.input_ids[: row.prompt_length])
    assert prompt == "<im> system : be brief <end> / <im> user : how much ? <end> / <im> assistant :"
    assert row.trained == 2


def test_every_answer_of_a_conversation_counts():
    """In several turns each assistant turn carries loss, the line break between turns doesn't."""
    tokenizer = Words()
    row = one(chat("one ?", "first", "two ?", "second answer"), tokenizer)
    assert trained(row, tokenizer) == "first <end> second answer <end>"
    assert "second" not in tokenizer.decode(row.input_ids[: row.prompt_length])
    assert "first" in tokenizer.decode(row.input_ids[: row.prompt_length])


def test_train_on_inputs_learns_the_prompt_too():
    """With train_on_inputs every token up to the last end token carries loss."""
    tokenizer = Words()
    row = one(chat("how much ?", "two"), tokenizer, train_on_inputs=True)
    assert row.labels == row.input_ids
    assert row.trained == len(row.input_ids) - 1, "nothing predicts the first token"


def test_text_rows_are_learned_whole_with_an_end_token():
    """A row of plain text carries loss everywhere and ends with one end token, not two."""
    tokenizer = Words()
    for text in ("some plain words", "some plain words <end>"):
        row = one({"id": "t", "text": text}, tokenizer)
        assert trained(row, tokenizer) == "some plain words <end>"
        assert row.prompt_length == 0


def test_chats_and_text_keep_their_order():
    """Rows come back in the order they were given, whatever their kind."""
    tokenizer = Words()
    rows = [chat("a", "b"), {"id": "t", "text": "c"}, chat("d", "e", "f", "g")]
    found = encode(iter(rows), tokenizer, end_tokens={tokenizer.eos_token_id}, sequence_len=99)
    assert [trained(row, tokenizer) for row in found] == ["b <end>", "c <end>", "e <end> g <end>"]


def test_a_token_across_the_border_of_prompt_and_answer_is_never_trained():
    """The prompt has the ids that a server makes of it, also where a token would span the border."""
    tokenizer = Words(glued=(": two",))
    row = one(chat("how much ?", "two apples"), tokenizer)
    question = chat("how much ?", "two apples")["messages"][:1]
    prompt = tokenizer(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    assert list(row.input_ids[: row.prompt_length]) == prompt["input_ids"]
    assert trained(row, tokenizer) == "two apples <end>"


def test_long_rows_lose_their_end():
    """A row is cut at sequence_len; one whose answer is gone carries no loss."""
    tokenizer = Words()
    whole = one(chat("how much ?", "two apples"), tokenizer)
    cut = one(chat("how much ?", "two apples"), tokenizer, sequence_len=whole.prompt_length + 1)
    assert (trained(cut, tokenizer), cut.is_cut) == ("two", True)
    assert one(chat("how much ?", "two"), tokenizer, sequence_len=whole.prompt_length).trained == 0


def test_a_template_without_end_token_is_refused():
    """A model trained so would never stop; the error names the row and the file to correct."""
    tokenizer = Words("{% for m in messages %}{{ m.role + ' : ' + m.content + ' ' }}{% endfor %}"
                      "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}")  # fmt: skip
    with pytest.raises(ModelError, match=r"no end token behind an answer \(row a1\)") as error:
        one(chat("how much ?", "two"), tokenizer)
    assert "generation_config.json" in (error.value.problems[0].remedy or "")


def test_a_template_that_rewrites_the_question_is_refused():
    """Where the prompt isn't the beginning of the whole, no token can be said to belong to the answer."""
    rewriting = "{{ messages|length }} " + CHATML
    with pytest.raises(DataError, match="row a1: the chat template must write a question as it does"):
        one(chat("how much ?", "two"), Words(rewriting))


def test_a_template_that_raises_is_reported_with_the_row():
    """A template's own error becomes a data error with the row's id."""
    refusing = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="row a1: the chat template refuses it"):
        one(chat("how much ?", "two"), Words(refusing))


def test_a_model_without_template_is_refused():
    """Conversations need a chat template; the remedy names the choices."""
    with pytest.raises(ModelError, match="without a chat template") as error:
        one(chat("how much ?", "two"), Words(None))
    assert "-instruct" in (error.value.problems[0].remedy or "")


LENGTHS = [30, 70, 20, 90, 10, 50, 60, 40, 120]


def test_packed_bins_hold_whole_rows_within_capacity():
    """Each row is trained once an epoch, no bin is over capacity but one that a single long row needs."""
    bins = steps_of_epoch(LENGTHS, seed=1, epoch=0, batch=1, capacity=100)
    assert sorted(row for bin_ in bins for row in bin_) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[row] for row in bin_) <= 100 or bin_ == [8] for bin_ in bins)
    assert len(bins) < len(LENGTHS) - 2


def test_order_depends_on_seed_and_epoch_alone():
    """The same seed and epoch give the same steps, another epoch or seed others."""

    def steps(seed: int, epoch: int) -> list[list[int]]:
        return steps_of_epoch(list(range(1, 60)), seed=seed, epoch=epoch, batch=4, capacity=100)

    assert steps(1, 0) == steps(1, 0)
    assert len({str(steps(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_without_packing_a_step_takes_rows():
    """Without packing the batch counts rows, and the last step takes what is left."""
    steps = steps_of_epoch(LENGTHS, seed=1, epoch=0, batch=4, capacity=None)
    assert [len(step) for step in steps] == [4, 4, 1]


def test_passes_cut_a_step_without_losing_a_row():
    """A step is cut into passes of bounded tokens and rows, in order; a row over the bound goes alone."""
    rows = list(range(len(LENGTHS)))
    cut = passes(rows, LENGTHS, tokens=100)
    assert [row for some in cut for row in some] == rows
    assert all(sum(LENGTHS[row] for row in some) <= 100 or len(some) == 1 for some in cut)
    assert max(len(some) for some in passes(rows, LENGTHS, tokens=1000, most=2)) == 2


def test_a_shared_prefix_is_what_no_row_is_trained_on():
    """Rows share what they all begin with; the token before the first trained one stays with its row."""
    tokenizer = Words()
    asked = [chat(question, "yes", system="be brief") for question in ("one ?", "two ?", "one ? three ?")]
    rows = [one(row, tokenizer) for row in asked]
    shared = tokenizer.decode(rows[0].input_ids[: shared_prefix(rows)])
    assert shared == "<im> system : be brief <end> / <im> user :"
    assert shared_prefix(rows[:1]) == 0
    same = [one(chat("one ?", answer), tokenizer) for answer in ("yes", "no")]
    assert shared_prefix(same) == same[0].prompt_length - 1
    assert shared_prefix([*rows, one({"id": "t", "text": "<im> system : be brief"}, tokenizer)]) == 0
