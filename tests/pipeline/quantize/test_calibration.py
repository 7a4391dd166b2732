"""pipeline.quantize.calibration: rows as token ids, those for the quantizer and those that check its work."""

from __future__ import annotations

import json

import pytest
from support.programs import python

from pipeline.errors import DataError
from pipeline.quantize.calibration import Calibration, Sample, encode, read_rows, take

TOKENIZERS = """
import json, sys
from pathlib import Path
from support.tiny import train_tokenizer
from pipeline.errors import ModelError
from pipeline.quantize.calibration import load_tokenizer
folder = Path(sys.argv[1])
train_tokenizer().save(str(folder / "tokenizer.json"))
tokenizer = load_tokenizer(folder)
report = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "eos_token_id", "pad_token")}
report["text"] = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
(folder / "tokenizer.json").unlink()
try:
    load_tokenizer(folder)
except ModelError as error:
    report["refusal"] = error.to_json()["problems"][0]
print(json.dumps(report))
"""


def test_long_conversations_keep_their_answer():
    """A conversation above the limit loses its beginning, and is counted; its answer stays where it was."""
    calibration = take([Sample(tuple(range(10)), 8), Sample((1, 2))], 2, 4)
    assert calibration.samples == (Sample((6, 7, 8, 9), 2), Sample((1, 2)))
    assert (calibration.cut_short, calibration.tokens) == (1, 6)
    assert str(calibration) == "2 conversations of 6 tokens, 1 of them cut short"


def test_an_answer_longer_than_the_limit_is_judged_after_its_first_token():
    """Nothing comes before the first token that is left, so it can't be scored."""
    assert take([Sample(tuple(range(10)), 3)], 1, 4).samples == (Sample((6, 7, 8, 9), 1),)


def test_the_probe_is_unseen_where_it_can_be():
    """The result is probed on rows not shown to the quantizer, or else on shown ones."""
    rows = [Sample((number,) * 250) for number in range(1, 6)]
    assert {sample.ids[0] for sample in take(rows, 2, 512).probe} == {3, 4}
    assert {sample.ids[0] for sample in take(rows, 5, 512).probe} == {1, 2}
    assert [len(sample) for sample in take([Sample((1,) * 900)], 1, 4096).probe] == [900]


def test_rows_of_one_token_say_nothing():
    """A calibration set without a row of two tokens stops the stage."""
    with pytest.raises(DataError, match="two tokens"):
        take([Sample((1,)), Sample(())], 2, 4)


class Letters:
    """A tokenizer whose tokens are characters and whose template is a line ROLE:CONTENT; for each message."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """Token ids of a text."""
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list, *, tokenize: bool, add_generation_prompt: bool = False) -> str:
        """The messages as text."""
        assert not tokenize
        turns = "".join(f"{message['role']}:{message['content']};\n" for message in messages)
        return turns + ("assistant:" if add_generation_prompt else "")


def test_the_answer_is_what_follows_the_generation_prompt():
    """Up to the token that ends it; the whole conversation is one sample, a row of plain text all answer but its first token."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    chat, text = encode([{"messages": messages}, {"text": "abc"}], Letters(), {ord(";")})
    assert "".join(map(chr, chat.ids)) == "user:hi;\nassistant:yes;\n"
    assert "".join(map(chr, chat.ids[chat.judged])) == "yes;"
    assert "".join(map(chr, chat.end(6).ids[chat.end(6).judged])) == "yes;"
    assert (text.ids, text.judged) == ((97, 98, 99), slice(1, 3))


def test_an_empty_calibration_set_is_refused(tmp_path):
    """No rows, no calibration: the error names the file and the setting."""
    file = tmp_path / "calibration.jsonl"
    file.write_text("\n")
    with pytest.raises(DataError) as refusal:
        read_rows(file)
    assert refusal.value.problems[0].file == str(file)
    assert "data.calibration_set_size" in (refusal.value.problems[0].remedy or "")


