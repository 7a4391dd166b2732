from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import programs

from pipeline.data.defects import Defect
from pipeline.data.tokens import Length, length_or_defect

COUNT = """
import json, sys
from pathlib import Path
from pipeline.data.tokens import TokenCounter
from pipeline.errors import ModelError
folder = Path(sys.argv[1])
counter = TokenCounter(folder)
asked = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here, my card."}]
lengths = [[length.tokens, length.answer] for length in counter.lengths([asked, "Where? Here.", "Where?"])]
special = [bool(counter.special.search(text)) for text in ("<|im_end|>", "<|endoftext|>", "im_end")]
text_tokens = len(counter._tokenizer("Where? Here.", add_special_tokens=False)["input_ids"])
rendered = counter._tokenizer.apply_chat_template(asked, tokenize=False)
whole = len(counter._tokenizer(rendered, add_special_tokens=False)["input_ids"])
counter._tokenizer.chat_template = "{{ raise_exception('user first') }}"
refusal = counter.lengths(["a text", asked])[1]
counter._tokenizer.chat_template = None
try:
    counter.lengths([asked])
except ModelError as error:
    missing = error.problems[0].remedy
print(json.dumps([lengths, special, text_tokens, whole, refusal.kind, refusal.what, missing]))
"""


@pytest.mark.slow
def test_rows_are_counted_with_what_the_template_adds(tmp_path: Path) -> None:
    """The base model's own tokenizer counts; a template that raises is a defect of the row, a missing one an error."""
    programs.tiny(tmp_path)
    answer = json.loads(programs.python(COUNT, tmp_path).splitlines()[-1])
    (conversation, text, shorter), special, text_tokens, whole, kind, reason, remedy = answer
    assert conversation[0] == whole > conversation[1] > 0
    assert text == [text_tokens, 0]
    assert shorter[0] < text[0]
    assert special == [True, True, False]
    assert (kind, reason) == ("template_refused", "the chat template refuses it: user first")
    assert "-instruct" in remedy


@pytest.mark.parametrize("strategy", ["drop", "truncate", "raise"])
def test_a_row_that_fits_stays_as_it_is(strategy: str) -> None:
    """The limit itself fits, whatever happens to longer rows."""
    assert length_or_defect(Length(8, 2), sequence_len=8, strategy=strategy) == Length(8, 2)


@pytest.mark.parametrize(
    ("length", "strategy", "expected"),
    [
        pytest.param(Length(9, 2), "drop", Length(9, 2, drop=True), id="left out"),
        pytest.param(Length(9, 2), "truncate", Length(9, 2), id="kept for training to cut"),
        pytest.param(Length(9, 0), "truncate", Length(9, 0), id="a text has no answer to lose"),
        pytest.param(Length(9, 2), "raise", "too_long", id="a defect"),
        pytest.param(Length(10, 2), "truncate", "answer_cut_off", id="all of the answer would be cut off"),
        pytest.param(Length(10, 2), "raise", "answer_cut_off", id="the worse of two defects"),
    ],
)
def test_a_longer_row_is_left_out_cut_or_a_defect(length: Length, strategy: str, expected: Length | str) -> None:
    """The strategy decides, unless the prompt alone fills the sequence."""
    answer = length_or_defect(length, sequence_len=8, strategy=strategy)
    assert (answer.kind if isinstance(answer, Defect) else answer) == expected


def test_a_long_row_names_its_tokens_and_the_limit() -> None:
    """The numbers stand in the message, those before the answer too."""
    defect = length_or_defect(Length(10, 2), sequence_len=8, strategy="raise")
    assert isinstance(defect, Defect)
    assert defect.what.startswith("has 10 tokens, 8 of them before the answer")
    assert defect.allowed == "sequence_len: 8"
