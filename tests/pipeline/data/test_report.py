from __future__ import annotations

import json
from pathlib import Path

from pipeline.data import report
from pipeline.data.splits import SPLITS


def place(line: int, text: str, split: str = "train") -> dict:
    return {"file": "/data/rows.jsonl", "line": line, "split": split, "text": text}


def figures(**changes) -> dict:
    """The figures of a small set in which little was found; keyword arguments replace some."""
    return {
        "rows_read": 7, "rows": dict.fromkeys(SPLITS, 1), "dropped": {}, "defects": {},
        "tokens": {split: {"total": 9, "answers": 2, "p50": 9, "p95": 9, "p99": 9, "max": 9} for split in SPLITS},
        "files": [
            {"name": "rows.jsonl", "set": "train", "format": "messages", "rows": 7, "ignored_columns": ["a", "b"]}
        ],
        "near_duplicates": {"threshold": 0.8, "holdout_near_train": 0, "within_train": 0, "first": []},
        "inside": {"holdout_inside_train": 0, "first": []},
        "benchmarks": {"documents": 0, "overlapping": 0, "too_short": 0, "files": [], "first": []},
        "conflicting_prompts": 0, "conflicts": [], "labels": {}, "unseen_labels": {},
        "lengths": {split: [[9, 1]] for split in SPLITS}, "examples": [[{"role": "user", "content": "Where?"}]],
        **changes,
    }  # fmt: skip


def test_sets_and_files_have_their_figures() -> None:
    """A row a set and a row a file; tables of what wasn't found are left out."""
    text = report.markdown(figures(), [])
    assert "| holdout | 1 | 9 | 2 | 9 | 9 | 9 | 9 |" in text
    assert "| rows.jsonl | train | messages | 7 | a, b |" in text
    assert "7 rows were read." in text
    assert "| dropped |" not in text
    assert "## Benchmarks" not in text
    assert '"content": "Where?"' in text


def test_dropped_rows_and_defects_say_why() -> None:
    """Each reason is explained in words."""
    text = report.markdown(figures(dropped={"duplicate": 2, "too_long": 1}, defects={"nan": 3}), [])
    assert "| duplicate | 2 | prompt and answer equal an earlier row's |" in text
    assert "| too_long | 1 | more tokens than data.sequence_len |" in text
    assert "| nan | 3 |" in text


def test_leaks_are_listed_with_both_places() -> None:
    """Similarity or share, the holdout row or document, and the row it leaks into; a pipe doesn't break the table."""
    overlap = {"part": "prompt", "share": 0.9, "shared": "in common", "first": place(1, "a | b", "holdout")}
    overlap["second"] = place(5, "c", "val")
    pair = {"similarity": 0.85, "first": place(2, "near", "holdout"), "second": place(3, "nearly")}
    text = report.markdown(
        figures(
            near_duplicates={"threshold": 0.8, "holdout_near_train": 1, "within_train": 4, "first": [pair]},
            inside={"holdout_inside_train": 1, "first": [overlap]},
            benchmarks={
                "documents": 5, "overlapping": 1, "too_short": 2, "first": [overlap],
                "files": [{"name": "exam.txt", "documents": 5, "too_short": 2}],
            },
        ), [],
    )  # fmt: skip
    assert "| 85% | near (rows.jsonl:2) | train | nearly (rows.jsonl:3) |" in text
    assert "| 90% | prompt | a \\| b (rows.jsonl:1) | val | c (rows.jsonl:5) | in common |" in text
    assert "Documents found in train, val or calibration: 1 of 5." in text
    assert "| exam.txt | 5 | 2 |" in text


def test_labels_and_conflicts_are_listed() -> None:
    """Values by set, those that train lacks, and prompts with more than one answer."""
    labels = {"answer": {"yes": {"train": 3, "holdout": 1}, "maybe": {"holdout": 2}}}
    text = report.markdown(
        figures(
            labels=labels,
            unseen_labels={"answer": ["maybe"]},
            conflicting_prompts=1,
            conflicts=[[place(1, "Where?"), place(4, "where")]],
        ),
        ["answers.png"],
    )
    assert "| yes | 3 | 0 | 0 | 1 |" in text
    assert "Values of answer in the holdout that train doesn't have: maybe." in text
    assert "| Where? | /data/rows.jsonl:1, /data/rows.jsonl:4 |" in text
    assert "![answers](answers.png)" in text


def test_the_report_is_written_as_json_markdown_and_plots(tmp_path: Path) -> None:
    """report.json holds the figures as they are; report.md shows the plots that were drawn."""
    report.write(figures(), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == figures()
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "report.md", "token_lengths.png"}
    assert "(token_lengths.png)" in (tmp_path / "report.md").read_text()