def test_blank_lines_are_no_rows(tmp_path):
    """Rows keep their order and their letters; empty lines between and behind them are passed over."""
    file = tmp_path / "calibration.jsonl"
    file.write_text('{"text": "é"}\n\n  \n{"text": "b"}\n\n', encoding="utf-8")
    assert read_rows(file) == [{"text": "é"}, {"text": "b"}]


class Thinker(Letters):
    """A template that writes into a conversation with an answer what its generation prompt doesn't hold."""

    def apply_chat_template(self, messages: list, *, tokenize: bool, add_generation_prompt: bool = False) -> str:
        """The messages as text, the last answer behind a thought."""
        text = super().apply_chat_template(messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt)
        return text if add_generation_prompt else f"thought;{text}"


def test_a_template_that_changes_the_prompt_has_all_its_tokens_judged():
    """Where the conversation doesn't begin with the generation prompt, the answer's place is unknown."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (sample,) = encode([{"messages": messages}], Thinker(), {ord(";")})
    assert "".join(map(chr, sample.ids[sample.judged])) == "hought;user:hi;\nassistant:yes;"


def test_an_answer_ends_with_its_last_end_token_and_without_one_at_the_end():
    """End tokens within an answer end nothing, and those of the prompt don't count."""
    messages = [{"role": "user", "content": "a;b"}, {"role": "assistant", "content": "c;d"}]
    for end_tokens, answer in (({ord(";")}, "c;d;"), ({ord("b")}, "c;d;\n"), (set(), "c;d;\n")):
        (sample,) = encode([{"messages": messages}], Letters(), end_tokens)
        assert "".join(map(chr, sample.ids[sample.judged])) == answer


def test_a_conversation_within_the_limit_stays_whole():
    """At just the limit nothing is lost, and nothing is counted as cut short."""
    sample = Sample((5, 6, 7, 8), 2, 1)
    assert sample.end(4) == sample.end(9) == sample
    assert take([sample], 1, 4).cut_short == 0
    assert str(Calibration((sample,), (), 0)) == "1 conversations of 4 tokens"


def test_short_rows_are_no_samples_and_the_probe_is_cut_like_them():
    """A row of one token takes no sample's place; a spare row above the limit is probed by its end, but isn't counted."""
    calibration = take([Sample((1,)), Sample((2, 3)), Sample((4, 5, 6, 7), 2)], 1, 3)
    assert calibration.samples == (Sample((2, 3)),)
    assert calibration.probe == (Sample((5, 6, 7), 1),)
    assert calibration.cut_short == 0


def test_a_probe_of_just_its_size_is_full():
    """Two rows of 256 tokens fill the 512; a row that would go beyond ends it, even where a shorter one follows."""
    halves = [Sample((number,) * 256) for number in range(1, 4)]
    assert [sample.ids[0] for sample in take([Sample((9, 9)), *halves], 1, 512).probe] == [1, 2]
    uneven = [Sample((number,) * length) for number, length in ((1, 300), (2, 300), (3, 2))]
    assert [sample.ids[0] for sample in take([Sample((9, 9)), *uneven], 1, 512).probe] == [1]


@pytest.mark.slow
def test_a_tokenizer_json_is_read_whatever_class_is_named_beside_it(tmp_path):
    """Special tokens come as text or as an object, the template from its file; without tokenizer.json there is a way out."""
    config = {
        "tokenizer_class": "OfNoPackage",
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
    }
    config = {**config, "pad_token": "<|endoftext|>", "chat_template": "not this one"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    report = json.loads(python(TOKENIZERS, tmp_path).splitlines()[-1])
    refusal = report.pop("refusal")
    assert report == {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "eos_token_id": 2,
        "pad_token": "<|endoftext|>",
        "text": "hi!",
    }
    assert refusal["what"].startswith("tokenizer.model can't be read here: ")
    assert (refusal["file"], refusal["remedy"]) == (str(tmp_path), "set quantize.backend: llmcompressor")
