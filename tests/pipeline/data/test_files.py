from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data import files

ROW = {"prompt": "Where?", "completion": 'A "quoted" word, a [bracket], a {brace} and a \\ back\\\\slash.'}


def read(folder: Path, name: str, content: str | bytes) -> list:
    """(line, values) of sound rows, (line, kind) of the others."""
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(row.line, row.defects[0].kind if row.defects else row.values) for row in files.read(file)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 64, 2**16])
def test_a_json_list_is_read_at_any_chunk_size(tmp_path: Path, monkeypatch, indent: int | None, chunk: int) -> None:
    """Strings with quotes, brackets and escapes don't confuse the reader, wherever a chunk ends."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    rows = [{**ROW, "number": number, "é": ["Ü", {"deep": [[]]}]} for number in range(9)]
    found = read(tmp_path, "rows.json", json.dumps(rows, indent=indent, ensure_ascii=False))
    assert [values for _, values in found] == rows
    starts = json.dumps(rows[0], indent=indent).count("\n") + 1
    assert [line for line, _ in found] == ([1] * 9 if indent is None else [2 + n * starts for n in range(9)])


def test_a_text_file_is_read_line_by_line(tmp_path: Path) -> None:
    """Each line that isn't empty is a row at its line; bytes that are no UTF-8 are a defect of theirs."""
    assert read(tmp_path, "rows.txt", b" one \n\ntw\xe9\nthree") == [
        (1, {"text": "one"}),
        (3, "bad_utf8"),
        (4, {"text": "three"}),
    ]


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    """A .json file that begins with a one-line object is read as JSON Lines; empty lines are skipped."""
    assert read(tmp_path, "rows.json", '{"a": 1}\n\n{"a": 2}\n') == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[]", [(1, "empty_file")]),
        ("\n[\n]\n", [(1, "empty_file")]),
        ('[{"a": 1},\n]', [(1, {"a": 1}), (2, "broken_json")]),
        ('[{"a": 1}\n{"a": 2}]', [(2, "broken_json")]),
        ('[{"a": 1}]\n{"a": 2}', [(1, {"a": 1}), (2, "unclosed")]),
        ('[{"a": 1},\n{"a": 2}', [(1, {"a": 1}), (2, "unclosed")]),
        ('[{"a": 1},\n{"a": "2}]', [(1, {"a": 1}), (2, "unclosed")]),
        ('[{"a": 1}},\n{"a": 2}]', [(1, "unclosed")]),
        ('[1,\n\n"two",\nnull]', [(1, "not_an_object"), (3, "not_an_object"), (4, "not_an_object")]),
        ('[\n{"a":\n tru}]', [(3, "broken_json")]),
    ],
)
def test_a_broken_json_list_is_reported_where_it_breaks(tmp_path: Path, text: str, found: list) -> None:
    """Reading goes on after the break where that is possible."""
    assert read(tmp_path, "rows.json", text) == found


def test_reading_goes_on_after_a_broken_line(tmp_path: Path) -> None:
    """Each broken line is reported as itself, and the sound ones are still there."""
    lines = [
        b'{"a": 1}',
        b'{"a": "\xff"}',
        b'{"a": Infinity}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": 1',
        b"7",
        b'{"a": 2}',
    ]
    assert read(tmp_path, "rows.jsonl", b"\n".join(lines)) == [
        (1, {"a": 1}), (2, "bad_utf8"), (3, "nan"), (4, "duplicate_key"), (5, "broken_json"),
        (6, "not_an_object"), (7, {"a": 2}),
    ]  # fmt: skip


def test_deeply_nested_json_is_a_defect_and_no_crash(tmp_path: Path) -> None:
    """A hundred thousand brackets make a broken row, not a recursion error."""
    assert read(tmp_path, "rows.jsonl", '{"a": ' + "[" * 100_000 + "\n") == [(1, "broken_json")]


def test_csv_rows_keep_their_first_line_number(tmp_path: Path) -> None:
    """A quoted field with line ends is one row, and the rows after it have their true lines."""
    text = 'a,b\r\n1,"x\r\ny"\r\n\r\n"2, or 3",z\r\n4\r\n5,6\r\n'
    assert read(tmp_path, "rows.csv", text) == [
        (2, {"a": "1", "b": "x\r\ny"}), (5, {"a": "2, or 3", "b": "z"}),
        (6, "ragged_row"), (7, {"a": "5", "b": "6"}),
    ]  # fmt: skip


def test_a_quote_that_never_ends_costs_bounded_memory(tmp_path: Path, monkeypatch) -> None:
    """The row's limit ends the search for the closing quote."""
    monkeypatch.setattr(files, "MAX_ROW", 1000)
    text = "a,b\n1,2\n" + '3,"4\n' + "5,6\n" * 1000
    assert read(tmp_path, "rows.csv", text) == [(2, {"a": "1", "b": "2"}), (3, "unclosed")]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_row_has_a_limit(tmp_path: Path, monkeypatch, name: str) -> None:
    """A line or an element beyond the limit stops the file instead of filling the memory."""
    monkeypatch.setattr(files, "MAX_ROW", 1000)
    monkeypatch.setattr(files, "CHUNK", 100)
    row = json.dumps({"a": "x" * 5000})
    text = f'[{{"a": 1}},\n{row},\n{{"a": 2}}]' if name.endswith(".json") else f'{{"a": 1}}\n{row}\n{{"a": 2}}\n'
    assert read(tmp_path, name, text) == [(1, {"a": 1}), (2, "row_too_big")]


def test_progress_knows_about_how_many_rows_there_are(tmp_path: Path) -> None:
    """The estimate of a text file is its number of line ends."""
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' * 1234)
    assert files.about_how_many(tmp_path / "rows.jsonl") == 1234
