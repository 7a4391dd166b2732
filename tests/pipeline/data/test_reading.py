from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from pipeline.data import reading
from pipeline.data import rows as data_rows
from pipeline.data.checks import special_tokens_pattern
from pipeline.data.defects import Defect, DefectLog
from pipeline.data.reading import FileSummary, Intake, RowReader, check_file
from pipeline.data.tokens import Length

AUTO = {"type": "auto", "template": None}
DATA = {"columns": [], "test_datasets": [], "sequence_len": 20, "excess_length_strategy": "drop"}


def asked(number: int, **more) -> dict:
    return {"prompt": f"question {number}", "completion": "yes", **more}


@pytest.fixture
def log(tmp_path: Path) -> DefectLog:
    """An empty log."""
    return DefectLog(tmp_path / "defects.jsonl")


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def table(file: Path, *rows: list[str]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows(rows)
    return file


def kinds(log: DefectLog) -> list[tuple[str, int | None]]:
    """Kind and line of every defect."""
    log._file.flush()
    return [(entry["kind"], entry["line"]) for entry in map(json.loads, log.path.read_text().splitlines())]


def test_sound_rows_come_with_their_lines_and_the_rest_is_logged(log: DefectLog, tmp_path: Path) -> None:
    """A defective row is left out at its line; the summary has format, rows and ignored columns."""
    file = write(tmp_path / "rows.jsonl", [asked(1, source="x"), asked(2, completion=""), asked(3)])
    summary = FileSummary("rows", data_rows.TRAIN)
    sound = list(RowReader(log, DATA).sound_rows(AUTO, file, summary))
    assert [line for line, _, _ in sound] == [1, 3]
    assert sound[0][1] == [{"role": "user", "content": "question 1"}, {"role": "assistant", "content": "yes"}]
    assert kinds(log) == [("empty_answer", 2)]
    assert summary == FileSummary("rows", data_rows.TRAIN, "prompt_completion", 3, {"source"})


def test_the_first_row_decides_the_format(log: DefectLog, tmp_path: Path) -> None:
    """A later row of another format or without a column is a defect, not another format."""
    rows = [asked(1), {"instruction": "a", "output": "b"}, {"prompt": "a"}]
    assert len(list(RowReader(log, DATA).sound_rows(AUTO, write(tmp_path / "r.jsonl", rows), FileSummary("r", 0)))) == 1
    assert kinds(log) == [("mixed_format", 2), ("missing_field", 3)]


def test_special_tokens_are_looked_for_where_they_are_given(log: DefectLog, tmp_path: Path) -> None:
    """Without a tokenizer none is a defect; with its pattern the row is left out."""
    file = write(tmp_path / "rows.jsonl", [asked(1, completion="a <s> b")])
    assert len(list(RowReader(log, DATA).sound_rows(AUTO, file, FileSummary("r", 0)))) == 1
    with_tokens = RowReader(log, DATA, special_tokens_pattern(["<s>"]))
    assert list(with_tokens.sound_rows(AUTO, file, FileSummary("r", 0))) == []
    assert kinds(log) == [("special_token", 1)]


@pytest.mark.parametrize(
    ("tests", "kind", "side", "needs"),
    [
        ([], "prompt_completion", data_rows.TRAIN, True),
        ([{}], "prompt_completion", data_rows.TRAIN, False),
        ([{}], "prompt_completion", data_rows.TEST, True),
        ([], "text", data_rows.TRAIN, False),
    ],
)
def test_rows_that_may_be_held_out_need_the_columns(
    log: DefectLog, tmp_path: Path, tests: list, kind: str, side: int, needs: bool
) -> None:
    """Texts and training rows beside test_datasets never go to the holdout, so they may lack data.columns."""
    data = {**DATA, "columns": ["channel"], "test_datasets": tests}
    row = {"text": "a text"} if kind == "text" else asked(1)
    list(RowReader(log, data).sound_rows(AUTO, write(tmp_path / "rows.jsonl", [row]), FileSummary("r", side)))
    assert kinds(log) == ([("missing_field", 1)] if needs else [])


def test_checking_a_file_counts_its_rows_and_logs_its_defects(log: DefectLog, tmp_path: Path) -> None:
    """`tunegate check` reads files so: rows are counted, none is stored."""
    file = write(tmp_path / "rows.jsonl", [asked(1), asked(2, completion=None), asked(3)])
    check_file(RowReader(log, DATA), AUTO, "rows", file, data_rows.TRAIN)
    assert (log.rows, log.defective_rows) == (3, 1)


def test_a_table_lacks_a_column_once_and_without_any_has_no_header(tmp_path: Path) -> None:
    """The defect names the columns that are there; a first row of data is told from a header."""
    source = {"type": "prompt_completion", "template": None}
    lacking = reading.choose_format(source, {"prompt": "a", "answer": "b"}, Path("rows.csv"), data_rows.TRAIN)
    assert isinstance(lacking, Defect)
    assert (lacking.kind, lacking.what) == (
        "missing_column",
        "lacks the column completion; its columns are prompt, answer",
    )
    headless = reading.choose_format(source, {"Where?": "x"}, Path("rows.csv"), data_rows.TRAIN)
    assert isinstance(headless, Defect)
    assert (headless.kind, headless.line) == ("no_header", 1)
    assert not isinstance(reading.choose_format(source, {"x": 1}, Path("rows.jsonl"), data_rows.TRAIN), Defect)
    further = reading.lacking_columns(["channel"], {"prompt": "a"}, Path("rows.parquet"))
    assert further is not None
    assert (further.kind, further.line) == ("missing_further_column", None)
    assert reading.lacking_columns(["channel"], {"prompt": "a"}, Path("rows.jsonl")) is None


def test_texts_are_refused_for_the_holdout_and_unknown_columns_named() -> None:
    """Nothing in a text can be scored; auto names every format it knows."""
    held_out = reading.choose_format(AUTO, {"text": "a"}, Path("rows.jsonl"), data_rows.TEST)
    assert isinstance(held_out, Defect)
    assert held_out.kind == "text_in_holdout"
    unknown = reading.choose_format(AUTO, {"q": "a", "reply": "b"}, Path("rows.jsonl"), data_rows.TRAIN)
    assert isinstance(unknown, Defect)
    assert unknown.what == "has the columns q, reply"
    assert "prompt_completion: prompt + completion" in str(unknown.allowed)


class Counter:
    """Counts a word as a token; refuses the question `refused`."""

    def lengths(self, bodies: list) -> list[Length | Defect]:
        """As TokenCounter.lengths."""
        return [
            Defect("template_refused", "the chat template refuses it")
            if body[0]["content"] == "refused"
            else Length(sum(len(turn["content"].split()) for turn in body), len(body[-1]["content"].split()))
            for body in bodies
        ]


def test_the_intake_stores_sound_rows_with_their_lengths(log: DefectLog, tmp_path: Path, monkeypatch) -> None:
    """A row too long for the sequence is stored as dropped, a refused one logged; every batch is reported."""
    monkeypatch.setattr(reading.files, "BATCH", 2)
    rows = [asked(1), {"prompt": "refused", "completion": "a"}, {"prompt": "w " * 30, "completion": "a"}, asked(4)]
    db, reports = data_rows.create(tmp_path / "rows.sqlite"), []
    intake = Intake(RowReader(log, DATA), db, Counter(), 1, reports.append)
    summary = intake.read(AUTO, "rows", write(tmp_path / "rows.jsonl", rows), data_rows.TRAIN)
    assert reports == [2, 2]
    assert (summary.rows, log.rows, kinds(log)) == (4, 4, [("template_refused", 2)])
    query = "SELECT line, tokens, answer_tokens, dropped FROM rows ORDER BY n"
    assert db.execute(query).fetchall() == [(1, 3, 1, None), (3, 31, 1, "too_long"), (4, 3, 1, None)]
