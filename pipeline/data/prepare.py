"""The data stage: files become checked, disjoint train, val, calibration and holdout sets in one form.

The base model's tokenizer and chat template decide how long a row is. The payload holds train.jsonl, val.jsonl,
calibration.jsonl and holdout.jsonl, a row a line:

- {"id", "messages"}; the last message is the assistant's answer;
- {"id", "text"}; never in the holdout;
- a holdout row also has the "columns" that data.columns names.

Rows longer than sequence_len are left out (excess_length_strategy: drop), kept whole for training to cut (truncate),
or defects (raise).

All rows pass through an SQLite file in the stage's folder, so memory stays the same for any amount of data. The folder
extra/ is for people: report.md, report.json and plots, and as JSON Lines every defect, dropped row, near duplicate and
overlap. The lists are written row by row, so they exist when the stage stops because of them.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import program, store
from pipeline.data import duplicates, files, hub, leaks, ngrams, report, rows, splits, summary
from pipeline.data.benchmarks import BenchmarkSummary, DocumentReader
from pipeline.data.defects import Defect, DefectLog
from pipeline.data.reading import FileSummary, Intake, RowReader
from pipeline.data.sources import ConfigSource, is_hub_id, local_files, sources
from pipeline.data.splits import SPLITS
from pipeline.data.tokens import TokenCounter
from pipeline.digests import digest_file
from pipeline.errors import DataError, Problem

SHOWN_WITH = ("pipeline.data.report",)


def run(request: program.Request) -> dict[str, Any]:
    """Prepare the four sets, and return the artefact's detail.

    The detail: rows and tokens by split, dropped rows by reason, defects by kind, near duplicates, holdout rows inside longer ones,
    benchmark documents inside rows, prompts with conflicting answers, the digest of each set's file.

    Raises DataError

    - with every defect of every file, or the first of each kind and the list of all;
    - when too many holdout rows are near another row or inside one;
    - when too many benchmark documents are inside a row;
    - when train or holdout is empty.

    Raises ModelError when the base model lacks a chat template.
    """
    data, seed = request.config["data"], request.config["seed"]
    extra = request.folder / "extra"
    with DefectLog(extra / "defects.jsonl") as log:
        db = rows.create(request.folder / "rows.sqlite")
        index = ngrams.Index(db)
        summaries = _read(db, log, data, seed, Path(request.inputs["base"]["path"]) / "payload")
        benchmarks = _read_benchmarks(index, log, data)
        log.raise_if_too_many(data["max_defect_rate"])
    program.message("looking for equal rows and drawing the splits")
    duplicates.drop_equal(db)
    sizes = {name: data[name] for name in ("holdout_size", "val_set_size", "calibration_set_size")}
    splits.assign(db, **sizes)
    leak_figures = leaks.check(db, index, data, extra)
    _list_dropped(db, extra / "dropped.jsonl")
    _require_rows(db, data, summaries)
    digests = {split: _write(db, split, request.payload / f"{split}.jsonl") for split in SPLITS}
    program.message("writing the data report")
    figures = summary.summarise(db, summaries, benchmarks, log, leak_figures)
    report.write(figures, extra)
    detail = {**summary.detail(figures), "digests": digests}
    program.message(_in_one_line(detail, store.finished(request.folder) / "extra" / "report.md"))
    return detail


def _read(db: sqlite3.Connection, log: DefectLog, data: Mapping[str, Any], seed: int, base: Path) -> list[FileSummary]:
    """Read every source into the store; a source without files is a defect like any other."""
    program.message(f"loading the tokenizer of {base}")
    data_files = [
        (entry.source, name, path, side)
        for side, group in enumerate(("datasets", "test_datasets"))
        for entry in sources(data, group)
        for name, path in _files(entry, log)
    ]
    total = sum(files.about_how_many(path) for _, _, path, _ in data_files)
    rows_so_far = 0

    def report_more(rows: int) -> None:
        nonlocal rows_so_far
        rows_so_far += rows
        program.progress(rows_so_far, max(total, rows_so_far), "rows read")

    counter = TokenCounter(base)
    intake = Intake(RowReader(log, data, counter.special), db, counter, seed, report_more)
    return [intake.read(source, name, path, side) for source, name, path, side in data_files]


def _read_benchmarks(index: ngrams.Index, log: DefectLog, data: Mapping[str, Any]) -> list[BenchmarkSummary]:
    """Read every benchmark into the index of texts that must not be in training rows."""
    reader = DocumentReader(index, log, data["benchmark_ngram"])
    return [
        reader.read(entry.source["columns"], name, path)
        for entry in sources(data, "benchmarks")
        for name, path in _files(entry, log)
    ]


def _files(entry: ConfigSource, log: DefectLog) -> list[tuple[str, Path]]:
    source = entry.source
    if is_hub_id(source["path"]):
        program.message(f"fetching {source['path']}")
        try:
            return hub.fetch(source["path"], source["revision"], source["split"])
        except DataError as error:
            for problem in error.problems:
                key = (problem.key or "").replace("data.datasets", entry.key)
                log.add_problem("not_fetched", replace(problem, key=key))
            return []
    data_files = local_files(Path(source["path"]), entry.suffixes)
    if isinstance(data_files, Defect):
        log.add_problem(data_files.kind, entry.problem(data_files))
        return []
    return [(str(path), path) for path in data_files]


def _list_dropped(db: sqlite3.Connection, list_file: Path) -> None:
    query = (
        "SELECT files.name, line, dropped FROM rows JOIN files ON files.n = rows.file"
        " WHERE dropped IS NOT NULL ORDER BY rows.n"
    )
    with list_file.open("w", encoding="utf-8") as file:
        for name, line, reason in db.execute(query):
            file.write(json.dumps({"file": name, "line": line, "reason": reason}, ensure_ascii=False) + "\n")


def _require_rows(db: sqlite3.Connection, data: Mapping[str, Any], summaries: list[FileSummary]) -> None:
    """Raise DataError if train or holdout is empty; it tells where the rows went and how the set gets some."""
    problems = []
    for split, side in (("train", 0), ("holdout", 1 if data["test_datasets"] else 0)):
        if rows.count(db, "split = ?", split):
            continue
        places = rows.places(db, side)
        counts = ", ".join(f"{count} {place}" for place, count in places.items()) or "not one sound row"
        problems.append(
            Problem(
                f"{split} must have at least one row; read were: {counts}",
                file=", ".join(summary.name for summary in summaries if summary.side == side),
                key="data.test_datasets" if side else "data.datasets",
                remedy=_more_rows(split, places, data),
            )
        )
    if problems:
        raise DataError(problems)


def _more_rows(split: str, places: Mapping[str, int], data: Mapping[str, Any]) -> str:
    """The remedy for an empty set, by where its rows went."""
    if split == "holdout" and not data["test_datasets"]:
        return "set data.holdout_size to a number of rows, or name test_datasets"
    ways = {
        "holdout": f"lower data.holdout_size ({data['holdout_size']:g})",
        "val": f"lower data.val_set_size ({data['val_set_size']:g})",
        "dropped as in_holdout": "take the holdout's rows out of the file",
        "dropped as too_long": f"raise data.sequence_len ({data['sequence_len']})",
    }
    fitting = [way for place, way in ways.items() if place in places]
    return ", or ".join(["add rows", *fitting])


def _write(db: sqlite3.Connection, split: str, file: Path) -> str:
    """Write a set and return the file's digest."""
    with file.open("w", encoding="utf-8") as out:
        for row in rows.payload(db, split):
            text = json.dumps(row, ensure_ascii=False)
            # Unicode's own line ends would split the line for a reader that uses str.splitlines.
            out.write(text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029") + "\n")
    return digest_file(file)


def _in_one_line(detail: Mapping[str, Any], report_file: Path) -> str:
    """The rows of each set, the dropped rows by reason, and the report's place."""
    sets = ", ".join(f"{detail['rows'][split]} {split}" for split in SPLITS)
    dropped_rows = ", ".join(f"{count} {reason}" for reason, count in detail["dropped"].items()) or "nothing"
    return f"{sets}; dropped {dropped_rows}; report {report_file}"


if __name__ == "__main__":
    program.main(run)
