from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data import rows as data_rows
from pipeline.data.benchmarks import BenchmarkSummary, DocumentReader, passages, telling_passages
from pipeline.data.defects import DefectLog
from pipeline.data.ngrams import INSIDE, Index
from pipeline.errors import DataError

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.fixture
def reader(tmp_path: Path) -> DocumentReader:
    """A reader of 13-grams into an empty index."""
    index = Index(data_rows.create(tmp_path / "rows.sqlite"))
    return DocumentReader(index, DefectLog(tmp_path / "defects.jsonl"), 13)


def test_passages_are_texts_at_any_depth() -> None:
    """Numbers and nothing are passed over; objects and lists are searched."""
    document = {"question": "a", "choices": ["b", {"text": "c", "n": 3}], "id": 7, "note": None}
    assert list(passages(document)) == ["a", "b", "c"]


def test_a_document_is_recognized_by_what_tells_it() -> None:
    """Long passages, middle-sized ones that don't enumerate, else the longest one."""
    enough, words = LONG.split(), [f"word{n}" for n in range(INSIDE)]
    counting = ["a", "2", "b", "4", "c", "8", "d", "16"]
    assert len(counting) == INSIDE
    assert telling_passages([enough, words, counting, ["short"]], 13) == [enough, words]
    assert telling_passages([["a", "b"], ["short", "one", "here"], counting[:1]], 13) == [["short", "one", "here"]]
    assert telling_passages([], 13) == [()]


def test_documents_are_counted_and_indexed_at_their_line(reader: DocumentReader, tmp_path: Path) -> None:
    """Each document is a needle; one without three words is too short to be looked for."""
    file = tmp_path / "exam.txt"
    file.write_text(f"{LONG}\n\nno\n")
    assert reader.read((), "exam", file) == BenchmarkSummary("exam", documents=2, too_short=1)
    needles = reader.index.db.execute("SELECT kind, line, text FROM needles ORDER BY n").fetchall()
    assert needles == [("benchmark", 1, LONG), ("benchmark", 3, "no")]
    assert reader.index.sizes == {13}


def test_only_the_columns_of_the_config_count(reader: DocumentReader, tmp_path: Path) -> None:
    """A column that isn't named is no part of the document."""
    file = tmp_path / "exam.jsonl"
    file.write_text(json.dumps({"question": LONG, "source": "a book"}) + "\n")
    reader.read(("question",), "exam", file)
    assert reader.index.db.execute("SELECT text FROM needles").fetchall() == [(LONG,)]


def test_a_missing_column_stops_the_run_once_for_a_table_and_by_line_elsewhere(
    reader: DocumentReader, tmp_path: Path
) -> None:
    """A CSV is named once, JSON Lines by row, and no rate of defects lets either pass."""
    table, lines = tmp_path / "exam.csv", tmp_path / "exam.jsonl"
    table.write_text("question\na\nb\n")
    lines.write_text('{"question": "a"}\n{"answer": "b"}\n')
    assert reader.read(("answer",), "table", table).documents == 0
    assert reader.read(("answer",), "lines", lines).documents == 1
    assert dict(reader.log.counts) == {"missing_benchmark_column": 1, "missing_field": 1}
    with pytest.raises(DataError) as error:
        reader.log.raise_if_too_many(1.0)
    assert [(problem.file, problem.line, problem.what) for problem in error.value.problems] == [
        ("table", 2, "lacks answer"),
        ("lines", 1, "lacks answer"),
    ]
