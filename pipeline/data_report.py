"""What a person should know about the data before training on it: report.json, report.md and two plots.

Label figures are given where the answers are labels (few different short ones), or JSON objects (for each
key with few different values).
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import data_duplicates, data_rows
from pipeline.data_benchmarks import FileSummary as DocumentSummary
from pipeline.data_defects import Ledger
from pipeline.data_reading import FileSummary
from pipeline.program import write_json

SPLITS = ("train", "val", "calibration", "holdout")
MOST_LABELS = 200
SHOWN = 20
SHOWN_LABELS = 30
EXAMPLES = 3
WHY = {
    "defective": "defects, within data.max_defect_rate",
    "duplicate": "prompt and answer equal an earlier row's",
    "in_holdout": "the prompt is one of the holdout's",
    "too_long": "more tokens than data.sequence_len",
}

Summary = dict[str, Any]


def summarise(
    db: sqlite3.Connection,
    files: list[FileSummary],
    benchmarks: list[DocumentSummary],
    ledger: Ledger,
    leaks: Mapping[str, Any],
) -> Summary:
    """All figures of the report, as JSON; `leaks` are `data_leaks.check`'s."""
    conflicts, shown = data_duplicates.conflicts(db, SHOWN)
    labels = _labels(db)
    return {
        "files": [_file(summary) for summary in files],
        "rows_read": ledger.rows,
        "rows": {split: data_rows.count(db, "split = ?", split) for split in SPLITS},
        "tokens": {split: _tokens(db, split) for split in SPLITS},
        "dropped": {
            **({"defective": ledger.defective_rows} if ledger.defective_rows else {}),
            **data_rows.dropped(db),
        },
        "defects": dict(sorted(ledger.counts.items())),
        **leaks,
        "benchmarks": {
            **leaks["benchmarks"],
            "too_short": sum(summary.too_short for summary in benchmarks),
            "files": [vars(summary) for summary in benchmarks],
        },
        "conflicting_prompts": conflicts,
        "conflicts": [[vars(place) for place in group] for group in shown],
        "labels": labels,
        "unseen_labels": _unseen(labels),
        "lengths": {split: _histogram(db, split) for split in SPLITS},
        "examples": _examples(db),
    }


def detail(summary: Summary) -> dict[str, Any]:
    """The part of the summary that stays with the artefact's record."""
    kept = ("rows_read", "rows", "tokens", "dropped", "defects", "conflicting_prompts")
    leaks = {
        kind: {name: value for name, value in summary[kind].items() if name not in ("first", "files")}
        for kind in ("near_duplicates", "inside", "benchmarks")
    }
    return {**{name: summary[name] for name in kept}, **leaks}


def write(summary: Summary, folder: Path) -> None:
    """Write report.json, report.md, token_lengths.png and, where answers are labels, answers.png."""
    from pipeline import data_plots

    write_json(folder / "report.json", summary)
    plots = data_plots.save(summary, folder)
    (folder / "report.md").write_text(markdown(summary, plots), encoding="utf-8")


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
        seen = 0
        for tokens, count in histogram:
            seen += count
            if seen >= rank:
                figures[f"p{percent}" if percent < 100 else "max"] = tokens
                break
    return figures


def _labels(db: sqlite3.Connection) -> dict[str, dict[str, dict[str, int]]]:
    """Rows by label and split: {"answer": {label: {split: rows}}}, or one entry a key of JSON answers."""
    rows = data_rows.count(db, "split IS NOT NULL AND is_text = 0")
    query = "SELECT count(DISTINCT label) FROM rows WHERE split IS NOT NULL AND is_text = 0"
    different = db.execute(query).fetchone()[0]
    counted = db.execute(
        "SELECT label, split, count(*) FROM rows WHERE split IS NOT NULL AND label IS NOT NULL GROUP BY label, split"
    )
    unlabelled = data_rows.count(db, "split IS NOT NULL AND is_text = 0 AND label IS NULL")
    if unlabelled or not different:
        return {}
    if different <= min(MOST_LABELS, rows / 2):
        found: dict[str, dict[str, int]] = {}
        for label, split, count in counted:
            found.setdefault(label, {})[split] = count
        return {"answer": found}
    return _json_labels(counted)


def _unseen(labels: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, list[str]]:
    """Labels of the holdout that training never sees: nothing can be learned about them."""
    unseen = {
        key: sorted(value for value, splits in values.items() if splits.get("holdout") and not splits.get("train"))
        for key, values in labels.items()
    }
    return {key: values for key, values in unseen.items() if values}


