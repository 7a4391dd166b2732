from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from pipeline.data import rows as data_rows
from pipeline.data import summary
from pipeline.data.benchmarks import BenchmarkSummary
from pipeline.data.defects import Defect, DefectLog
from pipeline.data.reading import FileSummary
from pipeline.data.rows import TEST, TRAIN, SoundRow

LEAKS = {
    "near_duplicates": {"holdout_near_train": 1, "within_train": 2, "first": []},
    "inside": {"holdout_inside_train": 0, "first": []},
    "benchmarks": {"documents": 5, "overlapping": 1, "first": []},
}


def filled(folder: Path, answers: dict[str, list[str]], tokens: int = 10) -> sqlite3.Connection:
    """A store with a row for each answer, by split."""
    db = data_rows.create(folder / "rows.sqlite")
    data_rows.add_file(db, "rows.jsonl")
    splits = [(split, answer) for split, entries in answers.items() for answer in entries]
    rows = [
        SoundRow(TEST if split == "holdout" else TRAIN, 1, number, turns(number, answer), tokens + number, 2)
        for number, (split, answer) in enumerate(splits, 1)
    ]
    data_rows.add(db, rows, seed=1)
    db.executemany("UPDATE rows SET split = ? WHERE n = ?", ((split, n) for n, (split, _) in enumerate(splits, 1)))
    return db


def turns(number: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]


def figures(db: sqlite3.Connection, folder: Path) -> dict:
    """All figures of a store, with one defective row and one benchmark file."""
    with DefectLog(folder / "defects.jsonl") as log:
        log.add_row("rows.jsonl", [Defect("nan", "NaN", 3)])
        log.add_row("rows.jsonl", [])
        files = [
            FileSummary("rows.jsonl", TRAIN, "messages", 2, {"z", "a"}),
            FileSummary("exam.jsonl", TEST, "alpaca", 1),
        ]
        return summary.summarise(db, files, [BenchmarkSummary("bench.txt", 5, 3)], log, LEAKS)


def test_few_short_answers_are_labels(tmp_path: Path) -> None:
    """Rows by answer and split; a label of the holdout alone is told, because training can't teach it."""
    db = filled(tmp_path, {"train": ["yes", "no", "yes", "no"], "val": ["yes"], "holdout": ["yes", "maybe"]})
    result = figures(db, tmp_path)
    assert result["labels"] == {
        "answer": {"yes": {"train": 2, "val": 1, "holdout": 1}, "no": {"train": 2}, "maybe": {"holdout": 1}}
    }
    assert result["unseen_labels"] == {"answer": ["maybe"]}


def test_json_answers_are_counted_key_by_key(tmp_path: Path) -> None:
    """Each key with few values is a label; a key with as many values as rows is left out."""
    answers = [json.dumps({"category": f"c{n % 2}", "urgent": n < 50, "id": n}) for n in range(100)]
    result = figures(filled(tmp_path, {"train": answers[:90], "holdout": answers[90:]}), tmp_path)
    assert result["labels"] == {
        "category": {"c0": {"train": 45, "holdout": 5}, "c1": {"train": 45, "holdout": 5}},
        "urgent": {"True": {"train": 50}, "False": {"train": 40, "holdout": 10}},
    }
    assert result["unseen_labels"] == {}


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([f"an answer of its own {n}" for n in range(20)], id="all different"),
        pytest.param(["yes", "x" * (data_rows.LABEL_LENGTH + 1)] * 5, id="a long one among them"),
        pytest.param([f'["list", {n}]' for n in range(20)], id="JSON but no objects"),
    ],
)
def test_other_answers_are_no_labels(tmp_path: Path, answers: list[str]) -> None:
    """Free text, long answers and JSON lists give no label figures."""
    assert figures(filled(tmp_path, {"train": answers}), tmp_path)["labels"] == {}


def test_lengths_are_sums_and_percentiles_by_nearest_rank(tmp_path: Path) -> None:
    """Of 100 rows with 1 to 100 tokens the median has 50, the 95th percentile 95; an empty split has none."""
    result = figures(filled(tmp_path, {"train": ["yes"] * 100}, tokens=0), tmp_path)
    assert result["tokens"]["train"] == {"total": 5050, "answers": 200, "p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert result["tokens"]["val"] == {"total": 0, "answers": 0}
    assert result["lengths"]["train"][:2] == [[1, 1], [2, 1]]


def test_files_defects_conflicts_and_benchmarks_are_reported(tmp_path: Path) -> None:
    """Counts come from the log, the store and the benchmarks; conflicting rows are named by place."""
    db = filled(tmp_path, {"train": ["yes", "no"]})
    data_rows.add(db, [SoundRow(TRAIN, 1, 9, turns(1, "no"), 10, 2)], seed=1)
    db.execute("UPDATE rows SET split = 'train'")
    result = figures(db, tmp_path)
    assert (result["rows_read"], result["dropped"], result["defects"]) == (2, {"defective": 1}, {"nan": 1})
    assert result["files"][0]["ignored_columns"] == ["a", "z"]
    assert [(file["set"], file["format"]) for file in result["files"]] == [("train", "messages"), ("holdout", "alpaca")]
    assert (result["benchmarks"]["overlapping"], result["benchmarks"]["too_short"]) == (1, 3)
    assert result["benchmarks"]["files"] == [{"name": "bench.txt", "documents": 5, "too_short": 3}]
    assert result["conflicting_prompts"] == 1
    assert [place["line"] for place in result["conflicts"][0]] == [1, 9]


def test_the_record_keeps_counts_and_leaves_lists_to_the_report(tmp_path: Path) -> None:
    """The artefact's detail has no examples, files or first pairs."""
    detail = summary.detail(figures(filled(tmp_path, {"train": ["yes", "no"]}), tmp_path))
    assert detail["near_duplicates"] == {"holdout_near_train": 1, "within_train": 2}
    assert detail["benchmarks"] == {"documents": 5, "overlapping": 1, "too_short": 3}
    assert detail["rows"] == {"train": 2, "val": 0, "calibration": 0, "holdout": 0}
    assert not detail.keys() & {"examples", "files", "lengths", "labels"}
