from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.defects import KINDS, SHOWN, Defect, DefectLog
from pipeline.errors import DataError


def test_every_remedy_can_be_written_for_a_file() -> None:
    """No kind's remedy trips over its own braces, and each says something."""
    for kind in KINDS:
        assert len(Defect(kind, "x").problem("rows.jsonl").remedy) > 10


def test_many_defects_of_a_kind_are_counted_not_printed(tmp_path: Path) -> None:
    """The error shows the first of each kind in file order and counts the rest; the list has all."""
    with DefectLog(tmp_path / "defects.jsonl") as log:
        for line in range(1, 101):
            log.add_row("b.jsonl", [Defect("nan", "NaN", line)])
        log.add_row("b.jsonl", [Defect("empty_answer", "empty", 7)])
        log.add_row("a.jsonl", [Defect("empty_answer", "empty", 2)])
        with pytest.raises(DataError) as raised:
            log.raise_if_too_many(0.0)
    problems = raised.value.problems
    assert [problem.line for problem in problems[:8]] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert problems[SHOWN + 1].file == "a.jsonl"
    assert problems[-1].what == "80 more defects of the kind nan"
    assert len((tmp_path / "defects.jsonl").read_text().splitlines()) == 102
    assert json.loads((tmp_path / "defects.jsonl").read_text().splitlines()[0])["kind"] == "nan"


def test_a_defect_of_a_file_stops_the_run_at_any_rate(tmp_path: Path) -> None:
    """max_defect_rate is about rows; a missing column or file is never dropped silently."""
    with DefectLog(tmp_path / "defects.jsonl") as log:
        log.add_row("a.jsonl", [])
        log.raise_if_too_many(0.0)
        log.add("a.jsonl", Defect("missing_column", "lacks the column x"))
        with pytest.raises(DataError, match="lacks the column x"):
            log.raise_if_too_many(1.0)
