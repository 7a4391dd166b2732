"""The data stage: files become checked, disjoint train, val, calibration and holdout sets in one form.

Takes the base model's tokenizer and chat template, which decide how long a row is. The payload holds
train.jsonl, val.jsonl, calibration.jsonl and holdout.jsonl; a row is {"id", "messages"}, the last message
being the assistant's answer, or {"id", "text"} (never in the holdout); a holdout row has the "columns"
that data.columns names, too. Rows longer than sequence_len are
left out (excess_length_strategy: drop), kept whole for training to cut (truncate), or defects (raise).

All rows pass through an SQLite file in the stage's folder, so that memory stays the same for any amount of
data. What a person should see lies in extra/: report.md, report.json and plots, and as JSON Lines every
defect, dropped row, near duplicate and overlap; they are written as they are found, so they are there when the stage
stops because of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import program, store
from pipeline.data.sources import Named, is_hub_id, local_files, sources
from pipeline.digests import digest_file
from pipeline.errors import DataError, Problem

if TYPE_CHECKING:
    import sqlite3

    from pipeline.data.benchmarks import FileSummary as DocumentSummary
    from pipeline.data.defects import Ledger
    from pipeline.data.ngrams import Index
    from pipeline.data.reading import FileSummary

SHOWN_WITH = ("pipeline.data.report",)
SPLITS = ("train", "val", "calibration", "holdout")


def run(request: program.Request) -> dict[str, Any]:
    """Make the four sets.

    The returned detail: rows and tokens by split, rows dropped by reason, defects by kind, near duplicates,
    holdout rows inside longer ones, benchmark documents found in rows, prompts with conflicting answers, the
    digest of each set's file.

    Raises DataError with every defect of every file (or the first of each kind and where all are listed),
    when too many holdout rows are near another row or inside one, when too many benchmark documents stand in
    one, or when a set that must have rows has none; ModelError without a chat template.
    """
    from pipeline.data import duplicates, ngrams, splits
    from pipeline.data import leaks as data_leaks
    from pipeline.data import rows as data_rows
    from pipeline.data.defects import Ledger

    data, seed = request.config["data"], request.config["seed"]
    extra = request.folder / "extra"
    with Ledger(extra / "defects.jsonl") as ledger:
        db = data_rows.create(request.folder / "rows.sqlite")
        index = ngrams.Index(db)
        files = _read(db, ledger, data, seed, Path(request.inputs["base"]["path"]) / "payload")
        benchmarks = _read_benchmarks(index, ledger, data)
        ledger.judge(data["max_defect_rate"])
    program.message("looking for equal rows and drawing the splits")
    duplicates.drop_equal(db)
    sizes = {name: data[name] for name in ("holdout_size", "val_set_size", "calibration_set_size")}
    splits.assign(db, **sizes)
    leaks = data_leaks.check(db, index, data, extra)
    _list_dropped(db, extra / "dropped.jsonl")
    _require_rows(db, data, files)
    digests = {split: _write(db, split, request.payload / f"{split}.jsonl") for split in SPLITS}
    detail = _report(db, files, benchmarks, ledger, leaks, digests, extra)
    program.message(_told(detail, store.finished(request.folder) / "extra" / "report.md"))
    return detail


def _read(db: sqlite3.Connection, ledger: Ledger, data: Mapping[str, Any], seed: int, base: Path) -> list[FileSummary]:
    """Read every source into the store; a source without files is a defect like any other."""
    from pipeline.data import files as data_files
    from pipeline.data.reading import Intake
    from pipeline.data.tokens import TokenCounter

    program.message(f"loading the tokenizer of {base}")
    found = [
        (named.source, name, path, side)
        for side, group in enumerate(("datasets", "test_datasets"))
        for named in sources(data, group)
        for name, path in _files(named, ledger)
    ]
    total = sum(data_files.about_how_many(path) for _, _, path, _ in found)
    read = 0

    def done(rows: int) -> None:
        nonlocal read
        read += rows
        program.progress(read, max(total, read), "rows read")

    intake = Intake(ledger, data, db, TokenCounter(base), seed, done)
    return [intake.read(source, name, path, side) for source, name, path, side in found]


def _read_benchmarks(index: Index, ledger: Ledger, data: Mapping[str, Any]) -> list[DocumentSummary]:
    """Read every benchmark into the index of what must not be in training."""
    from pipeline.data.benchmarks import Reader

    reader = Reader(index, ledger, data["benchmark_ngram"])
    return [
        reader.read(named.source["columns"], name, path)
        for named in sources(data, "benchmarks")
        for name, path in _files(named, ledger)
    ]


def _files(named: Named, ledger: Ledger) -> list[tuple[str, Path]]:
    from pipeline.data.defects import Defect

    source = named.source
    if is_hub_id(source["path"]):
        from pipeline.data.hub import fetch

        program.message(f"fetching {source['path']}")
        try:
            return fetch(source["path"], source["revision"], source["split"])
        except DataError as error:
            for problem in error.problems:
                key = (problem.key or "").replace("data.datasets", named.key)
                ledger.add_problem("not_fetched", replace(problem, key=key))
            return []
    found = local_files(Path(source["path"]), named.suffixes)
    if isinstance(found, Defect):
        ledger.add_problem(found.kind, named.problem(found))
        return []
    return [(str(path), path) for path in found]


def _list_dropped(db: sqlite3.Connection, listed: Path) -> None:
    query = (
        "SELECT files.name, line, dropped FROM rows JOIN files ON files.n = rows.file"
        " WHERE dropped IS NOT NULL ORDER BY rows.n"
    )
    with listed.open("w", encoding="utf-8") as file:
        for name, line, reason in db.execute(query):
            file.write(json.dumps({"file": name, "line": line, "reason": reason}, ensure_ascii=False) + "\n")


def _require_rows(db: sqlite3.Connection, data: Mapping[str, Any], files: list[FileSummary]) -> None:
    """Raise DataError for train or holdout without rows: where those that were read went, and what gives it some."""
    from pipeline.data import rows as data_rows

    problems = []
    for split, side in (("train", 0), ("holdout", 1 if data["test_datasets"] else 0)):
        if data_rows.count(db, "split = ?", split):
            continue
        places = data_rows.places(db, side)
        told = ", ".join(f"{rows} {place}" for place, rows in places.items()) or "no sound row"
        problems.append(
            Problem(
                f"no rows are left for {split}; read were: {told}",
                file=", ".join(summary.name for summary in files if summary.side == side),
                key="data.test_datasets" if side else "data.datasets",
                remedy=_more_rows(split, places, data),
            )
        )
    if problems:
        raise DataError(problems)


def _more_rows(split: str, places: Mapping[str, int], data: Mapping[str, Any]) -> str:
    """What gives a set rows, by what took them."""
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
    from pipeline.data import rows as data_rows

    with file.open("w", encoding="utf-8") as out:
        for row in data_rows.payload(db, split):
            text = json.dumps(row, ensure_ascii=False)
            # Unicode's own line ends would split the line for a reader that uses str.splitlines.
            out.write(text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029") + "\n")
    return digest_file(file)


def _report(
    db: sqlite3.Connection,
    files: list[FileSummary],
    benchmarks: list[DocumentSummary],
    ledger: Ledger,
    leaks: dict[str, Any],
    digests: dict[str, str],
    extra: Path,
) -> dict[str, Any]:
    from pipeline.data import report, summary

    program.message("writing the data report")
    figures = summary.summarise(db, files, benchmarks, ledger, leaks)
    report.write(figures, extra)
    return {**summary.detail(figures), "digests": digests}


def _told(detail: Mapping[str, Any], report: Path) -> str:
    """What became of the rows, in one line."""
    sets = ", ".join(f"{detail['rows'][split]} {split}" for split in SPLITS)
    dropped = ", ".join(f"{rows} {reason}" for reason, rows in detail["dropped"].items()) or "nothing"
    return f"{sets}; dropped {dropped}; report {report}"


if __name__ == "__main__":
    program.main(run)
