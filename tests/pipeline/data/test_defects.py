from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.defects import KINDS, SHOWN, Defect, Ledger
from pipeline.errors import DataError


def test_every_remedy_can_be_written_for_a_file() -> None:
    """No kind's remedy trips over its own braces, and each says something."""
    for kind in KINDS:
        assert len(Defect(kind, "x").problem("rows.jsonl").remedy) > 10


def test_many_defects_of_a_kind_are_counted_not_printed(tmp_path: Path) -> None:
    """The error shows the first of each kind in file order and counts the rest; the list has all."""
    with Ledger(tmp_path / "defects.jsonl") as ledger:
        for line in range(1, 101):
            ledger.add_row("b.jsonl", [Defect("nan", "NaN", line)])
        ledger.add_row("b.jsonl", [Defect("empty_answer", "empty", 7)])
        ledger.add_row("a.jsonl", [Defect("empty_answer", "empty", 2)])
        with pytest.raises(DataError) as raised:
            ledger.judge(0.0)
    problems = raised.value.problems
    assert [problem.line for problem in problems[:8]] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert problems[SHOWN + 1].file == "a.jsonl"
    assert problems[-1].what == "80 more defects of the kind nan"
    assert len((tmp_path / "defects.jsonl").read_text().splitlines()) == 102
    assert json.loads((tmp_path / "defects.jsonl").read_text().splitlines()[0])["kind"] == "nan"


def test_a_defect_of_a_file_stops_the_run_at_any_rate(tmp_path: Path) -> None:
    """max_defect_rate is about rows; a missing column or file is never dropped silently."""
    with Ledger(tmp_path / "defects.jsonl") as ledger:
        ledger.add_row("a.jsonl", [])
        ledger.judge(0.0)
        ledger.add("a.jsonl", Defect("missing_column", "has no column x"))
        with pytest.raises(DataError, match="has no column x"):
            ledger.judge(1.0)
