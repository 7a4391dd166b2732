"""Prepared rows as a training run reads them; the tokenizer's part is test_packing's, the real one's test_train's."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest

from pipeline.config.schema import FinetuneConfig
from pipeline.errors import DataError
from pipeline.finetune import rows
from pipeline.finetune.packing import IGNORED, Row


def token_row(tokens: int, loss: bool, is_cut: bool = False) -> Row:
    """A row that carries loss on its last token, or nowhere."""
    labels = [IGNORED] * (tokens - 1) + [7 if loss else IGNORED]
    return Row(array("i", [7] * tokens), array("i", labels), tokens - 1, is_cut)


@pytest.fixture
def splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train and val: a line a row, which says what its token row is like."""

    def encoder(_base: Path, _settings: FinetuneConfig, sequence_len: int):
        def encode_file(file: Path) -> list[Row]:
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            return [
                token_row(
                    min(line["tokens"], sequence_len), line["tokens"] <= sequence_len, line["tokens"] > sequence_len
                )
                for line in lines
            ]

        return encode_file

    monkeypatch.setattr(rows, "encoder", encoder)
    return tmp_path


def write(folder: Path, name: str, lengths: list[int], texts: tuple[int, ...] = ()) -> None:
    """Conversations of these lengths, and plain text where `texts` says so."""
    lines = [
        {"tokens": tokens, **({"text": "t"} if at in texts else {"messages": [{"role": "user", "content": str(at)}]})}
        for at, tokens in enumerate(lengths)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_rows_without_loss_are_left_out_and_counted(splits: Path) -> None:
    """Of both splits; rows that were cut are counted whether they carry loss or not."""
    write(splits, "train", [5, 12, 8, 20])
    write(splits, "val", [4, 30])
    found = rows.read(splits, splits, None, FinetuneConfig(), 10)
    assert [row.length for row in found.train] == [5, 8]
    assert [row.length for row in found.validation] == [4]
    assert (found.cut, found.without_answer) == (2, 2)


def test_the_first_conversations_are_recorded_as_trained(splits: Path) -> None:
    """Sixteen of them, with their tokens; plain text has no prompt that a server could be asked."""
    write(splits, "train", [4] * 20, texts=(0, 3))
    write(splits, "val", [])
    rows.read(splits, splits, splits / "extra", FinetuneConfig(), 10)
    lines = [json.loads(line) for line in (splits / "extra" / "seen_tokens.jsonl").read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == [str(at) for at in range(20) if at not in (0, 3)][:16]
    assert lines[0] == {
        "messages": [{"role": "user", "content": "1"}], "input_ids": [7] * 4, "labels": [-100, -100, -100, 7],
        "prompt_length": 3, "truncated": False,
    }  # fmt: skip


def test_a_run_without_a_row_to_learn_from_is_refused(splits: Path) -> None:
    """The error names the file, how many rows there were, and two ways out."""
    write(splits, "train", [30, 40])
    write(splits, "val", [4])
    with pytest.raises(DataError, match="none of 2 training rows carries loss within 10 tokens") as raised:
        rows.read(splits, splits, None, FinetuneConfig(), 10)
    (problem,) = raised.value.problems
    assert problem.file == str(splits / "train.jsonl")
    assert "raise data.sequence_len" in str(problem.remedy)