def _json_labels(counted: sqlite3.Cursor) -> dict[str, dict[str, dict[str, int]]]:
    """The values of each key of answers that are JSON objects; a key with too many values is left out."""
    found: dict[str, dict[str, Counter[str]]] = {}
    too_many: set[str] = set()
    for label, split, count in counted:
        try:
            answer = json.loads(label)
        except ValueError:
            return {}
        if not isinstance(answer, dict):
            return {}
        for key, value in answer.items():
            values = found.setdefault(key, {})
            if isinstance(value, str | bool | int) and key not in too_many:
                values.setdefault(str(value), Counter())[split] += count
            if len(values) > MOST_LABELS or len(found) > MOST_LABELS:
                too_many.add(key)
                found[key] = {}
    return {
        key: {value: dict(splits) for value, splits in values.items()}
        for key, values in found.items()
        if values and len(values) <= SHOWN_LABELS * 2
    }


def _examples(db: sqlite3.Connection) -> list[Any]:
    query = "SELECT body FROM rows WHERE split = 'train' ORDER BY draw, id LIMIT ?"
    return [json.loads(body) for (body,) in db.execute(query, (EXAMPLES,))]


def markdown(summary: Summary, plots: list[str]) -> str:
    """The report for people."""
    near, parts = summary["near_duplicates"], ["# Data report", ""]
    parts += _table(
        ["set", "rows", "tokens", "of them in answers", "median", "95 %", "99 %", "longest"],
        [
            [split, summary["rows"][split], *(summary["tokens"][split].get(name, "") for name in FIGURES)]
            for split in SPLITS
        ],
    )
    parts += [f"{summary['rows_read']} rows were read.", ""]
    parts += _table(["dropped", "rows", "why"], [[name, n, WHY[name]] for name, n in summary["dropped"].items()])
    parts += _table(["defect", "found"], [[name, n] for name, n in summary["defects"].items()])
    parts += _table(
        ["file", "set", "format", "rows", "ignored columns"],
        [
            [file["name"], file["set"], file["format"], file["rows"], ", ".join(file["ignored_columns"])]
            for file in summary["files"]
        ],
    )
    parts += [
        "## Rows that say the same",
        "",
        f"Near is at least {near['threshold']:.0%} of the word 3-grams in common.",
        f"Holdout rows near a row of another set: {near['holdout_near_train']}.",
        f"Holdout rows inside a longer row of another set: {summary['inside']['holdout_inside_train']}.",
        f"Training rows near an earlier one: {near['within_train']}.",
        f"Prompts with more than one answer: {summary['conflicting_prompts']}.",
        "",
    ]
    parts += _table(
        ["alike", "holdout", "set", "row"],
        [
            [f"{pair['similarity']:.0%}", _where(pair["first"]), pair["second"]["split"], _where(pair["second"])]
            for pair in near["first"]
        ],
    )
    parts += _table(["inside", "part", "holdout", *OVERLAP], [
        [f"{overlap['share']:.0%}", overlap["part"], *_overlap(overlap)] for overlap in summary["inside"]["first"]
    ])  # fmt: skip
    parts += _table(["prompt with more than one answer", "rows"], [
        [group[0]["text"][:80], ", ".join(f"{place['file']}:{place['line']}" for place in group)]
        for group in summary["conflicts"]
    ])  # fmt: skip
    parts += _benchmarks(summary["benchmarks"])
    for key, unseen in summary["unseen_labels"].items():
        parts += [f"Values of {key} in the holdout that train doesn't have: {', '.join(unseen)}.", ""]
    for key, values in summary["labels"].items():
        parts += [f"## Values of {key}", ""]
        parts += _table(["value", *SPLITS], [
            [value, *(splits.get(split, 0) for split in SPLITS)] for value, splits in sorted(values.items())
        ])  # fmt: skip
    parts += [line for plot in plots for line in (f"![{plot.removesuffix('.png')}]({plot})", "")]
    parts += ["## Examples", ""]
    for example in summary["examples"]:
        parts += ["```json", json.dumps(example, ensure_ascii=False, indent=1)[:2000], "```", ""]
    return "\n".join(parts)


def _benchmarks(found: Mapping[str, Any]) -> list[str]:
    if not found["files"]:
        return []
    return [
        "## Benchmarks",
        "",
        f"Documents found in train, val or calibration: {found['overlapping']} of {found['documents']}.",
        f"Too short to be looked for: {found['too_short']}.",
        "",
        *_table(
            ["file", "documents", "too short"],
            [[file["name"], file["documents"], file["too_short"]] for file in found["files"]],
        ),
        *_table(["document", *OVERLAP], [_overlap(overlap) for overlap in found["first"]]),
    ]


OVERLAP = ("set", "row", "shared")
FIGURES = ("total", "answers", "p50", "p95", "p99", "max")


def _where(place: Mapping[str, Any]) -> str:
    return f"{place['text'][:80]} ({Path(place['file']).name}:{place['line']})"


def _overlap(found: Mapping[str, Any]) -> list[str]:
    return [_where(found["first"]), found["second"]["split"], _where(found["second"]), found["shared"]]


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]] + [""]
