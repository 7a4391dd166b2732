"""The figures of a prepared data set: rows, tokens, labels, leaks. `report` shows them, the artefact's record keeps some.

Label figures exist where answers are labels (few different short answers) or JSON objects (each key with few values).
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline.data import duplicates
from pipeline.data import rows as data_rows
from pipeline.data.benchmarks import BenchmarkSummary
from pipeline.data.defects import DefectLog
from pipeline.data.reading import FileSummary
from pipeline.data.splits import SPLITS

MOST_LABELS = 200
SHOWN = 20
SHOWN_LABELS = 30
EXAMPLES = 3

Summary = dict[str, Any]


def summarise(
    db: sqlite3.Connection,
    files: list[FileSummary],
    benchmarks: list[BenchmarkSummary],
    log: DefectLog,
    leaks: Mapping[str, Any],
) -> Summary:
    """All figures of the report, as JSON; `leaks` is the result of `leaks.check`."""
    conflicts, first_conflicts = duplicates.conflicts(db, SHOWN)
    labels = _labels(db)
    return {
        "files": [_file(summary) for summary in files],
        "rows_read": log.rows,
        "rows": {split: data_rows.count(db, "split = ?", split) for split in SPLITS},
        "tokens": {split: _tokens(db, split) for split in SPLITS},
        "dropped": {
            **({"defective": log.defective_rows} if log.defective_rows else {}),
            **data_rows.dropped(db),
        },
        "defects": dict(sorted(log.counts.items())),
        **leaks,
        "benchmarks": {
            **leaks["benchmarks"],
            "too_short": sum(summary.too_short for summary in benchmarks),
            "files": [vars(summary) for summary in benchmarks],
        },
        "conflicting_prompts": conflicts,
        "conflicts": [[vars(place) for place in group] for group in first_conflicts],
        "labels": labels,
        "unseen_labels": _unseen(labels),
        "lengths": {split: _histogram(db, split) for split in SPLITS},
        "examples": _examples(db),
    }


def detail(summary: Summary) -> dict[str, Any]:
    """The part of the summary that stays with the artefact's record."""
    names = ("rows_read", "rows", "tokens", "dropped", "defects", "conflicting_prompts")
    leaks = {
        kind: {name: value for name, value in summary[kind].items() if name not in ("first", "files")}
        for kind in ("near_duplicates", "inside", "benchmarks")
    }
    return {**{name: summary[name] for name in names}, **leaks}


def _file(summary: FileSummary) -> dict[str, Any]:
    return {
        "name": summary.name,
        "set": "holdout" if summary.side == data_rows.TEST else "train",
        "format": summary.format,
        "rows": summary.rows,
        "ignored_columns": sorted(summary.ignored_columns),
    }


def _histogram(db: sqlite3.Connection, split: str) -> list[list[int]]:
    """[tokens, rows] in order of tokens."""
    query = "SELECT tokens, count(*) FROM rows WHERE split = ? GROUP BY tokens ORDER BY tokens"
    return [list(pair) for pair in db.execute(query, (split,))]


def _tokens(db: sqlite3.Connection, split: str) -> dict[str, int]:
    """Sum of tokens and of answer tokens, and percentiles of a row's tokens (nearest rank)."""
    total, answers = db.execute(
        "SELECT coalesce(sum(tokens), 0), coalesce(sum(answer_tokens), 0) FROM rows WHERE split = ?", (split,)
    ).fetchone()
    histogram = _histogram(db, split)
    rows = sum(count for _, count in histogram)
    figures = {"total": total, "answers": answers}
    for percent in (50, 95, 99, 100):
        rank = -(-rows * percent // 100)
        rows_so_far = 0
        for tokens, count in histogram:
            rows_so_far += count
            if rows_so_far >= rank:
                figures[f"p{percent}" if percent < 100 else "max"] = tokens
                break
    return figures


def _labels(db: sqlite3.Connection) -> dict[str, dict[str, dict[str, int]]]:
    """Rows by label and split: {"answer": {label: {split: rows}}}, or one entry a key of JSON answers."""
    rows = data_rows.count(db, "split IS NOT NULL AND is_text = 0")
    query = "SELECT count(DISTINCT label) FROM rows WHERE split IS NOT NULL AND is_text = 0"
    different = db.execute(query).fetchone()[0]
    counts = db.execute(
        "SELECT label, split, count(*) FROM rows WHERE split IS NOT NULL AND label IS NOT NULL GROUP BY label, split"
    )
    long_answers = data_rows.count(db, "split IS NOT NULL AND is_text = 0 AND label IS NULL")
    if long_answers or not different:
        return {}
    if different <= min(MOST_LABELS, rows / 2):
        rows_by_label: dict[str, dict[str, int]] = {}
        for label, split, count in counts:
            rows_by_label.setdefault(label, {})[split] = count
        return {"answer": rows_by_label}
    return _json_labels(counts)


def _unseen(labels: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, list[str]]:
    """Labels that are in the holdout and not in train; a model can't learn them."""
    unseen = {
        key: sorted(label for label, splits in rows.items() if splits.get("holdout") and not splits.get("train"))
        for key, rows in labels.items()
    }
    return {key: key_labels for key, key_labels in unseen.items() if key_labels}


def _json_labels(counts: sqlite3.Cursor) -> dict[str, dict[str, dict[str, int]]]:
    """The values of each key of answers that are JSON objects; a key with too many values is left out."""
    rows_by_key: dict[str, dict[str, Counter[str]]] = {}
    too_many: set[str] = set()
    for label, split, count in counts:
        try:
            answer = json.loads(label)
        except ValueError:
            return {}
        if not isinstance(answer, dict):
            return {}
        for key, value in answer.items():
            values = rows_by_key.setdefault(key, {})
            if isinstance(value, str | bool | int) and key not in too_many:
                values.setdefault(str(value), Counter())[split] += count
            if len(values) > MOST_LABELS or len(rows_by_key) > MOST_LABELS:
                too_many.add(key)
                rows_by_key[key] = {}
    return {
        key: {value: dict(splits) for value, splits in values.items()}
        for key, values in rows_by_key.items()
        if values and len(values) <= SHOWN_LABELS * 2
    }


def _examples(db: sqlite3.Connection) -> list[Any]:
    query = "SELECT body FROM rows WHERE split = 'train' ORDER BY draw, id LIMIT ?"
    return [json.loads(body) for (body,) in db.execute(query, (EXAMPLES,))]
